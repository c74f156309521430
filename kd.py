"""Knowledge distillation in one file: a small network learns CIFAR-10 from a large one.

A label says "cat". A trained network, the teacher, says more: almost certainly a cat, and if not,
then far more likely a dog than a truck. The teacher's small probabilities say so. To make them
larger, its logits (the values before the softmax) are divided by a temperature T > 1. The result,
softmax(logits / T), is called a soft target. A smaller network, a student, then learns from both
the label and the soft target (Hinton, Vinyals & Dean 2015, arXiv:1503.02531):

    loss = alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T)

alpha, from 0 to 1, says how much the label counts. CE is the usual cross-entropy, at T = 1. KL, the
Kullback-Leibler divergence, measures how far the student's probabilities are from the teacher's,
both at temperature T. Section 4 explains KL and T².

There are four trainings. Each produces one network, and training and network share a name:

    teacher       a large network, trained on labels
    student       a small network, trained on labels
    dist_student  the trained student, trained further on labels and the teacher's soft targets
    control       the trained student, trained further on labels alone, for as many epochs as
                  dist_student

dist_student has had more epochs than the student, so it would probably be better even without a
teacher. The control has had as many, without a teacher. So what the teacher adds is the accuracy of
dist_student minus that of control.

This file follows a course assignment: The School of AI, EPAi v5, session 29. The assignment
chose to start from the trained student. More often, a fresh student is taught with soft targets
right away; gains measured that way cannot be compared with those of this file. A gain is not
guaranteed: of this file's two recipes, `reference` shows a clear one; with `strong`, three runs are
too few to tell it from chance.

    python kd.py --stage all

Sections 1 to 5 and 8 are the experiment. On a first reading, skip `affine` and `cut_out` in section
3 (augmentation), and 6, 7 and 9: files, pictures and the command line.
"""

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision import datasets
from tqdm import tqdm

# === 1. Settings ==================================================================================


@dataclasses.dataclass(frozen=True)
class Settings:
    """Hyperparameters of one training. Defaults: the assignment's."""

    epochs: int = 100  # at most, if there is early stopping
    batch_size: int = 2048
    lr: float = 0.01  # learning rate of SGD
    # lr rises from 0 over this fraction of the training, then falls to 0, both linearly. Without
    # warm-up, it is constant.
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # a gradient with a larger norm is scaled down to it; 0: no clipping
    rotation: float = 10.0  # training images are rotated by up to this many degrees, either way
    shear: float = 10.0  # sheared along x by up to this many degrees, either way
    shift: int = 0  # shifted by up to this many pixels in x and in y
    flip: float = 0.0  # mirrored with this probability
    cutout: int = 0  # a square of this many pixels a side is set to the mean; 0: none
    temperature: float = 5.0  # T; only dist_student uses T and alpha
    alpha: float = 0.5  # weight of the label; the soft target has weight 1 - alpha
    # Early stopping: training ends when the training loss has changed by less than min_delta in
    # each of the last `patience` epochs. With min_delta = 0, there is no early stopping.
    patience: int = 5
    min_delta: float = 0.02

    def __post_init__(self):
        """ValueError for settings that make no sense."""
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:  # nan is refused, too
                raise ValueError(f"{name} must be a finite number and not negative: {value}")
        if 0 in (self.epochs, self.batch_size, self.lr, self.temperature, self.patience):
            raise ValueError("epochs, batch_size, lr, temperature and patience must not be 0")
        if self.flip > 1 or self.alpha > 1:
            raise ValueError("flip and alpha must be at most 1")
        if self.warmup >= 1 or self.momentum >= 1:
            raise ValueError("warmup and momentum must be less than 1")
        if self.warmup > 0 and self.min_delta > 0:
            raise ValueError("warmup needs min_delta 0: early stopping would cut off lr's decay")


# For higher accuracy: more steps, on smaller batches, at a higher learning rate, which first rises
# and then falls. How the values were chosen: see results/README.md.
STRONG = Settings(
    epochs=100,
    batch_size=512,
    lr=0.2,
    warmup=0.2,
    weight_decay=5e-4,
    grad_clip=1.0,
    rotation=0.0,
    shear=0.0,
    shift=4,
    flip=0.5,
    cutout=12,
    temperature=4.0,
    alpha=0.1,
    min_delta=0.0,
)
# In each pair, the first is for teacher and student, the second for dist_student and control.
RECIPES = {
    # As in the assignment, there is weight decay only in the second.
    "reference": (Settings(), Settings(weight_decay=5e-4)),
    "strong": (STRONG, dataclasses.replace(STRONG, epochs=30, lr=0.05)),
}

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Per channel (red, green, blue), over CIFAR-10's training images, with pixel values from 0 to 1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

# === 2. Two networks: one design, two widths ======================================================


def conv_relu_bn(channels_in, channels_out):
    """Same height and width. (The assignment's order; usually, BatchNorm comes before ReLU.)"""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(channels_out),
    )


