"""How sure are the networks of a run? For each: accuracy on the test images; confidence, the mean
probability of what it answers, for all images and for those where it is wrong, in %; and the
cross-entropy, as it is and after all logits are multiplied by the factor (0.20, 0.25 … 3.00) that
makes it smallest on these same images. Such a factor changes no answer. Computed in float32 on the
CPU. Run it from the repository's root:

python results/study/confidence.py results/strong
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.append(".")
import kd


def float32(device):
    return False


kd.bf16_is_faster = float32
folder = Path(sys.argv[1])
images, labels = kd.load_split(Path("data"), "test")
print("| | accuracy | confidence | where wrong | cross-entropy | best factor | then |")
print("|---|---|---|---|---|---|---|")
for name in ("teacher", "student", "control", "dist_student"):
    network = kd.StudentModel()
    if name == "teacher":
        network = kd.TeacherModel()
    run = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(run["model"])
    logits = kd.predict(network.to(memory_format=torch.channels_last), images)
    confidences, answers = logits.softmax(dim=1).max(dim=1)
    confidence = 100 * confidences.mean().item()
    where_wrong = 100 * confidences[answers != labels].mean().item()
    loss = F.cross_entropy(logits, labels).item()
    best_loss = loss
    best_factor = 1.0
    for factor in np.arange(0.2, 3.01, 0.05):
        scaled_loss = F.cross_entropy(factor * logits, labels).item()
        if scaled_loss < best_loss:
            best_loss = scaled_loss
            best_factor = factor
    row = f"| {name} | {kd.accuracy(logits, labels):.2f} | {confidence:.2f} "
    print(row + f"| {where_wrong:.2f} | {loss:.3f} | {best_factor:.2f} | {best_loss:.3f} |")
