"""Provoke the collapse: train the student of results/strong on at three times the recipe's learning
rate, without gradient clipping and with it. Seed 0, float32. Run it from the repository's root:

python results/study/provoke.py

Per step, it prints the loss, the length of the gradient before clipping, and the gain of `skip`
(see collapse.py) after the step.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(".")
import collapse

import kd

STEPS = 60
LR = 0.6

settings = kd.STRONG
kd.keep_freed_memory()
images, labels = kd.load_split(Path("data"), "train")
run = torch.load("results/strong/student.pt", map_location="cpu", weights_only=True)
for clip in (math.inf, 1.0):
    print(f"gradient clipped at {clip}")
    network = kd.StudentModel()
    network.load_state_dict(run["model"])
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), LR, settings.momentum, weight_decay=settings.weight_decay
    )
    batches = kd.training_batches(images, labels, settings, seed=0, epoch=1)
    for step, (inputs, targets) in enumerate(batches, start=1):
        loss = F.cross_entropy(network(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        if step <= 20 or step % 5 == 0:
            found = collapse.gain(network.skip.weight.detach().numpy())
            print(f"{step:3} loss {loss.item():.3f} gradient {length:.2f} gain {found:.2f}")
        if step == STEPS:
            break