def block(channels_in, channels_out, depth):
    """(N, channels_in, H, W) → (N, channels_out, H/2, W/2): `depth` convolutions, pooling, and a
    1×1 convolution that mixes channels."""
    layers = [conv_relu_bn(channels_in, channels_out)]
    for _ in range(depth - 1):
        layers.append(conv_relu_bn(channels_out, channels_out))
    layers.append(nn.MaxPool2d(2))
    layers.append(nn.Conv2d(channels_out, channels_out, 1, bias=False))
    return nn.Sequential(*layers)


def separable(channels_in, channels_out):
    """Depthwise separable convolution: 3×3 within each channel, then 1×1 across channels."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(channels_out),
    )


class Network(nn.Module):
    """Inputs, float (N, 3, 32, 32) → logits (N, 10). All layers are as in the assignment."""

    def __init__(self, width2, width3):
        super().__init__()
        self.stem = conv_relu_bn(3, 16)  # → (N, 16, 32, 32)
        self.block1 = block(16, 16, depth=3)  # → (N, 16, 16, 16)
        self.skip = nn.Conv2d(16, 16, 3, dilation=2)  # one layer, applied four times
        self.block2 = block(16, width2, depth=4)  # → (N, width2, 8, 8)
        self.block3 = block(width2, width3, depth=4)  # → (N, width3, 4, 4)
        self.head = nn.Sequential(
            separable(width3, 128),
            separable(128, 256),
            nn.AvgPool2d(4),  # → (N, 256, 1, 1)
            nn.Conv2d(256, 10, 1, bias=False),
            nn.Flatten(),
        )

    def forward(self, inputs):
        stem = self.stem(inputs)
        # `skip` has no padding and dilation 2, so each application takes 4 pixels off height and
        # width: 32 → 28 → 24 → 20 → 16, the size of block1's output.
        shortcut = stem
        for _ in range(4):
            shortcut = self.skip(shortcut)
        features = self.block1(stem) + shortcut
        features = self.block2(features)
        features = self.block3(features)
        return self.head(features)


def TeacherModel():  # capitalised because it is a class in the assignment
    """722,752 parameters. (The assignment reports 729,712 for the same network, because
    torchsummary counts `skip` once for each of its four uses.)"""
    return Network(width2=64, width3=128)


def StudentModel():
    """223,232 parameters. (The assignment reports 230,192.)"""
    return Network(width2=32, width3=64)


# === 3. Data: all images stay on the training device, as bytes ====================================
# `images` have values from 0 to 255. `inputs` are what a network gets: normalised images, which in
# training are also augmented.


class Data(NamedTuple):
    """Images: uint8 (N, 3, 32, 32), RGB. Labels: int64 (N,), indices into CLASSES."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_cifar10(data_dir):
    """From data_dir/{train,test}/<class>/*.png if these folders exist, otherwise from torchvision,
    which downloads the images into data_dir."""
    train_images, train_labels = load_split(Path(data_dir), "train")
    test_images, test_labels = load_split(Path(data_dir), "test")
    return Data(train_images, train_labels, test_images, test_labels)


def load_split(data_dir, split):
    """Images and labels of "train" or "test"."""
    try:
        if (data_dir / "train").exists():
            dataset = datasets.ImageFolder(data_dir / split, loader=read_image)
            images = np.stack([image for image, _ in dataset])
        else:
            dataset = datasets.CIFAR10(data_dir, train=split == "train", download=True)
            images = dataset.data
    except (OSError, RuntimeError) as error:
        sys.exit(
            f"no CIFAR-10 {split} images in {data_dir}: put them into {split}/<class>/*.png, or go "
            f"online, so that torchvision can download them ({error})"
        )
    if dataset.classes != CLASSES:
        sys.exit(f"{data_dir / split} must hold the folders {', '.join(CLASSES)}, and no others")
    # --limit and --holdout take slices, so the classes must be mixed. ImageFolder lists the images
    # class by class, CIFAR10 file by file; sorted by a hash of their pixels, both come out in the
    # same order, as good as random.
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    order = np.argsort(hashes, kind="stable")
    images = torch.from_numpy(images[order]).permute(0, 3, 1, 2)
    return images, torch.tensor(dataset.targets)[order]


