"""Print, for each training of `strong`, the last test accuracy and, in brackets, the gain of
`skip`. Run it from the repository's root:

python results/study/collapse.py

`skip` is the convolution that the networks apply four times, with nothing in between. It is
linear: far from the border it scales each spatial frequency. Its gain is the largest factor by
which it can lengthen an input, that is, the largest singular value over all frequencies. Four
applications can lengthen it by up to the fourth power of that. The weights are kept in
collapse/skip_weights.npz, the accuracies come from the logs.
"""

from pathlib import Path

import numpy as np

NAMES = ("teacher", "student", "dist_student", "control")
SIZE = 32  # frequencies per axis


def gain(weight):
    """weight: (16, 16, 3, 3), applied with dilation 2."""
    dilated = np.zeros((16, 16, SIZE, SIZE))
    dilated[:, :, :5:2, :5:2] = weight
    by_frequency = np.fft.fft2(dilated).transpose(2, 3, 0, 1)  # (SIZE, SIZE, 16, 16)
    return np.linalg.svd(by_frequency, compute_uv=False).max()


if __name__ == "__main__":
    weights = np.load("results/study/collapse/skip_weights.npz")
    folders = ["strong", "seeds/strong_1", "seeds/strong_2"]
    folders += [f"seeds/strong_unclipped_{seed}" for seed in range(5)]
    folders += [f"seeds/strong_first_clipped_{seed}" for seed in range(3)]
    print("| |", " | ".join(NAMES), "|")
    print("|---" * (len(NAMES) + 1) + "|")
    for folder in folders:
        cells = []
        for name in NAMES:
            path = Path("results", folder, f"{name}_train_logs.csv")
            if not path.exists():
                cells.append("not finished")
                continue
            log = np.genfromtxt(path, delimiter=",", names=True)
            found = gain(weights[f"{folder}/{name}"])
            cells.append(f"{log['test_acc'][-1]:.2f} ({found:.2f})")
        print(f"| {folder} |", " | ".join(cells), "|")
