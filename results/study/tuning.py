"""Print the tables of the trainings that chose the settings of `strong`. Run it from the
repository's root:

python results/study/tuning.py

Their logs lie in results/study/tuning: columns as in kd.py's logs; "test" is held-out images.
correct.npz holds which of the 5,000 held-out images each network answers correctly: one bit per
image. Differences: points, ± one standard error, paired by image.
"""

import math
from pathlib import Path

import numpy as np

TUNING = Path("results/study/tuning")
correct = {}
for folder in ("full", "cutout"):
    for name, bits in np.load(TUNING / folder / "correct.npz").items():
        correct[f"{folder}/{name}"] = np.unpackbits(bits)[:5000].astype(float)


def difference(name, other):
    if name not in correct or other not in correct or name == other:
        return ""
    points = 100 * (correct[name] - correct[other])
    return f"{points.mean():+.2f} ± {points.std(ddof=1) / math.sqrt(len(points)):.2f}"


def print_table(folder, columns):
    """`columns`: for each title, what the rows whose names begin with a word are compared with."""
    paths = sorted((TUNING / folder).glob("*.csv"), reverse=True)
    titles = [
        "",
        "epochs",
        "training",
        "held-out, last epoch",
        "held-out, last 5",
        "lowest",
        "loss",
    ]
    titles += list(columns)
    print("|", " | ".join(titles), "|")
    print("|---" * len(titles) + "|")
    for path in paths:
        log = np.genfromtxt(path, delimiter=",", names=True)
        lowest = ""
        if not path.stem.startswith(("teacher", "student")):
            epoch = log["test_acc"].argmin()
            lowest = f"{log['test_acc'][epoch]:.1f} (epoch {epoch + 1})"
        cells = [
            path.stem.replace("_", " "),
            str(len(log)),
            f"{log['train_acc'][-1]:.2f}",
            f"{log['test_acc'][-1]:.2f}",
            f"{log['test_acc'][-5:].mean():.2f}",
            lowest,
            f"{log['test_loss'][-1]:.3f}",
        ]
        for others in columns.values():
            cell = ""
            for word, other in others.items():
                if path.stem.startswith(word):
                    cell = difference(f"{folder}/{path.stem}", other)
            cells.append(cell)
        print("|", " | ".join(cells), "|")
    print()


print("A first look, half of the first stage's epochs\n")
print_table("half", {})

print("Full length, without cutout\n")
present = "full/distill_T4_alpha0.1_lr0.05"
print_table(
    "full",
    {
        "− present": {"teacher": "full/teacher", "distill": present, "control": present},
        "− control": {"distill": "full/control_lr0.05"},
    },
)

print("With a cutout of 12 pixels; the second stage from teacher and student of 100 epochs\n")
control = "cutout/control_epochs30_lr0.05"
print_table(
    "cutout",
    {
        "− without cutout": {"student_epochs60": "full/student"},
        "− 60 epochs": {"student_epochs100": "cutout/student_epochs60"},
        "− 30 epochs, lr 0.05": {"dist_student": "cutout/dist_student_epochs30_lr0.05"},
        "− control, lr 0.05": {"dist_student": control, "control": control},
        "− control with smoothing": {"dist_student": f"{control}_smoothing0.1"},
    },
)