def read_image(path):
    """An image file as uint8 (32, 32, 3), RGB."""
    try:
        image = np.asarray(Image.open(path).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds
        sys.exit(f"{path} cannot be read: {error}")
    if image.shape != (32, 32, 3):
        sys.exit(f"{path} has {image.shape[1]}×{image.shape[0]} pixels, not 32×32")
    return image


def hold_out(data, n):
    """The last n training images take the place of the test images, so that settings can be tuned
    without looking at the test set."""
    if n >= len(data.train_labels):
        sys.exit(f"--holdout {n}: there are only {len(data.train_labels)} training images")
    images = data.train_images
    labels = data.train_labels
    return Data(images[:-n], labels[:-n], images[-n:], labels[-n:])


def affine(images, changes):
    """Change each image in its own way: mirror it, shear it along x, rotate it, shift it. Pixels
    from outside the image are black.

    images (N, 3, 32, 32), values 0 to 255. changes (5, N): angles of rotation and of shear in
    degrees, shifts in x and in y in pixels, and a factor: -1 mirrors, 1 does not. Returns float32,
    values 0 to 255.

    torchvision's RandomAffine would change all images of a batch in the same way. For one image,
    torchvision's functional.affine with the same angles and shifts returns the same pixels, up to
    rounding.
    """
    angle, shear, dx, dy, mirror = changes[:, :, None, None]  # five tensors (N, 1, 1)
    # cos, sin and tan in float64, the rest in float32, as in torchvision: with different rounding,
    # nearest-neighbour sampling could pick a neighbouring pixel.
    angle = torch.deg2rad(angle.double())
    cos = torch.cos(angle)
    sin = torch.sin(angle)
    tan = torch.tan(torch.deg2rad(shear.double()))
    # From which point of the input does pixel (x, y) of the output come? With x and y measured
    # from the centre of the image, undo the changes, last one first:
    #     shift:     subtract dx from x and dy from y; the next line uses these new x and y
    #     rotation:  u = cos·x + sin·y, v = cos·y - sin·x
    #     shear:     u + tan·v, v
    #     mirror:    mirror·(u + tan·v), v
    # Written in terms of x and y, u + tan·v is (cos - sin·tan)·x + (sin + cos·tan)·y.
    from_centre = torch.arange(32, device=images.device) - 15.5
    x = from_centre - dx  # (N, 1, 32)
    y = from_centre[:, None] - dy  # (N, 32, 1)
    from_x = mirror * ((cos - sin * tan).float() * x + (sin + cos * tan).float() * y)
    from_y = cos.float() * y - sin.float() * x
    # grid_sample measures from -1, the left or upper edge of the image, to 1, so 16 pixels are 1.
    grid = torch.stack([from_x, from_y], dim=-1) / 16
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)


def normalise(images):
    """Values 0 to 255 → mean 0 and standard deviation 1 in each channel; float32, in channels_last,
    the memory format in which convolutions are usually fastest."""
    inputs = images / 255
    # A loop over plain numbers: a tensor of means would be copied to the GPU for each batch.
    for channel in range(3):
        inputs[:, channel].sub_(MEAN[channel]).div_(STD[channel])
    return inputs.contiguous(memory_format=torch.channels_last)


def cut_out(inputs, centres, size):
    """Set one square in each image to 0, the mean of normalised images (DeVries & Taylor 2017,
    arXiv:1708.04552). centres (2, N): x and y of each square's centre, 0 to 32 pixels, so that a
    square may lie partly outside its image."""
    pixels = torch.arange(32, device=inputs.device) + 0.5
    distance = (pixels - centres[:, :, None]).abs()  # (2, N, 32): from the centre, in x and in y
    columns, rows = distance < size / 2
    square = rows[:, :, None] & columns[:, None, :]  # (N, 32, 32)
    return inputs.masked_fill(square[:, None], 0)


def training_batches(images, labels, settings, seed, epoch):
    """One epoch, shuffled and augmented: yields (inputs, labels). With the same settings, order and
    augmentation depend on seed and epoch alone, so dist_student and control see the same inputs
    (and the student saw them, too, in its first epochs). The random numbers are drawn on the CPU,
    so they are the same with every device."""
    n = len(images)
    generator = torch.Generator().manual_seed(1_000_000 * seed + epoch)
    order = torch.randperm(n, generator=generator).to(images.device)
    # From -1 to 1, as fractions of the largest rotation and shear.
    angle, shear = 2 * torch.rand(2, n, generator=generator) - 1
    dx, dy = torch.randint(-settings.shift, settings.shift + 1, (2, n), generator=generator)
    mirror = torch.where(torch.rand(n, generator=generator) < settings.flip, -1, 1)
    changes = torch.stack([settings.rotation * angle, settings.shear * shear, dx, dy, mirror])
    changes = changes.to(images.device)  # (5, n)
    centres = 32 * torch.rand(2, n, generator=generator).to(images.device)
    for start in range(0, n, settings.batch_size):
        batch = slice(start, start + settings.batch_size)
        chosen = order[batch]
        inputs = normalise(affine(images[chosen], changes[:, batch]))
        if settings.cutout > 0:
            inputs = cut_out(inputs, centres[:, batch], settings.cutout)
        yield inputs, labels[chosen]


# === 4. The loss: what this file is about =========================================================


