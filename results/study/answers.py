"""Keep what the networks of a run answer to the test images, so that comparing them image by image
needs no weights and depends on no computer: answers.npz, one uint8 array (10000,) of classes for
each network, and the labels. Computed in float32 on the CPU. Run it from the repository's root:

python results/study/answers.py results/reference
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(".")
import kd


def float32(device):
    return False


def test_logits(folder):
    """The labels of the test images, int64 (10000,), and the logits of each network that is in the
    folder, float32 (10000, 10)."""
    kd.bf16_is_faster = float32
    images, labels = kd.load_split(Path("data"), "test")
    logits = {}
    for path in sorted(Path(folder).glob("*.pt")):
        network = kd.StudentModel()
        if path.stem == "teacher":
            network = kd.TeacherModel()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
        logits[path.stem] = kd.predict(network.to(memory_format=torch.channels_last), images)
    return labels, logits


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    labels, logits = test_logits(folder)
    answers = {"labels": labels.numpy().astype(np.uint8)}
    for name in logits:
        answers[name] = logits[name].argmax(dim=1).numpy().astype(np.uint8)
    np.savez_compressed(folder / "answers.npz", **answers)
