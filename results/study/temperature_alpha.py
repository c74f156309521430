"""Draw temperature_alpha.png from the logs in the folder of that name. Run it from the repository's
root:

python results/study/temperature_alpha.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

STUDY = Path("results/study/temperature_alpha")
SAMPLING_ERROR = 0.6  # points: one standard error of an accuracy near 75% on 5,000 images


def last_accuracy(path):
    """Held-out accuracy (%) after the last epoch of a log."""
    log = np.genfromtxt(path, delimiter=",", names=True)
    return log["test_acc"][-1]


figure = Figure(figsize=(8, 4.5), layout="constrained")
axes = figure.subplots()
for epochs, style in ((10, "-"), (20, "--")):
    labels_alone = last_accuracy(STUDY / f"{epochs}_epochs_student_lr0.05_batch128.csv")
    label = f"{epochs} epochs, labels alone (α = 1)"
    axes.axhline(labels_alone, color="gray", linestyle=style, label=label)
    for alpha, color in (("0", "tab:green"), ("0.1", "tab:blue"), ("0.5", "tab:orange")):
        temperatures = []
        accuracies = []
        for temperature in (1, 2, 4, 8):
            path = STUDY / f"{epochs}_epochs_T{temperature}_alpha{alpha}.csv"
            if path.exists():
                temperatures.append(temperature)
                accuracies.append(last_accuracy(path))
        if temperatures:
            axes.errorbar(
                temperatures,
                accuracies,
                SAMPLING_ERROR,
                fmt=f"o{style}",
                color=color,
                capsize=3,
                label=f"{epochs} epochs, α = {alpha}",
            )
axes.set_title("Students trained on 15,000 images; bars: ± one sampling error")
axes.set_xlabel("temperature T")
axes.set_ylabel("accuracy on 5,000 held-out images (%)")
axes.set_xscale("log")
axes.set_xticks((1, 2, 4, 8), ("1", "2", "4", "8"))
axes.minorticks_off()
figure.legend(loc="outside right center")
figure.savefig("results/study/temperature_alpha.png")