def distillation_loss(student_logits, teacher_logits, labels, temperature, alpha):
    """alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T) → scalar.

    Logits: (N, C), any float type; labels: int64 (N,). The loss is computed in float32, and no
    gradient flows to the teacher. After Hinton et al. 2015, section 2. Example: a teacher that
    knows three classes sees a cat:

        logits   cat 8       dog 5       truck 0
        T = 1    cat 0.952   dog 0.047   truck 0.000   little more than the label says
        T = 5    cat 0.571   dog 0.313   truck 0.115   a cat, more like a dog than like a truck

    Why KL(teacher ‖ student), not the reverse? Let p be the teacher's softmax(logits / T) and q the
    student's. KL(p ‖ q) = Σ p (log p - log q) weighs each class by p: wherever the teacher gives a
    class some probability, the student must do so, too. The reverse, Σ q (log q - log p), weighs by
    q: a class that the student ignores costs it nothing. (The paper has cross-entropy, -Σ p log q.
    It differs from KL by Σ p log p, which does not depend on the student, so both have the same
    gradients.)

    Why T²? The gradient of KL with respect to the student's logits is (q - p) / T. And q - p itself
    shrinks like 1/T: for logits z of C classes and a large T, softmax(z / T) is about
    1/C + (z - mean(z)) / (C·T). Both q and p have this form, so in q - p the 1/C cancels, and what
    remains is divided by T. So the gradient shrinks like 1/T², and the factor T² makes up for that:
    for large T, the balance that alpha sets between the two losses does not depend on T. (T = 4 or
    5 is not large compared with logits like those above: here, this holds only roughly.)

    Why batchmean? KL is a sum over classes; "batchmean" takes its mean over the N images. "mean"
    would also divide by the number of classes: with ten classes, the soft loss would be ten times
    too small.

    Other code often lets alpha weigh the soft targets instead of the labels.
    """
    student_logits = student_logits.float()
    teacher_logits = teacher_logits.detach().float()
    hard_loss = F.cross_entropy(student_logits, labels)
    # log_softmax, not log(softmax): a softmax can underflow to 0, whose logarithm is -inf.
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    # kl_div takes the student first: kl_div(log q, log p) is KL(p ‖ q).
    soft_loss = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * hard_loss + (1 - alpha) * soft_loss


# === 5. Training: one loop for all four ===========================================================


def learning_rate(settings, progress):
    """lr for the next step (see `warmup`). `progress` runs from 0 to 1 over all epochs."""
    if settings.warmup == 0:
        return settings.lr
    rising = settings.lr * progress / settings.warmup
    falling = settings.lr * (1 - progress) / (1 - settings.warmup)
    return min(rising, falling)


def is_finished(losses, settings):
    """True after the last epoch, or when early stopping applies (see `patience`). losses: the
    training loss of each epoch so far. (This is the assignment's rule. The usual one watches the
    loss on held-out images.)"""
    if len(losses) == settings.epochs:
        return True
    changes = np.abs(np.diff(losses))
    plateau = changes[-settings.patience :] < settings.min_delta
    return len(plateau) == settings.patience and bool(plateau.all())


def compute_logits(network, inputs):
    """Logits, float32 (N, 10). The network computes in bfloat16 where that is faster."""
    device = inputs.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16_is_faster(device)):
        return network(inputs).float()


def train_epoch(network, settings, data, teacher, optimizer, seed, epoch):
    """One pass over the training images, with soft targets if there is a teacher. Returns training
    loss and accuracy, both averaged over the epoch, while the weights are still changing."""
    network.train()
    if teacher is not None:
        teacher.eval()  # BatchNorm uses its running averages, and leaves them as they are
    n = len(data.train_images)
    steps = math.ceil(n / settings.batch_size)
    # The first step turns these sums into tensors on the device. They are read only at the end:
    # reading them at each step would make the CPU wait for the GPU.
    loss_sum = 0
    correct = 0
    batches = training_batches(data.train_images, data.train_labels, settings, seed, epoch)
    # disable=None: a progress bar on a terminal, none in a file.
    bar = tqdm(batches, desc=f"epoch {epoch}", total=steps, leave=False, disable=None)
    for step, (inputs, labels) in enumerate(bar):
        progress = (epoch - 1 + step / steps) / settings.epochs
        optimizer.param_groups[0]["lr"] = learning_rate(settings, progress)
        logits = compute_logits(network, inputs)
        if teacher is None:
            loss = F.cross_entropy(logits, labels)
        else:
            # The teacher is frozen. It sees the same augmented images as the student.
            with torch.no_grad():
                teacher_logits = compute_logits(teacher, inputs)
            loss = distillation_loss(
                logits, teacher_logits, labels, settings.temperature, settings.alpha
            )
        optimizer.zero_grad()
        loss.backward()
        if settings.grad_clip > 0:
            # Meant to keep a huge gradient from throwing the weights far off (Pascanu et al. 2013,
            # arXiv:1211.5063). We have not shown that it helps here: see results/README.md.
            nn.utils.clip_grad_norm_(network.parameters(), settings.grad_clip)
        optimizer.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
    return {"train_loss": loss_sum.item() / n, "train_acc": 100 * correct.item() / n}


@torch.no_grad()
def predict(network, images):
    """Logits, float32 (N, 10), of images that are not augmented."""
    network.eval()
    return torch.cat([compute_logits(network, normalise(batch)) for batch in images.split(2000)])


