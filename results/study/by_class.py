"""Print what the teacher added, class by class, from the weights of a recipe's seed 0. Run it from
the repository's root:

python results/study/by_class.py reference
"""

import math
import sys
from pathlib import Path

import torch

sys.path.append(".")
import kd

folder = Path("results", sys.argv[1])
images, labels = kd.load_split(Path("data"), "test")
right = {}
for name in ("student", "dist_student", "control"):
    model = kd.StudentModel()
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    right[name] = (kd.predict(model, images).argmax(dim=1) == labels).float()

print("| | distilled student − control | control − student |")
print("|---|---|---|")
groups = {"all": torch.ones(len(labels), dtype=torch.bool)}
for label, word in enumerate(kd.CLASSES):
    groups[word] = labels == label
for word, chosen in groups.items():
    cells = [word]
    for name, other in (("dist_student", "control"), ("control", "student")):
        difference = 100 * (right[name] - right[other])[chosen]
        standard_error = difference.std().item() / math.sqrt(len(difference))
        cells.append(f"{difference.mean().item():+.2f} ± {standard_error:.2f}")
    print("|", " | ".join(cells), "|")
