"""Tables over seeds and variants, effect.png and images.png, from the logs beside this file:

python results/seeds.py
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent
NAMES = ["teacher", "student", "control", "dist_student"]
REFERENCE = ["reference"] + [f"seeds/reference_{seed}" for seed in (1, 2, 3, 4)]
STRONG = ["strong", "seeds/strong_1", "seeds/strong_2"]
FEW = ["few"] + [f"seeds/few_{seed}" for seed in (1, 2, 3, 4)]
# For each seed, three folders: that of dist_student's teacher, that of the student, and that of
# dist_student and control.
SEEDS = {
    "reference, all images": [(folder, folder, folder) for folder in REFERENCE],
    "strong, all images": [("strong", folder, folder) for folder in STRONG],
    "strong, all images, warm start": [
        (folder, folder, f"variants/strong_warm_{seed}") for seed, folder in enumerate(STRONG)
    ],
    "strong, 5,000 images": [("strong", folder, folder) for folder in FEW],
}
# `strong` by number of the student's images, always about 1,000 steps.
IMAGES = {
    2_000: "variants/images_2000",
    5_000: "few",
    10_000: "variants/images_10000",
    20_000: "variants/images_20000",
    50_000: "variants/images_50000",
}
# Student's t, 97.5 %, by number of seeds.
T = {3: 4.303, 5: 2.776}


def read(folder, name):
    """The test accuracies of a training, one per epoch."""
    path = ROOT / folder / f"{name}_train_logs.csv"
    return np.genfromtxt(path, delimiter=",", names=True)["test_acc"]


def last(log):
    return log[-1]


def last_five(log):
    return log[-5:].mean()


def accuracies(folders, figure):
    """For each name, an array with one value per seed."""
    values = {name: [] for name in NAMES}
    for teacher, student, second in folders:
        for name, folder in zip(NAMES, (teacher, student, second, second), strict=True):
            values[name].append(figure(read(folder, name)))
    return {name: np.array(numbers) for name, numbers in values.items()}


def half_width(values):
    """Of the 95 % interval of the mean, by Student's t."""
    return T[len(values)] * values.std(ddof=1) / math.sqrt(len(values))


def print_table(rows):
    for number, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if number == 0:
            print("|---" * len(row) + "|")
    print()


def print_seeds(figure):
    table = [["", *NAMES, "effect of the teacher", "seed by seed"]]
    for recipe, folders in SEEDS.items():
        values = accuracies(folders, figure)
        effect = values["dist_student"] - values["control"]
        mean = effect.mean()
        half = half_width(effect)
        row = [recipe]
        for name in NAMES:
            cell = f"{values[name].mean():.2f}"
            if np.ptp(values[name]) > 0:  # not one teacher for all seeds
                cell += f" ± {values[name].std(ddof=1):.2f}"
            row.append(cell)
        row.append(f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})")
        row.append(", ".join(f"{value:+.2f}" for value in effect))
        table.append(row)
    print_table(table)


def print_variants():
    table = [["variant", "training", "epochs", "last epoch", "last five"]]
    for path in sorted((ROOT / "variants").glob("*/*.csv")):
        name = path.name.removesuffix("_train_logs.csv")
        log = read(path.parent, name)
        row = [path.parent.name, name, str(len(log))]
        table.append([*row, f"{last(log):.2f}", f"{last_five(log):.2f}"])
    print_table(table)


def draw_effect():
    """A dot per seed, and the mean with its 95 % interval."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    for height, folders in enumerate(SEEDS.values()):
        values = accuracies(folders, last)
        effect = values["dist_student"] - values["control"]
        axes.errorbar(effect.mean(), height, xerr=half_width(effect), fmt="D", capsize=6)
        axes.plot(effect, np.full(len(effect), height + 0.25), "o", color="grey", markersize=5)
    axes.set(yticks=range(len(SEEDS)), yticklabels=SEEDS, ylim=(len(SEEDS) - 0.5, -0.5))
    axes.set_xlabel("effect of the teacher: points of test accuracy, dist_student − control")
    figure.savefig(ROOT / "effect.png", dpi=150)


def draw_images():
    """Student and dist_student by number of training images."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    teacher = last(read("strong", "teacher"))
    axes.axhline(teacher, color="grey", linestyle="--", label="teacher, trained on 50,000")
    for name, colour in (("dist_student", "C0"), ("student", "C1")):
        heights = [last(read(folder, name)) for folder in IMAGES.values()]
        axes.plot(list(IMAGES), heights, "o-", color=colour, label=name)
        label = f"{name}, ten times the steps"
        axes.plot(50_000, last(read("strong", name)), "*", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xticks(list(IMAGES), [f"{number:,}" for number in IMAGES])
    axes.minorticks_off()
    axes.set(xlabel="training images of the student", ylabel="test accuracy (%)")
    axes.legend(loc="lower right")
    figure.savefig(ROOT / "images.png", dpi=150)


for title, figure in (("After the last epoch", last), ("Mean of the last five epochs", last_five)):
    print(f"{title}: test accuracy, mean ± standard deviation over seeds; 95 % intervals by t\n")
    print_seeds(figure)
print_variants()
draw_effect()
draw_images()