def accuracy(logits, labels):
    """Percentage of images whose largest logit is that of the label."""
    return 100 * (logits.argmax(dim=1) == labels).sum().item() / len(labels)


def test(network, data):
    """Cross-entropy and accuracy on the test images. These numbers are only reported. If training
    depended on them, they would no longer show how the network does on unseen images."""
    logits = predict(network, data.test_images)
    loss = F.cross_entropy(logits, data.test_labels).item()
    return {"test_loss": loss, "test_acc": accuracy(logits, data.test_labels)}


def train(name, network, args, data, teacher=None):
    """Train until `is_finished`; save <name>.pt after every epoch. args: see `parse_args`."""
    settings = settings_of(name, args)
    # made_with records settings and sources, so that a later command can check that the file fits.
    run = {"made_with": made_with(name, args, settings), "log": [], "finished": False}
    path = args.results_dir / f"{name}.pt"
    # An interrupted training goes on from what was saved, weights included. (`remaining_stages` has
    # checked that --resume was given.)
    if path.exists():
        network, run = load(name, args, settings)
    optimizer = torch.optim.SGD(  # train_epoch sets lr before each step
        network.parameters(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
    )
    log = run["log"]  # one row per epoch
    if log:
        optimizer.load_state_dict(run["optimizer"])
    while not run["finished"]:
        epoch = len(log) + 1
        start = time.perf_counter()
        row = {"epoch": epoch}
        row |= train_epoch(network, settings, data, teacher, optimizer, args.seed, epoch)
        seconds = time.perf_counter() - start
        row |= test(network, data)
        row["seconds"] = seconds
        if not math.isfinite(row["train_loss"] + row["test_loss"]):
            sys.exit(f"{name}: loss no longer finite: try a smaller --lr in another --results-dir")
        columns = [f"{key} {value:<8.5g}" for key, value in row.items()]
        print(f"{name:12}", *columns, flush=True)
        if epoch == 1:
            minutes = settings.epochs * (time.perf_counter() - start) / 60
            print(f"{name}: at most {settings.epochs} epochs, about {minutes:.1f} minutes")
        log.append(row)
        run["finished"] = is_finished(column(log, "train_loss"), settings)
        run["model"] = network.state_dict()
        run["optimizer"] = optimizer.state_dict()
        if run["finished"]:
            run["optimizer"] = None  # only needed for --resume
            write_log(name, log, args)
        save(name, run, args)


# === 6. Files: each training saves one, with a record of how it was made ==========================

# For each training, the earlier trainings that it needs. control needs dist_student only to know
# how many epochs to run.
BUILDS_ON = {
    "teacher": [],
    "student": [],
    "dist_student": ["student", "teacher"],
    "control": ["student", "dist_student"],
}


def fingerprint(tensors):
    """16 hexadecimal digits: the same for the same values, in practice never for different ones."""
    content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def made_with(name, args, settings=None):
    """Everything that must match before a saved training may be used again: the network's name, the
    images, and the weights it builds on. If `settings` are given, these and the seed must match,
    too. (Device and version of PyTorch need not.)"""
    made = {"network": name, "images": args.images_fingerprint}  # `run_stages` sets it
    for source in BUILDS_ON[name]:  # recursive: loading a source checks its own sources in turn
        _, run = load_trained(source, args)
        made[source] = fingerprint(run["model"].values())
    if settings is not None:
        made |= vars(settings) | {"seed": args.seed}
        if name != "dist_student":  # only distillation uses these two
            del made["temperature"], made["alpha"]
    return made


def save(name, run, args):
    """Replace <name>.pt in one step: if the process is killed, either the old file or the new one
    is there, complete."""
    run["date"] = time.strftime("%Y-%m-%d")
    run["torch"] = str(torch.__version__)
    run["device"] = device_name(args.device)
    part = args.results_dir / f"{name}.part"
    torch.save(run, part)
    part.replace(args.results_dir / f"{name}.pt")


def load(name, args, settings=None):
    """The network and everything else that `train` saved in <name>.pt. Exits if the file is
    missing, if it builds on other files than those now in the folder, or if it was made with
    settings other than the ones given."""
    path = args.results_dir / f"{name}.pt"
    network = StudentModel()
    if name == "teacher":
        network = TeacherModel()
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)  # data only, no code
        network.load_state_dict(run["model"])
        found = dict(run["made_with"])
    except OSError as error:
        sys.exit(f"{path} cannot be read ({error.strerror}): if missing, run --stage {name} first")
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).partition("\n")[0]
        sys.exit(f"{path} is damaged or belongs to another network ({reason}): delete it")
    for key, value in made_with(name, args, settings).items():
        if found.get(key) != value:
            if key in BUILDS_ON:  # the fingerprint of a source
                sys.exit(f"{path} builds on another {key}.pt: delete {path}")
            advice = "use the same options, or another --results-dir, or delete it"
            if key == "images":
                advice = "use the same --data-dir, --limit and --holdout, or another --results-dir"
            sys.exit(f"{path} was made with {key} {found.get(key)}, not {value}: {advice}")
    return network.to(args.device, memory_format=torch.channels_last), run


