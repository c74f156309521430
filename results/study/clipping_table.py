"""Print, epoch by epoch, what clipping.py recorded, and draw collapse/steps.png. Run it from the
repository's root:

python results/study/clipping_table.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path("results/study/collapse")
NAMES = {
    "steps_dist_student_clip0": "dist_student, not clipped",
    "steps_dist_student_clip1": "dist_student, clipped at 1",
    "steps_control_clip1": "control, clipped at 1",
}

figure = Figure(figsize=(12, 4.5), layout="constrained")
panels = dict(zip(("train_acc", "gradient", "gain"), figure.subplots(1, 3), strict=True))
print("| | epoch | training accuracy | loss | gradient, median | largest | share above 1 | gain |")
print("|---" * 8 + "|")
for file, name in NAMES.items():
    steps = np.genfromtxt(FOLDER / f"{file}.csv", delimiter=",", names=True)
    for epoch in np.unique(steps["epoch"]):
        rows = steps[steps["epoch"] == epoch]
        gradient = rows["gradient"]
        share = 100 * np.mean(gradient > 1)
        print(
            f"| {name} | {epoch:.0f} | {rows['train_acc'].mean():.2f} | {rows['loss'].mean():.3f} "
            f"| {np.median(gradient):.2f} | {gradient.max():.2f} | {share:.0f} % "
            f"| {rows['gain'][-1]:.2f} |"
        )
    for key, axes in panels.items():
        axes.plot(steps[key], label=name, linewidth=0.8)
titles = {
    "train_acc": "training accuracy (%)",
    "gradient": "length of the gradient before clipping",
    "gain": "gain of skip",
}
for key, axes in panels.items():
    axes.set_title(titles[key])
    axes.set_xlabel("step")
    if key != "train_acc":
        axes.set_yscale("log")
panels["train_acc"].legend()
figure.savefig(FOLDER / "steps.png")
