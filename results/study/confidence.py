"""How sure are the networks of a run? For each: accuracy on the test images; confidence, the mean
probability of what it answers, for all images and for those where it is wrong, in %; and the
cross-entropy, as it is and after all logits are multiplied by the factor (0.20, 0.25 … 3.00) that
makes it smallest on these same images. Such a factor changes no answer. Computed in float32 on the
CPU. Run it from the repository's root:

python results/study/confidence.py results/strong
"""

import sys

import numpy as np
import torch.nn.functional as F
from answers import test_logits

labels, all_logits = test_logits(sys.argv[1])
print("| | accuracy | confidence | where wrong | cross-entropy | best factor | then |")
print("|---|---|---|---|---|---|---|")
for name in ("teacher", "student", "control", "dist_student"):
    logits = all_logits[name]
    confidences, answers = logits.softmax(dim=1).max(dim=1)
    right = answers == labels
    accuracy = 100 * right.float().mean().item()
    confidence = 100 * confidences.mean().item()
    where_wrong = 100 * confidences[~right].mean().item()
    loss = F.cross_entropy(logits, labels).item()
    best_loss = loss
    best_factor = 1.0
    for factor in np.arange(0.2, 3.01, 0.05):
        scaled_loss = F.cross_entropy(factor * logits, labels).item()
        if scaled_loss < best_loss:
            best_loss = scaled_loss
            best_factor = factor
    row = f"| {name} | {accuracy:.2f} | {confidence:.2f} "
    print(row + f"| {where_wrong:.2f} | {loss:.3f} | {best_factor:.2f} | {best_loss:.3f} |")