def load_trained(name, args, settings=None):
    """Like `load`, for a training that must be finished."""
    network, run = load(name, args, settings)
    if not run["finished"]:
        sys.exit(f"{name} is not finished: run --stage {name} --resume first")
    return network, run


def remaining_stages(stages, args):
    """The stages that are not finished. Exits before anything is trained, rather than hours later,
    if a stage's file does not fit the options, or if a file builds on a network that is to be
    trained."""
    remaining = []
    for name in BUILDS_ON:
        path = args.results_dir / f"{name}.pt"
        sources = set(BUILDS_ON[name]).intersection(remaining)
        if path.exists() and sources:  # even if this training was not asked for
            sys.exit(f"{path} builds on {sources.pop()}, which is to be trained: delete {path}")
        if name not in stages:
            continue
        if path.exists():
            if not args.resume:
                sys.exit(f"{path} exists: add --resume to keep it, or choose another --results-dir")
            _, run = load(name, args, settings_of(name, args))
            if run["finished"]:
                print(f"{name}: finished on {run['date']}, kept; to train it anew, delete {path}")
                continue
        remaining.append(name)
    if "evaluate" in stages:
        remaining.append("evaluate")
    return remaining


def column(log, key):
    """One column of the log: a list with one value per epoch."""
    return [row[key] for row in log]


def write_log(name, log, args):
    """<name>_train_logs.csv, and the same columns as curves in <name>_train_logs.png. train_loss is
    the loss that is minimised, test_loss is cross-entropy."""
    path = args.results_dir / f"{name}_train_logs.csv"
    rows = [list(row.values()) for row in log]
    np.savetxt(path, rows, "%.8g", delimiter=",", header=",".join(log[0]), comments="")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(name)
    for axes, kind in zip(figure.subplots(1, 2), ("loss", "acc"), strict=True):
        for key in (f"train_{kind}", f"test_{kind}"):
            axes.plot(column(log, "epoch"), column(log, key), label=key)
        axes.set_xlabel("epoch")
        axes.legend()
    figure.savefig(path.with_suffix(".png"))


# === 7. Evaluation: the table, the verdict, the pictures ==========================================


def mean_of_last_five(log):
    """Mean test accuracy of the last five epochs. At a constant learning rate, accuracy jumps
    from epoch to epoch, and the last value alone is partly luck."""
    return float(np.mean(column(log[-5:], "test_acc")))


def measure(network, log, data):
    """Logits of the test images, on the CPU, and the network's row in the table."""
    tested = test(network, data)  # also warms up for the timing: a first pass is slower
    start = time.perf_counter()
    logits = predict(network, data.test_images).cpu()
    seconds = time.perf_counter() - start
    row = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "images_per_second": round(len(logits) / seconds),
        "epochs": len(log),
        "train_acc": log[-1]["train_acc"],
        "test_acc": tested["test_acc"],
        "test_acc_last5": mean_of_last_five(log),
        "test_loss": tested["test_loss"],
    }
    return logits, row


def write_summary(rows, verdict, runs, args):
    """summary.json, and summary.md: a table with one line for each network, and the verdict."""
    record = {"rows": rows, "verdict": verdict}
    record["made_with"] = {name: run["made_with"] for name, run in runs.items()}
    record |= {"torch": torch.__version__, "device": device_name(args.device)}
    notes = (
        "Accuracies and agreement in %. The ± is one standard error and covers only the choice of "
        "test images; another seed may change the result by more."
    )
    for option in ("limit", "holdout"):
        if getattr(args, option) is not None:
            record[option] = getattr(args, option)
            notes += f" With --{option} {record[option]}."
    (args.results_dir / "summary.json").write_text(json.dumps(record, indent=1))
    columns = " | ".join(rows["teacher"]).replace("_", " ")
    table = f"| | {columns} |\n" + "|---" * (len(rows["teacher"]) + 1) + "|"
    for name, row in rows.items():
        table += f"\n| {name} |"
        for value in row.values():
            if isinstance(value, int):
                table += f" {value:,} |"
            else:
                table += f" {value:.2f} |"
    summary = "\n\n".join([table, *verdict, notes]) + "\n"
    (args.results_dir / "summary.md").write_text(summary, encoding="utf-8")
    return summary


def compare(name, other, correct, runs):
    """Difference in test accuracy, in words: after the last epoch, with its standard error (paired:
    both networks see the same images), and over the last five epochs."""
    difference = 100 * (correct[name].float() - correct[other].float())
    mean = difference.mean().item()
    standard_error = difference.std().item() / math.sqrt(len(difference))
    last = f"{mean:+.2f} ± {standard_error:.2f}"
    if abs(mean) <= 1.96 * standard_error:  # 0 is in the 95 % interval
        last = f"no difference seen ({last})"
    five = mean_of_last_five(runs[name]["log"]) - mean_of_last_five(runs[other]["log"])
    return f"{name} - {other}: {last} after the last epoch, {five:+.2f} over the last five"


