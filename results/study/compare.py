"""Print the difference in test accuracy between any two networks, in points, ± one standard error,
paired by image, from answers.npz (see answers.py). Run it from the repository's root:

python results/study/compare.py results/strong/control results/seeds/strong_unclipped_0/control
"""

import math
import sys
from pathlib import Path

import numpy as np


def correct(network):
    answers = np.load(Path(network).parent / "answers.npz")
    return 100.0 * (answers[Path(network).name] == answers["labels"])


points = correct(sys.argv[1]) - correct(sys.argv[2])
print(f"{points.mean():+.2f} ± {points.std(ddof=1) / math.sqrt(len(points)):.2f}")
