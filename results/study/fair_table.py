"""Print what stands against the teacher: other second trainings, by fair.py, and a student trained
from scratch for longer. Run it from the repository's root:

python results/study/fair_table.py

Differences: points, ± one standard error, paired by image. On test images, what is said of the last
epoch comes from answers.npz, in float32; the last five come from the logs.
"""

import math
from pathlib import Path

import numpy as np

STUDY = Path("results/study")
FAIR = STUDY / "fair"
TUNING = STUDY / "tuning/cutout"


def difference(correct, other):
    points = 100 * (correct.astype(float) - other.astype(float))
    return f"{points.mean():+.2f} ± {points.std(ddof=1) / math.sqrt(len(points)):.2f}"


def print_table(heading, correct, logs):
    """correct: by row, bool (N,), for each image whether the answer is right; with the rows
    "control" and "dist_student". logs: by row, the path of the training's log."""
    print(f"| {heading} | last epoch | last five | − control | − dist_student |")
    print("|---|---|---|---|---|")
    for row, answers in correct.items():
        log = np.genfromtxt(logs[row], delimiter=",", names=True)
        last_five = log["test_acc"][-5:].mean()
        control = difference(answers, correct["control"])
        distilled = difference(answers, correct["dist_student"])
        print(f"| {row} | {100 * answers.mean():.2f} | {last_five:.2f} | {control} | {distilled} |")
    print()


def print_test_table(heading, run, others):
    """run: the folder of student, control and dist_student. others: by row, a folder with
    answers.npz and one log, and the network's name."""
    answers = np.load(run / "answers.npz")
    labels = answers["labels"]
    correct = {}
    logs = {}
    for name in ("student", "control", "dist_student"):
        correct[name] = answers[name] == labels
        logs[name] = run / f"{name}_train_logs.csv"
    for row, (folder, name) in others.items():
        correct[row] = np.load(FAIR / folder / "answers.npz")[name] == labels
        logs[row] = FAIR / folder / f"{name}_train_logs.csv"
    print_table(heading, correct, logs)


print_test_table(
    "test images, with clipping",
    Path("results/strong"),
    {"a student from scratch, 130 epochs": ("strong_equal_budget", "student")},
)
print_test_table(
    "test images, without clipping",
    Path("results/seeds/strong_unclipped_0"),
    {
        "a student from scratch, 130 epochs": ("unclipped_equal_budget", "student"),
        "the student as its own teacher": ("unclipped_own_teacher", "dist_student"),
    },
)

held_out = {}
for name, bits in np.load(TUNING / "correct.npz").items():
    held_out[name] = np.unpackbits(bits)[:5000]
rows = {
    "control": "control_epochs30_lr0.05",
    "dist_student": "dist_student_epochs30_lr0.05",
    "control, labels smoothed by 0.1": "control_epochs30_lr0.05_smoothing0.1",
    "control at half the learning rate": "control_epochs30_lr0.025",
    "control at twice the learning rate": "control_epochs30_lr0.1",
}
correct = {}
logs = {}
for row, name in rows.items():
    correct[row] = held_out[name]
    logs[row] = TUNING / f"{name}.csv"
print_table("held-out images, without clipping", correct, logs)

print_test_table(
    "`reference`, test images",
    Path("results/reference"),
    {
        "control at half the learning rate": ("reference_lr0.005", "control"),
        "control at twice the learning rate": ("reference_lr0.02", "control"),
        "control, labels smoothed by 0.1": ("reference_smoothing", "control"),
    },
)
