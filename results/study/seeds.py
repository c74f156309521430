"""Print the tables over seeds: that of README.md, then those of results/README.md. Run it from
the repository's root:

python results/study/seeds.py

Seed 0 lies in results/<recipe>, the others in results/seeds/<recipe>_<seed>.
"""

import json
from pathlib import Path

import numpy as np

NAMES = {
    "teacher": "teacher",
    "student": "student",
    "dist_student": "distilled student",
    "control": "control",
}
ASSIGNMENT = {"teacher": "78.91", "student": "75.25", "dist_student": "79.70", "control": "none"}
RECIPES = ("reference", "strong")
PAIRS = (("dist_student", "control"), ("control", "student"))
FIGURES = ("test_acc", "test_acc_last5")


def over_seeds(recipe, name, figure):
    """An array of the seeds' values."""
    folders = [Path("results", recipe), *sorted(Path("results", "seeds").glob(f"{recipe}_*"))]
    runs = [json.loads((folder / "summary.json").read_text())["rows"] for folder in folders]
    return np.array([rows[name][figure] for rows in runs])


def spread(values):
    """Mean ± standard deviation."""
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def differences(recipe, name, other, figure):
    """An array of the seeds' differences."""
    return over_seeds(recipe, name, figure) - over_seeds(recipe, other, figure)


def mean_difference(values):
    """Mean ± one standard error of the mean."""
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / np.sqrt(len(values)):.2f}"


def print_row(cells):
    print("|", " | ".join(cells), "|")


titles = []
for recipe in RECIPES:
    titles += [f"`{recipe}`, last epoch", "mean of last 5"]

print_row(["", "assignment", *titles])
print("|---" * 6 + "|")
for name, words in NAMES.items():
    cells = [words, ASSIGNMENT[name]]
    for recipe in RECIPES:
        cells += [spread(over_seeds(recipe, name, figure)) for figure in FIGURES]
    print_row(cells)
for name, other in PAIRS:
    cells = [f"{NAMES[name]} − {NAMES[other]}", ""]
    for recipe in RECIPES:
        for figure in FIGURES:
            cells.append(mean_difference(differences(recipe, name, other, figure)))
    print_row(cells)

for recipe in RECIPES:
    print(f"\n{recipe}\n")
    print_row(["seed by seed", "last epoch", "mean of last 5"])
    print("|---" * 3 + "|")
    for name, other in PAIRS:
        cells = [f"{NAMES[name]} − {NAMES[other]}"]
        for figure in FIGURES:
            values = differences(recipe, name, other, figure)
            cells.append(", ".join(f"{value:+.2f}" for value in values))
        print_row(cells)
    print()
    print_row(["", "train acc.", "agreement with teacher", "calibration error", "epochs"])
    print("|---" * 5 + "|")
    for name, words in NAMES.items():
        print_row(
            [
                words,
                spread(over_seeds(recipe, name, "train_acc")),
                spread(over_seeds(recipe, name, "agreement")),
                spread(100 * over_seeds(recipe, name, "ece")),
                ", ".join(str(epochs) for epochs in over_seeds(recipe, name, "epochs")),
            ]
        )
