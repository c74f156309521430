"""Print the tables of the trainings that chose the settings of `strong`. Run it from the
repository's root:

python results/study/tuning.py

Their logs lie in results/study/tuning: columns as in kd.py's logs; "test" is held-out images.
correct.npz holds, for each training of the second table, which of the held-out images its network
answers correctly: one bit per image.
"""

import math
from pathlib import Path

import numpy as np

TUNING = Path("results/study/tuning")
CORRECT = np.load(TUNING / "full" / "correct.npz")


def difference(name, other):
    """Points, ± one standard error of the paired difference."""
    points = 100 * (
        np.unpackbits(CORRECT[name]).astype(float) - np.unpackbits(CORRECT[other]).astype(float)
    )
    return f"{points.mean():+.2f} ± {points.std(ddof=1) / math.sqrt(len(points)):.2f}"


def print_table(folder, columns):
    paths = sorted((TUNING / folder).glob("*.csv"), reverse=True)
    print("| | epochs | training | held-out, last epoch | held-out, last 5 epochs |", end="")
    for title in columns:
        print(f" {title} |", end="")
    print("\n" + "|---" * (5 + len(columns)) + "|")
    for path in paths:
        log = np.genfromtxt(path, delimiter=",", names=True)
        cells = [
            path.stem.replace("_", ", "),
            str(len(log)),
            f"{log['train_acc'][-1]:.2f}",
            f"{log['test_acc'][-1]:.2f}",
            f"{log['test_acc'][-5:].mean():.2f}",
        ]
        for compared_with in columns.values():
            cells.append(compared_with(path.stem))
        print("|", " | ".join(cells), "|")
    print()


def with_present(name):
    """Compared with the present setting."""
    if name.startswith("teacher_"):
        return difference(name, "teacher")
    if name.startswith(("distill", "control")) and name != "distill_T4_alpha0.1_lr0.05":
        return difference(name, "distill_T4_alpha0.1_lr0.05")
    return ""


def with_control(name):
    if name.startswith("distill"):
        return difference(name, "control_lr0.05")
    return ""


print_table("half", {})
print_table("full", {"− present setting": with_present, "− control, lr0.05": with_control})
