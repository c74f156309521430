"""Record each step of a second training of `strong`, with or without gradient clipping. The folder
must hold teacher.pt and student.pt; nothing in it is changed. On a CPU, in float32. Run it from the
repository's root:

python results/study/clipping.py runs/seed2 dist_student --grad-clip 0
python results/study/clipping.py runs/seed2 dist_student --grad-clip 1 --epochs 3
python results/study/clipping.py runs/seed2 control --grad-clip 1 --epochs 3

Writes results/study/collapse/steps_<name>_clip<grad-clip>.csv. Per step: the loss, training
accuracy, length of the gradient before clipping, and gain of `skip` before the step (see
collapse.py). clipping_table.py makes a table of these files.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(".")
import collapse

import kd

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("name", choices=["dist_student", "control"])
parser.add_argument("--grad-clip", type=float, required=True)
parser.add_argument("--epochs", type=int, default=6, help="of the recipe's 30")
args = parser.parse_args()


def load(network, name):
    run = torch.load(args.folder / f"{name}.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(run["model"])
    return network.to(memory_format=torch.channels_last), run["made_with"]["seed"]


student, seed = load(kd.StudentModel(), "student")
teacher, _ = load(kd.TeacherModel(), "teacher")
student.train()
teacher.eval()
_, settings = kd.RECIPES["strong"]
settings = dataclasses.replace(settings, grad_clip=args.grad_clip)
largest = settings.grad_clip or math.inf  # clip_grad_norm_ at infinity only measures
kd.keep_freed_memory()
images, labels = kd.load_split(Path("data"), "train")
steps = math.ceil(len(images) / settings.batch_size)
optimizer = torch.optim.SGD(
    student.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
)
path = Path(f"results/study/collapse/steps_{args.name}_clip{args.grad_clip:g}.csv")
path.write_text("epoch,step,lr,loss,train_acc,gradient,gain\n")
for epoch in range(1, args.epochs + 1):
    batches = kd.training_batches(images, labels, settings, seed, epoch)
    for step, (inputs, targets) in enumerate(batches):
        lr = kd.learning_rate(settings, (epoch - 1 + step / steps) / settings.epochs)
        optimizer.param_groups[0]["lr"] = lr
        logits = student(inputs)
        if args.name == "control":
            loss = F.cross_entropy(logits, targets)
        else:
            with torch.no_grad():
                soft = teacher(inputs)
            loss = kd.distillation_loss(logits, soft, targets, settings.temperature, settings.alpha)
        optimizer.zero_grad()
        loss.backward()
        gain = collapse.gain(student.skip.weight.detach().numpy())
        gradient = torch.nn.utils.clip_grad_norm_(student.parameters(), largest).item()
        optimizer.step()
        train_acc = kd.accuracy(logits, targets)
        row = f"{epoch},{step},{lr:.5f},{loss.item():.4f},{train_acc:.2f},{gradient:.4f},{gain:.4f}"
        with path.open("a") as file:
            file.write(row + "\n")
