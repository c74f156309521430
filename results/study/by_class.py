"""Print, from one run's answers.npz (see answers.py), what the teacher added class by class, and
how much of the agreement with the teacher comes from being right more often. Run it from the
repository's root:

python results/study/by_class.py results/reference
"""

import math
import sys

import numpy as np

sys.path.append(".")
import kd

answers = np.load(f"{sys.argv[1]}/answers.npz")
labels = answers["labels"]


def right(name):
    return answers[name] == labels


def difference(name, other, chosen):
    """Points, ± one standard error over these images, and how many standard errors it is."""
    points = 100.0 * right(name)[chosen] - 100.0 * right(other)[chosen]
    standard_error = points.std(ddof=1) / math.sqrt(len(points))
    return f"{points.mean():+.2f} ± {standard_error:.2f} ({points.mean() / standard_error:+.1f})"


def repeats(name):
    """Whether a network repeats the teacher's error, on each image where the teacher is wrong."""
    return 100.0 * (answers[name] == answers["teacher"])[~right("teacher")]


print("| | dist_student − control | control − student |")
print("|---|---|---|")
groups = {"all": np.full(len(labels), True)}
for label, word in enumerate(kd.CLASSES):
    groups[word] = labels == label
for word, chosen in groups.items():
    first = difference("dist_student", "control", chosen)
    second = difference("control", "student", chosen)
    print(f"| {word} | {first} | {second} |")

print("\n| | agreement with teacher | where the teacher is right | where the teacher is wrong |")
print("|---|---|---|---|")
for name in ("student", "control", "dist_student"):
    same = answers[name] == answers["teacher"]
    cells = [100 * same.mean(), 100 * same[right("teacher")].mean()]
    cells.append(100 * same[~right("teacher")].mean())
    print(f"| {name} |", " | ".join(f"{cell:.2f}" for cell in cells), "|")

points = repeats("dist_student") - repeats("control")
standard_error = points.std(ddof=1) / math.sqrt(len(points))
print("\nwhere the teacher is wrong, dist_student − control:", end=" ")
print(f"{points.mean():+.1f} ± {standard_error:.1f} on {len(points)} images")