def draw_accuracy(path, runs):
    """The experiment in one picture: the end of the student's training, and how the trained student
    goes on with and without a teacher."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    student = runs["student"]["log"]
    last_ten = student[-10:]
    axes.plot(column(last_ten, "epoch"), column(last_ten, "test_acc"), ".-", label="student")
    for name in ("control", "dist_student"):
        # Both curves start at the student's last point.
        curve = column(student[-1:] + runs[name]["log"], "test_acc")
        epochs = range(len(student), len(student) + len(curve))
        axes.plot(epochs, curve, ".-", label=name)
    teacher = mean_of_last_five(runs["teacher"]["log"])
    axes.axhline(teacher, color="black", linestyle=":", label="teacher, mean of the last 5")
    axes.set(xlabel="epochs of training", ylabel="test accuracy (%)")
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="lower right")
    figure.savefig(path)


def show_image(axes, data, index, caption=""):
    """A test image under its label and a caption."""
    axes.imshow(data.test_images[index].permute(1, 2, 0).cpu().numpy())
    axes.set_title(CLASSES[data.test_labels[index]] + caption, fontsize=8)
    axes.axis("off")


def draw_soft_targets(path, data, teacher_logits, temperature):
    """The teacher's probabilities for four test images, at T = 1 and as soft targets."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    above, below = figure.subplots(2, 4)
    for index in range(min(4, len(teacher_logits))):
        show_image(above[index], data, index)
        for t, height in ((temperature, 0.8), (1, 0.3)):  # thin bars on thick ones
            probabilities = (teacher_logits[index] / t).softmax(dim=0).numpy()
            below[index].barh(CLASSES, probabilities, height, label=f"T = {t:g}")
        below[index].legend()
    figure.savefig(path)


def draw_answers(path, title, data, logits, indices):
    """Up to 18 test images, each with what the networks answer."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(title)
    for index, axes in zip(indices, figure.subplots(3, 6).flat, strict=False):
        caption = ""
        for name in logits:
            confidence, answer = logits[name][index].softmax(dim=0).max(dim=0)
            caption += f"\n{name}: {CLASSES[answer]} {confidence:.0%}"
        show_image(axes, data, index, caption)
    figure.savefig(path)


def draw_misclassified(path, data, logits, correct):
    """How the answers of dist_student differ from those of the student: up to six images of each of
    three kinds."""
    before = correct["student"]
    after = correct["dist_student"]
    kinds = {"still wrong": ~before & ~after, "corrected": ~before & after, "lost": before & ~after}
    counts = [f"{kind.sum():,} {words}" for words, kind in kinds.items()]
    indices = torch.cat([kind.nonzero().flatten()[:6] for kind in kinds.values()])
    title = f"From student to dist_student: {', '.join(counts)}. The first six of each:"
    draw_answers(path, title, data, logits, indices.tolist())


# === 8. The five stages: four trainings and their evaluation ======================================


def settings_of(name, args):
    """The settings of one training, from the recipe's pair and the options (see `parse_args`)."""
    if name in ("teacher", "student"):
        return args.from_scratch
    if name == "dist_student":
        return args.from_student
    # control uses dist_student's settings, but runs exactly as many epochs as dist_student did.
    _, distilled = load_trained("dist_student", args, args.from_student)
    epochs = len(distilled["log"])
    return dataclasses.replace(args.from_student, epochs=epochs, min_delta=0.0)


def new_network(kind, args):
    """A TeacherModel or StudentModel. Its initial weights depend on the seed alone."""
    # The assignment asks for this table of layers. It is made from a throw-away copy: torchsummary
    # runs the network once, which changes BatchNorm's averages.
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    torch.manual_seed(args.seed)
    return kind().to(args.device, memory_format=torch.channels_last)


def train_teacher(args, data):
    """A new, large network learns from the labels."""
    teacher = new_network(TeacherModel, args)
    train("teacher", teacher, args, data)


def train_student(args, data):
    """A new, small network learns from the labels."""
    student = new_network(StudentModel, args)
    train("student", student, args, data)


def distill(args, data):
    """The trained student is trained further, on the labels and the teacher's soft targets."""
    student, _ = load_trained("student", args)
    teacher, _ = load_trained("teacher", args)
    train("dist_student", student, args, data, teacher)


def control(args, data):
    """The trained student is trained further on the labels alone. (Do not compare its training loss
    with that of `distill`, which contains the soft loss.)"""
    student, _ = load_trained("student", args)
    train("control", student, args, data)


