"""Print, epoch by epoch, what clipping.py recorded. Run it from the repository's root:

python results/study/clipping_table.py
"""

import numpy as np

NAMES = {
    "steps_dist_student_clip0": "dist_student, not clipped",
    "steps_dist_student_clip1": "dist_student, clipped at 1",
    "steps_control_clip1": "control, clipped at 1",
}

print("| | epoch | training accuracy | loss | gradient, shortest | median | longest | gain |")
print("|---" * 8 + "|")
for file, name in NAMES.items():
    steps = np.genfromtxt(f"results/study/collapse/{file}.csv", delimiter=",", names=True)
    for epoch in np.unique(steps["epoch"]):
        rows = steps[steps["epoch"] == epoch]
        gradient = rows["gradient"]
        print(
            f"| {name} | {epoch:.0f} | {rows['train_acc'].mean():.2f} | {rows['loss'].mean():.3f} "
            f"| {gradient.min():.2f} | {np.median(gradient):.2f} | {gradient.max():.2f} "
            f"| {rows['gain'][-1]:.2f} |"
        )
