"""Print the tables over seeds. Each argument is the folder of one seed's run:

python results/study/seeds.py results/reference results/seeds/reference_*

Over seeds: mean and 95 % interval by Student's t. A difference whose interval contains 0 is "no
difference seen". Accuracy and loss come from the logs, agreement from summary.json.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

NAMES = ("teacher", "student", "dist_student", "control")
PAIRS = (
    ("dist_student", "control"),
    ("control", "student"),
    ("dist_student", "student"),
    ("dist_student", "teacher"),
    ("control", "teacher"),
)
# Student's t, 97.5 %, by number of seeds (degrees of freedom + 1).
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def last_epoch(log):
    return log["test_acc"][-1]


def last_five(log):
    return log["test_acc"][-5:].mean()


def train_acc(log):
    return log["train_acc"][-1]


def test_loss(log):
    return log["test_loss"][-1]


def over_seeds(name, figure):
    """An array with one value per seed."""
    return np.array([figure(log) for log in logs[name]])


def half_width(values):
    """Of the 95 % interval of the mean."""
    return T[len(values)] * values.std(ddof=1) / math.sqrt(len(values))


def spread(values, digits=2):
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def interval(values):
    mean = values.mean()
    half = half_width(values)
    text = f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"
    if abs(mean) < half:
        text += ", no difference seen"
    return text


def print_table(rows):
    for number, row in enumerate(rows):
        print("|", " | ".join(row), "|")
        if number == 0:
            print("|---" * len(row) + "|")
    print()


folders = [Path(argument) for argument in sys.argv[1:]]
logs = {}
agreement = {}
for name in NAMES:
    logs[name] = []
    agreement[name] = []
    for folder in folders:
        path = folder / f"{name}_train_logs.csv"
        logs[name].append(np.genfromtxt(path, delimiter=",", names=True))
        summary = json.loads((folder / "summary.json").read_text())
        agreement[name].append(summary["rows"][name]["agreement"])

print(f"{len(folders)} seeds: mean ± standard deviation\n")
table = [["", "last epoch", "mean of last 5", "train acc.", "test loss", "agreement", "epochs"]]
for name in NAMES:
    table.append(
        [
            name,
            spread(over_seeds(name, last_epoch)),
            spread(over_seeds(name, last_five)),
            spread(over_seeds(name, train_acc)),
            spread(over_seeds(name, test_loss), 3),
            spread(np.array(agreement[name])),
            ", ".join(str(epochs) for epochs in over_seeds(name, len)),
        ]
    )
print_table(table)

print("Differences: mean (95 % interval by t)\n")
table = [["", "last epoch", "seed by seed", "mean of last 5", "seed by seed"]]
for name, other in PAIRS:
    row = [f"{name} − {other}"]
    for figure in (last_epoch, last_five):
        values = over_seeds(name, figure) - over_seeds(other, figure)
        row += [interval(values), ", ".join(f"{value:+.2f}" for value in values)]
    table.append(row)
print_table(table)