def evaluate(args, data):
    """All four networks on the test images: table, verdict and pictures."""
    folder = args.results_dir
    labels = data.test_labels.cpu()
    runs = {}
    rows = {}
    logits = {}
    correct = {}
    for name in BUILDS_ON:  # the four trainings
        network, runs[name] = load_trained(name, args)
        log = runs[name]["log"]
        logits[name], rows[name] = measure(network, log, data)
        answers = logits[name].argmax(dim=1)
        correct[name] = answers == labels
        # Agreement: on how many images the teacher gives the same answer, right or wrong.
        rows[name]["agreement"] = accuracy(logits["teacher"], answers)
        write_log(name, log, args)  # in case only the .pt files are here
    verdict = [
        "Effect of the teacher: " + compare("dist_student", "control", correct, runs),
        "Effect of the second training: " + compare("control", "student", correct, runs),
    ]
    summary = write_summary(rows, verdict, runs, args)
    draw_accuracy(folder / "accuracy.png", runs)
    temperature = runs["dist_student"]["made_with"]["temperature"]
    draw_soft_targets(folder / "soft_targets.png", data, logits["teacher"], temperature)
    draw_answers(folder / "predictions.png", "Test images", data, logits, range(len(labels)))
    draw_misclassified(folder / "misclassified.png", data, logits, correct)
    print(summary)


STAGES = {
    "teacher": train_teacher,
    "student": train_student,
    "dist_student": distill,
    "control": control,
    "evaluate": evaluate,
}


# === 9. The machine and the command line ==========================================================


@functools.cache
def bf16_is_faster(device):
    """Whether convolutions are faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = ""
    if Path("/proc/cpuinfo").exists():  # Linux
        features = Path("/proc/cpuinfo").read_text()
    # Intel's CPUs are fast in bfloat16 only with AMX, AMD's already with AVX512_BF16.
    return "amx_bf16" in features or ("AuthenticAMD" in features and "avx512_bf16" in features)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}"


def keep_freed_memory():
    """On Linux, keep freed memory for the next step, rather than return it to the system and ask
    for it again: with large batches, an epoch on the CPU is much shorter. See `man mallopt`."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold = -1  # names and numbers from malloc.h
        m_mmap_max = -4
        libc.mallopt(m_mmap_max, 0)  # no mmap, whose blocks go back as soon as they are freed
        libc.mallopt(m_trim_threshold, 2**31 - 1)  # keep up to 2 GiB that are unused


def positive_int(text):
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_args(argv):
    """The options, and the settings that follow from them."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices = ["cuda", "cpu"]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--stage", required=True, choices=[*STAGES, "all"], help="what to run")
    add("--recipe", default="reference", choices=RECIPES, help="default: reference")
    add("--data-dir", default="data", help="image folder; CIFAR-10 is downloaded there if missing")
    add("--results-dir", type=Path, help="where everything is written; default: runs/<recipe>")
    add("--device", default=devices[0], choices=devices, help=f"default: {devices[0]}")
    add("--resume", action="store_true", help="keep what is finished, go on with what is not")
    add("--seed", type=int, default=0, help="for initial weights, order and augmentation")
    add("--holdout", type=positive_int, help="to tune: test on this many held-out training images")
    add("--limit", type=positive_int, help="use only this many training and test images")
    group = parser.add_argument_group(
        "settings", "in place of the recipe's, for every training (see class Settings)"
    )
    for name, value in vars(Settings()).items():
        group.add_argument("--" + name.replace("_", "-"), type=type(value), metavar="X")
    args = parser.parse_args(argv)
    overrides = {}
    for name in vars(Settings()):
        if getattr(args, name) is not None:
            overrides[name] = getattr(args, name)
    try:
        recipe = [dataclasses.replace(settings, **overrides) for settings in RECIPES[args.recipe]]
    except ValueError as error:
        parser.error(str(error))
    args.from_scratch, args.from_student = recipe
    args.device = torch.device(args.device)
    args.results_dir = args.results_dir or Path("runs", args.recipe)
    return args


def run_stages(args):
    """One stage, or all of them in turn."""
    try:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        probe = args.results_dir / "probe.part"  # can files be written there?
        probe.touch()
        probe.unlink()
    except OSError as error:
        sys.exit(f"--results-dir: {error}")
    keep_freed_memory()
    data = load_cifar10(args.data_dir)
    if args.holdout is not None:
        data = hold_out(data, args.holdout)
    data = Data(*[tensor[: args.limit] for tensor in data])  # None: all
    args.images_fingerprint = fingerprint(data)
    print(f"{len(data.train_images):,} training images, {len(data.test_images):,} test images")
    print(f"device: {device_name(args.device)}")
    stages = [args.stage]
    if args.stage == "all":
        stages = list(STAGES)
    stages = remaining_stages(stages, args)
    data = Data(*[tensor.to(args.device) for tensor in data])
    for stage in stages:
        STAGES[stage](args, data)


def main(argv=None):
    args = parse_args(argv)
    try:
        run_stages(args)
    except torch.cuda.OutOfMemoryError:
        sys.exit("out of GPU memory: try a smaller --batch-size, in another --results-dir")
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
