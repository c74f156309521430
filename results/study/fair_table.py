"""Print what stands against the teacher: other second trainings, by fair.py. The first two tables
are about `strong` without gradient clipping, the last about `reference`. Run it from the
repository's root:

python results/study/fair_table.py

Differences: points, ± one standard error, paired by image. On test images, what is said of the last
epoch comes from answers.npz, in float32; the last five come from the logs.
"""

import math
from pathlib import Path

import numpy as np

STUDY = Path("results/study")
STRONG = "results/seeds/strong_unclipped_0"


def difference(correct, other):
    points = 100 * (correct.astype(float) - other.astype(float))
    return f"{points.mean():+.2f} ± {points.std(ddof=1) / math.sqrt(len(points)):.2f}"


def print_row(words, correct, path):
    """correct: bool (N,), for each image whether the answer is right. path: the training's log."""
    log = np.genfromtxt(path, delimiter=",", names=True)
    last_five = log["test_acc"][-5:].mean()
    gain = difference(correct, control)
    print(f"| {words} | {100 * correct.mean():.2f} | {last_five:.2f} | {gain} |")


def print_run(heading, folder):
    """A table's first rows: student, control and dist_student of one run on the test images."""
    print(f"| {heading} | last epoch | last five | − control |")
    print("|---|---|---|---|")
    for name in ("student", "control", "dist_student"):
        print_row(name, answers[name] == labels, f"{folder}/{name}_train_logs.csv")


answers = np.load(f"{STRONG}/answers.npz")
own = np.load(STUDY / "fair/own_teacher_answers.npz")["dist_student"]
equal = np.load(STUDY / "fair/equal_budget_answers.npz")["student"]
labels = answers["labels"]
control = answers["control"] == labels
print_run("test images", STRONG)
path = STUDY / "fair/own_teacher_train_logs.csv"
print_row("the student as its own teacher", own == labels, path)
path = STUDY / "fair/equal_budget_train_logs.csv"
print_row("a student from scratch, 130 epochs", equal == labels, path)

tuning = STUDY / "tuning/cutout"
correct = {}
for name, bits in np.load(tuning / "correct.npz").items():
    correct[name] = np.unpackbits(bits)[:5000]
control = correct["control_epochs30_lr0.05"]
rows = {
    "control": "control_epochs30_lr0.05",
    "control, labels smoothed by 0.1": "control_epochs30_lr0.05_smoothing0.1",
    "control at half the learning rate": "control_epochs30_lr0.025",
    "control at twice the learning rate": "control_epochs30_lr0.1",
    "dist_student": "dist_student_epochs30_lr0.05",
}
print("\n| held-out images | last epoch | last five | − control |")
print("|---|---|---|---|")
for words, name in rows.items():
    print_row(words, correct[name], tuning / f"{name}.csv")

answers = np.load("results/reference/answers.npz")
control = answers["control"] == labels
print()
print_run("`reference`, test images", "results/reference")
rows = {
    "control at twice the learning rate": "reference_lr0.02",
    "control, labels smoothed by 0.1": "reference_smoothing",
}
for words, name in rows.items():
    other = np.load(STUDY / "fair" / name / "answers.npz")["control"]
    print_row(words, other == labels, STUDY / "fair" / name / "control_train_logs.csv")
