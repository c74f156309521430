"""Draw temperature_alpha.png from tuning/full/correct.npz. Run it from the repository's root:

python results/study/temperature_alpha.py
"""

import math

import matplotlib.pyplot as plt
import numpy as np

correct = np.load("results/study/tuning/full/correct.npz")
control = np.unpackbits(correct["control_lr0.05"]).astype(float)

figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
axes.axhline(0, color="gray", label="control")
# A little left and right of T, so that the bars do not hide each other.
for alpha, factor in (("0.1", 0.98), ("0.5", 1.02)):
    places = []
    differences = []
    standard_errors = []
    for temperature in (1, 2, 4):
        distilled = np.unpackbits(correct[f"distill_T{temperature}_alpha{alpha}_lr0.05"])
        points = 100 * (distilled - control)
        places.append(temperature * factor)
        differences.append(points.mean())
        standard_errors.append(points.std(ddof=1) / math.sqrt(len(points)))
    axes.errorbar(
        places, differences, standard_errors, fmt="o-", capsize=3, label=f"alpha = {alpha}"
    )
axes.set_title("strong without cutout: one seed, 20 epochs, 5,000 held-out images")
axes.set_xlabel("temperature T")
axes.set_ylabel("dist_student − control (points, ± one standard error)")
axes.set_xscale("log")
axes.set_xticks((1, 2, 4), ("1", "2", "4"))
axes.minorticks_off()
axes.legend()
figure.savefig("results/study/temperature_alpha.png")
