"""Print the tables over seeds of a recipe. Run it from the repository's root:

python results/study/seeds.py reference

Seed 0 lies in results/<recipe>, the others in results/seeds/<recipe>_<seed>.
"""

import json
import sys
from pathlib import Path

import numpy as np

NAMES = {
    "teacher": "teacher",
    "student": "student",
    "dist_student": "distilled student",
    "control": "control",
}
ASSIGNMENT = {"teacher": "78.91", "student": "75.25", "dist_student": "79.70", "control": "none"}

recipe = sys.argv[1]
folders = [Path("results", recipe), *sorted(Path("results", "seeds").glob(f"{recipe}_*"))]
runs = [json.loads((folder / "summary.json").read_text())["rows"] for folder in folders]


def over_seeds(name, figure):
    """An array of the seeds' values."""
    return np.array([rows[name][figure] for rows in runs])


def spread(values):
    """Mean ± standard deviation."""
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


print(f"`{recipe}`, {len(runs)} seeds, mean ± standard deviation over seeds:\n")
print("| | test acc. | mean of last 5 epochs | assignment |")
print("|---|---|---|---|")
for name, words in NAMES.items():
    last = spread(over_seeds(name, "test_acc"))
    last_five = spread(over_seeds(name, "test_acc_last5"))
    print(f"| {words} | {last} | {last_five} | {ASSIGNMENT[name]} |")

print("\nPoints, paired by seed; the mean ± one standard error over seeds:\n")
print("| | last epoch: seeds | mean | last 5 epochs: seeds | mean |")
print("|---|---|---|---|---|")
for name, other in (("dist_student", "control"), ("control", "student")):
    cells = [f"{NAMES[name]} − {NAMES[other]}"]
    for figure in ("test_acc", "test_acc_last5"):
        difference = over_seeds(name, figure) - over_seeds(other, figure)
        standard_error = difference.std(ddof=1) / np.sqrt(len(runs))
        cells.append(", ".join(f"{value:+.2f}" for value in difference))
        cells.append(f"{difference.mean():+.2f} ± {standard_error:.2f}")
    print("|", " | ".join(cells), "|")

print("\nIn %, mean ± standard deviation over seeds; epochs of each seed:\n")
print("| | train acc. | agreement with teacher | calibration error | epochs |")
print("|---|---|---|---|---|")
for name, words in NAMES.items():
    train = spread(over_seeds(name, "train_acc"))
    agreement = spread(over_seeds(name, "agreement"))
    calibration = spread(100 * over_seeds(name, "ece"))
    epochs = ", ".join(str(rows[name]["epochs"]) for rows in runs)
    print(f"| {words} | {train} | {agreement} | {calibration} | {epochs} |")
