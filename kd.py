"""Knowledge distillation in one file: a small network learns from a large one, on CIFAR-10.

A label says "cat". A trained teacher says more: a cat, perhaps a dog, certainly no truck. Most of
that hides in probabilities close to zero, until the logits are divided by a temperature T > 1
(Hinton, Vinyals & Dean 2015, arXiv:1503.02531). The student learns from both:

    loss = alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T)

Did the teacher help? The distilled student starts from the trained student, so it has also trained
for longer. The control starts there, too, and trains on for just as long, but on labels alone.

    python kd.py --stage all

trains teacher, student, distilled student and control in turn, and leaves weights, logs, a table
and pictures in results/reference.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # pictures go to files, whatever a notebook has set

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

# === 1. Settings ==================================================================================


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers of one training. The defaults are those of the EPAiV5 Session 29 assignment."""

    epochs: int = 100  # at most, if early stopping does not come first
    batch_size: int = 2048
    lr: float = 0.01  # learning rate of SGD
    warmup: float = 0.0  # share of the epochs, at the start, in which lr rises from 0
    decay: float = 0.0  # share of the epochs, at the end, in which lr falls to 0
    momentum: float = 0.9
    weight_decay: float = 0.0
    degrees: float = 10.0  # training images are rotated by at most so many degrees, either way
    shear: float = 10.0  # training images are sheared along x by at most so many degrees
    shift: int = 0  # training images are moved by at most so many pixels, in x and in y
    flip: float = 0.0  # probability that a training image is mirrored
    temperature: float = 5.0  # T, which divides the logits; in distillation only
    alpha: float = 0.5  # weight of the labels; soft targets have 1 - alpha; in distillation only
    patience: int | None = 5  # epochs on a plateau before early stopping; None: never
    min_delta: float = 0.02  # a plateau: the training loss changes by less than this per epoch


class Recipe(NamedTuple):
    """Settings of the trainings from scratch, and of those that go on from the trained student."""

    from_scratch: Settings
    from_student: Settings


# More steps of smaller batches. lr rises for a fifth of the epochs and falls for the rest, to 0 at
# the end: so nothing stops early.
STRONG = Settings(
    epochs=60,
    batch_size=512,
    lr=0.2,
    warmup=0.2,
    decay=0.8,
    weight_decay=5e-4,
    degrees=0.0,
    shear=0.0,
    shift=4,
    flip=0.5,
    temperature=4.0,
    alpha=0.1,
    patience=None,
)
RECIPES = {
    "reference": Recipe(Settings(), Settings(weight_decay=5e-4)),  # as the assignment has it
    "strong": Recipe(STRONG, dataclasses.replace(STRONG, epochs=30, lr=0.05)),
}

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN = (0.4914, 0.4822, 0.4465)  # red, green, blue of CIFAR-10's training images, from 0 to 1
STD = (0.2470, 0.2435, 0.2616)


class UserError(Exception):
    """Something that the user can put right. Shown as one line, without a traceback."""


# === 2. Two networks: one design, two widths ======================================================


def conv_relu_bn(channels_in, channels_out):
    """A 3×3 convolution; height and width stay. (Today most would put BatchNorm before ReLU.)"""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(channels_out),
    )


def block(channels_in, channels_out, depth):
    """`depth` 3×3 convolutions, half the height and width, and a 1×1 convolution to mix channels:
    (N, channels_in, H, W) → (N, channels_out, H/2, W/2)."""
    layers = [conv_relu_bn(channels_in, channels_out)]
    for _ in range(depth - 1):
        layers.append(conv_relu_bn(channels_out, channels_out))
    layers.append(nn.MaxPool2d(2))
    layers.append(nn.Conv2d(channels_out, channels_out, 1, bias=False))
    return nn.Sequential(*layers)


def separable(channels_in, channels_out):
    """A 3×3 convolution within each channel, then a 1×1 across channels; H and W stay."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(channels_out),
    )


class Network(nn.Module):
    """Normalised images, float (N, 3, 32, 32) → logits, (N, 10)."""

    def __init__(self, width2, width3):
        super().__init__()
        self.stem = conv_relu_bn(3, 16)  # → (N, 16, 32, 32)
        self.block1 = block(16, 16, depth=3)  # → (N, 16, 16, 16)
        self.skip = nn.Conv2d(16, 16, 3, dilation=2)  # four times: → (N, 16, 16, 16), see below
        self.block2 = block(16, width2, depth=4)  # → (N, width2, 8, 8)
        self.block3 = block(width2, width3, depth=4)  # → (N, width3, 4, 4)
        self.head = nn.Sequential(
            separable(width3, 128),
            separable(128, 256),
            nn.AvgPool2d(4),  # → (N, 256, 1, 1)
            nn.Conv2d(256, 10, 1, bias=False),
            nn.Flatten(),  # → (N, 10)
        )

    def forward(self, images):
        stem = self.stem(images)
        # Unpadded and dilated, `skip` takes 4 off height and width. Applied four times, with the
        # same weights, it goes 32 → 28 → 24 → 20 → 16: the size that block1 leaves.
        shortcut = stem
        for _ in range(4):
            shortcut = self.skip(shortcut)
        features = self.block1(stem) + shortcut
        features = self.block2(features)
        features = self.block3(features)
        return self.head(features)


def TeacherModel():
    """722,752 parameters. torchsummary says 729,712: it counts `skip` at each of its four calls."""
    return Network(width2=64, width3=128)


def StudentModel():
    """223,232 parameters. torchsummary says 230,192."""
    return Network(width2=32, width3=64)


# === 3. Data: all images live on the training device, as bytes ====================================


class Data(NamedTuple):
    """Images are uint8 (N, 3, 32, 32), RGB; labels int64 (N,), positions in CLASSES."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_cifar10(data_dir):
    """Data from data_dir/{train,test}/<class>/*.png if there are such folders, otherwise from
    torchvision's CIFAR10, which downloads it. UserError if images are missing or unreadable."""
    train_images, train_labels = load_split(Path(data_dir), "train")
    test_images, test_labels = load_split(Path(data_dir), "test")
    return Data(train_images, train_labels, test_images, test_labels)


def load_split(data_dir, split):
    """Images and labels of "train" or "test"."""
    try:
        if (data_dir / "train").exists() or (data_dir / "test").exists():
            dataset = torchvision.datasets.ImageFolder(data_dir / split)
            # By their real paths: otherwise a link to a folder would bring its images once more.
            label_of = {os.path.realpath(path): label for path, label in dataset.samples}
            images = np.stack([read_image(path) for path in label_of])
            labels = list(label_of.values())
        else:
            is_train = split == "train"
            dataset = torchvision.datasets.CIFAR10(data_dir, train=is_train, download=True)
            images = dataset.data
            labels = dataset.targets
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"no CIFAR-10 {split} images in {data_dir}: put them into {split}/<class>/*.png, or "
            f"go online, for torchvision to download them ({error})"
        ) from error
    if dataset.classes != CLASSES:  # with a class missing, others would get its label
        raise UserError(f"{data_dir / split} must hold ten folders: {', '.join(CLASSES)}")
    # --limit and --holdout take slices, so the classes must be mixed, and in the same order whether
    # the images come from folders or from torchvision. Sorting by digest does both. (np.lexsort
    # sorts by its last key, the digests; where images are equal, by their labels.)
    order = np.lexsort([labels, [digest(image.tobytes()) for image in images]])
    images = torch.from_numpy(images[order]).permute(0, 3, 1, 2)
    return images, torch.tensor(labels)[order]


def digest(content):
    """16 hexadecimal digits that stand for these bytes: other bytes, other digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_image(path):
    """An image file → uint8 (32, 32, 3), RGB. UserError if it cannot be read,
    has another size, or a mode whose 16 bits or transparency RGB would lose."""
    try:
        with Image.open(path) as image:
            if image.size != (32, 32):
                raise ValueError(f"it has {image.width}×{image.height} pixels")
            if image.mode not in ("RGB", "L", "P", "1"):  # others have 16 bits, or transparency
                raise ValueError(f"its colour mode is {image.mode}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow has no class of its own for what is wrong in a file
        raise UserError(f"{path} is no RGB image of 32×32 pixels: {error}") from error


def choose_images(data, holdout, limit):
    """`holdout` training images, if any, take the test images' place: choose settings by them, not
    by the test images. Then `limit`, unless it is 0, shortens both splits."""
    if holdout >= len(data.train_labels):
        raise UserError(f"--holdout {holdout}: there are {len(data.train_labels)} training images")
    if holdout > 0:
        data = Data(
            data.train_images[:-holdout],
            data.train_labels[:-holdout],
            data.train_images[-holdout:],
            data.train_labels[-holdout:],
        )
    if limit > 0:
        data = Data(*[tensor[:limit] for tensor in data])
    return data


def affine(images, angles, shears, dx=0.0, dy=0.0, mirror=1.0):
    """Mirror each image (-1), shear it along x, rotate it, move it; black comes in from outside.

    images (N, 3, S, S), from 0 to 255, uint8 or float; angles and shears in degrees, dx and dy in
    pixels, each (N,) on the images' device → float32, from 0 to 255. The pixels are those of
    torchvision's affine with nearest neighbours; torchvision turns a whole batch by one angle, this
    turns each image by its own.
    """
    # In float64, and float32 from the grid on, as torchvision does: float32 throughout would now
    # and then pick the pixel beside it.
    angle = torch.deg2rad(angles.double())
    tan = torch.tan(torch.deg2rad(shears.double()))
    cos = torch.cos(angle)
    sin = torch.sin(angle)
    # Where in the input does pixel (x, y) of the output come from, both seen from the centre?
    #     moved and rotated back:   u = cos·(x - dx) + sin·(y - dy)
    #                               v = cos·(y - dy) - sin·(x - dx)
    #     sheared, mirrored back:   from_x = mirror·(u + tan·v) = a·x + b·y + c
    #                               from_y = v                  = d·x + e·y + f
    a = mirror * (cos - sin * tan)
    b = mirror * (sin + cos * tan)
    c = -(a * dx + b * dy)
    d = -sin
    e = cos
    f = sin * dx - cos * dy
    half = images.shape[-1] / 2  # grid_sample measures from -1 to 1: in halves of an image
    matrix = torch.stack([a, b, c, d, e, f]).float()[:, :, None, None] / half  # (6, N, 1, 1)
    x = torch.arange(images.shape[-1], device=images.device) - (half - 0.5)  # (S,)
    y = x[:, None]  # (S, 1)
    from_x = matrix[0] * x + matrix[1] * y + matrix[2]  # (N, S, S)
    from_y = matrix[3] * x + matrix[4] * y + matrix[5]
    grid = torch.stack([from_x, from_y], dim=-1)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)


def normalise(images):
    """Images from 0 to 255 → the networks' input: float32, each channel with mean 0 and std 1, in
    channels_last, the memory format in which convolutions are faster."""
    inputs = images / 255
    for channel in range(3):  # plain numbers: no tensor to copy to a GPU
        inputs[:, channel].sub_(MEAN[channel]).div_(STD[channel])
    return inputs.contiguous(memory_format=torch.channels_last)


def training_batches(images, labels, settings, seed, epoch):
    """One epoch, shuffled and augmented: yields (inputs, labels); the last batch may be smaller.
    What is random follows from seed and epoch alone, and is drawn on the CPU, where it is the same
    for every GPU. So epoch 1 has the same order and augmentation in all trainings of a seed, and so
    has each later one: distilled student and control differ by the teacher alone."""
    n = len(images)
    generator = torch.Generator().manual_seed(1_000_000 * seed + epoch)
    order = torch.randperm(n, generator=generator).to(images.device)
    angles = settings.degrees * (2 * torch.rand(n, generator=generator) - 1)
    shears = settings.shear * (2 * torch.rand(n, generator=generator) - 1)
    dx = torch.randint(-settings.shift, settings.shift + 1, (n,), generator=generator)
    dy = torch.randint(-settings.shift, settings.shift + 1, (n,), generator=generator)
    mirror = torch.where(torch.rand(n, generator=generator) < settings.flip, -1.0, 1.0)
    changes = torch.stack([angles, shears, dx, dy, mirror]).to(images.device)  # (5, n)
    for start in range(0, n, settings.batch_size):
        batch = slice(start, start + settings.batch_size)
        chosen = order[batch]
        yield normalise(affine(images[chosen], *changes[:, batch])), labels[chosen]


# === 4. The loss: what this file is about =========================================================


def distillation_loss(student_logits, teacher_logits, targets, temperature, alpha):
    """alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T) → scalar.

    Logits (N, C), any float type, computed in float32; targets, the labels, int64 (N,). The teacher
    gets no gradient. After Hinton et al. 2015, section 2. A cat, as a teacher of three classes may
    see it:
        logits   cat 8       dog 5       truck 0
        T = 1    cat 0.952   dog 0.047   truck 0.000   hardly more than the label
        T = 5    cat 0.571   dog 0.313   truck 0.115   a cat, more like a dog than a truck

    Why KL(teacher ‖ student), not the reverse? Let p be the teacher's softmax of logits / T and q
    the student's. Then KL(p ‖ q) = Σ p (log p - log q) weighs each class by p: where the teacher
    sees a likeness, the student must see it, too. F.kl_div wants log q first, and p or (with
    log_target) log p second. Both logs come from log_softmax: a softmax may underflow to 0, whose
    log is -inf.

    Why T²? The gradient of KL alone, with respect to the student's logits, is (q - p) / T. A large
    T also makes p and q flat, so that q - p itself shrinks as 1/T. T² makes up for both: whatever T
    is, alpha means much the same.

    Why batchmean? KL is a sum over classes, and "batchmean" its mean over the N images. "mean"
    would divide by the number of classes, too: a soft loss ten times too small.
    """
    student_logits = student_logits.float()
    teacher_logits = teacher_logits.detach().float()
    hard_loss = F.cross_entropy(student_logits, targets)
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    soft_loss = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * hard_loss + (1 - alpha) * soft_loss


# === 5. Early stopping and training: one loop for all four ========================================


class EarlyStopping:
    """Called with each epoch's training loss; True says stop: for `patience` epochs in a row the
    loss has changed by less than min_delta from one to the next, up or down. (The assignment's
    rule. The usual one watches how long ago the validation loss was at its best.)"""

    def __init__(self, patience, min_delta):
        self.patience = patience
        self.min_delta = min_delta
        self.previous_loss = math.inf
        self.epochs_on_plateau = 0

    def __call__(self, loss):
        if abs(loss - self.previous_loss) < self.min_delta:
            self.epochs_on_plateau += 1
        else:
            self.epochs_on_plateau = 0
        self.previous_loss = loss
        return self.patience is not None and self.epochs_on_plateau >= self.patience


def learning_rate(settings, progress):
    """Linear warm-up, then constant, then linear decay; `progress` runs from 0 to 1."""
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    if progress > 1 - settings.decay:
        return settings.lr * (1 - progress) / settings.decay
    return settings.lr


@functools.cache
def bf16_is_faster(device):
    """Whether the device computes faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # Ampere and later
    cpu = cpu_info()  # an Intel CPU that has avx512_bf16, but no AMX, is faster in float32
    return "amx_bf16" in cpu or ("AuthenticAMD" in cpu and "avx512_bf16" in cpu)


def cpu_info():
    """What Linux says of the processor; elsewhere nothing."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        return path.read_text()
    return ""


def compute_logits(model, inputs):
    """float32 (N, 10), by way of bf16 where that is faster."""
    device = inputs.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16_is_faster(device)):
        return model(inputs).float()


def train_epoch(model, teacher, optimizer, data, settings, seed, epoch):
    """One pass over the training images, with soft targets if there is a teacher.
    Returns loss and accuracy (%), measured on the way: means over the images of this epoch."""
    model.train()
    if teacher is not None:
        teacher.eval()  # BatchNorm uses its running averages and leaves them as they are
    n = len(data.train_images)
    steps = math.ceil(n / settings.batch_size)
    # The sums stay on the device: to read them at each step, the CPU would wait for the GPU.
    loss_sum = torch.zeros((), device=data.train_images.device)
    correct = torch.zeros((), device=data.train_images.device)
    batches = training_batches(data.train_images, data.train_labels, settings, seed, epoch)
    # With disable=None there is no bar if the output goes to a file.
    bar = tqdm(batches, desc=f"epoch {epoch}", total=steps, leave=False, disable=None)
    for step, (inputs, labels) in enumerate(bar):
        epochs_done = epoch - 1 + step / steps
        progress = epochs_done / settings.epochs
        optimizer.param_groups[0]["lr"] = learning_rate(settings, progress)
        logits = compute_logits(model, inputs)
        if teacher is None:
            loss = F.cross_entropy(logits, labels)
        else:
            with torch.no_grad():  # the teacher is frozen; it sees the same augmented images
                teacher_logits = compute_logits(teacher, inputs)
            loss = distillation_loss(
                logits, teacher_logits, labels, settings.temperature, settings.alpha
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.argmax(dim=1) == labels).sum()
    return loss_sum.item() / n, 100 * correct.item() / n


@torch.no_grad()
def predict(model, images):
    """Logits, float32 (N, 10), of images as bytes: in eval mode, not augmented."""
    model.eval()
    logits = [compute_logits(model, normalise(batch)) for batch in images.split(2000)]
    return torch.cat(logits)


def accuracy(logits, labels):
    """% of the images for which the largest logit is that of the label."""
    return 100 * (logits.argmax(dim=1) == labels).sum().item() / len(labels)


def test(model, images, labels):
    """Cross-entropy and accuracy. They are reported; the training never looks at them."""
    logits = predict(model, images)
    return F.cross_entropy(logits, labels).item(), accuracy(logits, labels)


def train(name, model, settings, args, data, teacher=None, builds_on=()):
    """Train until early stopping or the last epoch. Leaves <name>.pt, .json, and the log as CSV
    and picture; until then <name>_checkpoint.pt, from which --resume goes on. `builds_on` names
    the trained networks that this training depends on."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,  # train_epoch sets it for each step
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    record = new_record(name, settings, args, builds_on)  # how the training is made, and its log
    if args.resume and is_finished(name, record, args):
        print(f"{name} is finished")
        return
    if args.resume:
        load_checkpoint(name, record, model, optimizer, args)  # changes all three, if there is one
    log = record["log"]  # a row per epoch; empty, unless there was a checkpoint
    early_stopping = EarlyStopping(settings.patience, settings.min_delta)
    stop = False
    for row in log:  # with --resume: early stopping sees the epochs before
        stop = early_stopping(row["train_loss"])
    while not stop and len(log) < settings.epochs:
        epoch = len(log) + 1
        start = time.perf_counter()
        train_loss, train_acc = train_epoch(
            model, teacher, optimizer, data, settings, args.seed, epoch
        )
        seconds = time.perf_counter() - start
        test_loss, test_acc = test(model, data.test_images, data.test_labels)
        if not math.isfinite(train_loss + test_loss):
            raise UserError(f"{name}, epoch {epoch}: loss not finite: delete checkpoint, cut --lr")
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_acc": train_acc,
            "test_loss": test_loss,
            "test_acc": test_acc,
            "seconds": seconds,
        }
        log.append(row)
        save_checkpoint(name, record, model, optimizer, args)
        columns = [f"{key} {value:<8.5g}" for key, value in row.items()]
        print(f"{name:12}", " ".join(columns), flush=True)
        stop = early_stopping(train_loss)
    save_result(name, record, model, args)


# === 6. Files: what a training leaves, and what belongs together ==================================

STAGE_OF = {  # the four trained networks, each with the stage that trains it
    "teacher": "teacher",
    "student": "student",
    "dist_student": "distill",
    "control": "control",
}


@contextlib.contextmanager
def whole_file(path):
    """A path to write to. What was written then takes the place of `path`: a file is there whole or
    not at all."""
    unfinished = path.with_name(path.name + ".part")
    yield unfinished
    unfinished.replace(path)


def save_tensors(path, tensors):
    """torch.save by way of memory: a full disk then raises OSError, as for every other file, which
    main shows in one line. torch.save itself would raise RuntimeError."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(buffer.getvalue())


def what_all_share(args):
    """All trainings in a folder must have this in common: some options, and the images (`run` has
    added their digest to args)."""
    keys = ("recipe", "seed", "holdout", "limit", "images_digest")
    return {key: getattr(args, key) for key in keys}


def new_record(name, settings, args, builds_on):
    """How a training is made. Two with the same `experiment` are the same training."""
    experiment = {"network": name, **what_all_share(args), **dataclasses.asdict(settings)}
    if name != "dist_student":  # the others do not use them, so another T changes nothing there
        del experiment["temperature"], experiment["alpha"]
    # These stand for the weights that it builds on: if they are made anew, it is out of date.
    for source in builds_on:
        experiment[f"{source}.pt"] = read_record(source, args)["weights_digest"]
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return {
        "experiment": experiment,
        "builds_on": list(builds_on),
        "command": args.command,
        # A list: a training that goes on after --resume adds where it does.
        "made_with": [f"{hardware(args.device)}, {versions}, Python {platform.python_version()}"],
        "log": [],
    }


def hardware(device):
    """The device in words, and the precision that the networks are computed in."""
    precision = "float32"
    if bf16_is_faster(device):
        precision = "bf16"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {precision}"
    processor = platform.machine()
    for line in cpu_info().splitlines():
        if line.startswith("model name"):
            processor = line.partition(": ")[2]
    return f"{os.cpu_count()} × {processor}, {precision}"


def require_same(name, path, experiment, expected):
    """UserError that names the first difference, if `experiment` is not what is expected."""
    for key, value in expected.items():
        if experiment.get(key) != value:
            raise UserError(
                f"{path} was made with {key} {experiment.get(key)}, not {value}: give the same "
                f"options, delete it and train anew (--stage {STAGE_OF[name]}), or choose another "
                "--results-dir"
            )


def save_checkpoint(name, record, model, optimizer, args):
    """All that --resume needs. On a CPU it ends in the very weights that a training without
    interruption would have had."""
    checkpoint = {
        "record": record,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save_tensors(args.results_dir / f"{name}_checkpoint.pt", checkpoint)


def load_checkpoint(name, record, model, optimizer, args):
    """Fill record, model and optimizer with those of an unfinished training, if there is one."""
    path = args.results_dir / f"{name}_checkpoint.pt"
    if not path.exists():
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code in it
        before = checkpoint["record"]
    except Exception as error:  # torch has no class of its own for what is wrong in a file
        raise UserError(f"{path} is damaged, delete it: {error}") from error
    require_same(name, path, before["experiment"], record["experiment"])
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    record["log"] = before["log"]
    record["made_with"] = before["made_with"] + record["made_with"]  # perhaps on two machines
    print(f"{name} goes on after epoch {len(record['log'])}")


def save_result(name, record, model, args):
    """Log, weights and record. The checkpoint is deleted last: after a kill in between, --resume
    finds it and writes all of them again."""
    log = record["log"]
    with whole_file(args.results_dir / f"{name}_train_logs.csv") as path:
        rows = [list(row.values()) for row in log]
        np.savetxt(path, rows, "%.8g", delimiter=",", header=",".join(log[0]), comments="")
    draw_log(args.results_dir / f"{name}_train_logs.png", name, log)
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    path = args.results_dir / f"{name}.pt"
    save_tensors(path, weights)
    record["weights_digest"] = digest(path.read_bytes())
    with whole_file(args.results_dir / f"{name}.json") as path:
        path.write_text(json.dumps(record, indent=1))
    (args.results_dir / f"{name}_checkpoint.pt").unlink()


def read_record(name, args):
    """The record that a finished training has left."""
    path = args.results_dir / f"{name}.json"
    if not path.exists():
        raise UserError(f"{path} is missing: --stage {STAGE_OF[name]} makes it")
    try:
        record = json.loads(path.read_text())
        require_same(name, path, record["experiment"], {"network": name})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no record of a training: {error!r}") from error
    return record


def is_finished(name, record, args):
    """Whether this very training has left its result before. One that built on other weights is out
    of date, and made anew. UserError if the settings were others."""
    path = args.results_dir / f"{name}.json"
    weights = args.results_dir / f"{name}.pt"
    checkpoint = args.results_dir / f"{name}_checkpoint.pt"
    if checkpoint.exists() or not path.exists() or not weights.exists():
        return False
    before = read_record(name, args)["experiment"]
    for source in record["builds_on"]:
        if before.get(f"{source}.pt") != record["experiment"][f"{source}.pt"]:
            return False  # out of date
    require_same(name, path, before, record["experiment"])
    return True


def load_trained(name, args):
    """A trained network and its record. UserError if it is missing or changed, if it is of another
    run, or if a network that it builds on has been trained anew since."""
    path = args.results_dir / f"{name}.pt"
    record = read_record(name, args)
    expected = what_all_share(args)
    for source in record["builds_on"]:
        expected[f"{source}.pt"] = read_record(source, args)["weights_digest"]
    require_same(name, path, record["experiment"], expected)
    if not path.exists() or digest(path.read_bytes()) != record["weights_digest"]:
        raise UserError(f"{path} is missing or changed: --stage {STAGE_OF[name]} makes it anew")
    model = StudentModel()
    if name == "teacher":
        model = TeacherModel()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(args.device, memory_format=torch.channels_last), record


# === 7. Evaluation: the table, the verdict, the pictures ==========================================

IN_WORDS = {
    "teacher": "teacher",
    "student": "student",
    "dist_student": "distilled student",
    "control": "control",
}


def measure(model, log, logits, teacher_logits, labels):
    """The row of one network in summary.json; accuracies and agreement in %."""
    params = sum(p.numel() for p in model.parameters())
    params_skip = sum(p.numel() for p in model.skip.parameters())
    return {
        "train_acc": log[-1]["train_acc"],
        "test_acc": accuracy(logits, labels),
        "test_acc_last5": last_five(log),
        "params": params,
        "params_torchsummary": params + 3 * params_skip,  # it counts all four calls
        "epochs": len(log),
        "seconds_per_epoch": float(np.median([row["seconds"] for row in log])),
        "ece": calibration_error(logits, labels),
        "agreement": accuracy(logits, teacher_logits.argmax(dim=1)),
    }


def last_five(log):
    """Mean test accuracy of the last five epochs. At a constant learning rate it jumps from epoch
    to epoch, and the last one alone is a matter of luck."""
    return float(np.mean([row["test_acc"] for row in log[-5:]]))


def calibration_error(logits, labels):
    """Expected calibration error, from 0 to 1 (Guo et al. 2017, section 2): over 15 bins of
    confidence, the mean of |mean confidence - accuracy|, weighted by the bin's number of images.
    That number cancels: the sum of the bin's gaps is enough."""
    confidence, answers = logits.softmax(dim=1).max(dim=1)
    gaps = confidence - (answers == labels).float()
    bins = (15 * confidence).long().clamp(max=14)
    sums = torch.zeros(15).index_add(0, bins, gaps)
    return sums.abs().sum().item() / len(labels)


def compare(logits, name, other, labels):
    """The difference in accuracy of two networks on the same images, in words: points, ± one
    standard error of the paired difference."""
    correct = (logits[name].argmax(dim=1) == labels).float()
    other_correct = (logits[other].argmax(dim=1) == labels).float()
    difference = 100 * (correct - other_correct)
    points = difference.mean().item()
    standard_error = difference.std().item() / math.sqrt(len(labels))
    words = f"{IN_WORDS[name]} - {IN_WORDS[other]} = {points:+.2f} ± {standard_error:.2f} points"
    if abs(points) <= 2 * standard_error:
        words += ": no difference seen"
    return words


def summary_table(rows, verdict):
    """The networks row by row, then the verdict, in Markdown."""
    lines = [
        "| | parameters (as torchsummary counts) | train acc. | test acc. | mean of last 5 epochs "
        "| agreement with teacher | calibration error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {IN_WORDS[name]} | {row['params_torchsummary']:,} | {row['train_acc']:.2f} "
            f"| {row['test_acc']:.2f} | {row['test_acc_last5']:.2f} | {row['agreement']:.2f} "
            f"| {100 * row['ece']:.2f} |"
        )
    note = "In %, but for the parameters. Differences: ± one standard error, paired by image."
    return "\n\n".join(["\n".join(lines), *verdict, note]) + "\n"


def draw_log(path, name, log):
    """Loss and accuracy by epoch."""
    figure, both_axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    figure.suptitle(IN_WORDS[name])
    panels = {
        "loss (training: the loss that is minimised; test: cross-entropy)": "loss",
        "accuracy (%)": "acc",
    }
    for axes, (title, column) in zip(both_axes, panels.items(), strict=True):
        for split in ("train", "test"):
            values = [row[f"{split}_{column}"] for row in log]
            axes.plot(range(1, len(log) + 1), values, ".-", label=split)
        axes.set(title=title, xlabel="epoch")
        axes.legend()
    save_figure(path, figure)


def save_figure(path, figure):
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format="png")
    plt.close(figure)


def draw_accuracy(path, logs):
    """The experiment: the student, and what it goes on to learn with a teacher and without."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    student = [row["test_acc"] for row in logs["student"]]
    axes.plot(range(1, len(student) + 1), student, ".-", label="student")
    for name in ("dist_student", "control"):
        # Both start from the trained student: its last point is their first.
        curve = [student[-1], *[row["test_acc"] for row in logs[name]]]
        epochs = range(len(student), len(student) + len(curve))
        axes.plot(epochs, curve, ".-", label=IN_WORDS[name])
    axes.axhline(last_five(logs["teacher"]), color="black", label="teacher, last 5 epochs")
    axes.set(xlabel="epochs of training", ylabel="test accuracy (%)")
    axes.legend()
    save_figure(path, figure)


def show_image(axes, data, index, text=""):
    """A test image under its label and a text."""
    axes.imshow(data.test_images[index].permute(1, 2, 0).numpy())
    axes.set_title(f"{CLASSES[data.test_labels[index]]}{text}", fontsize=9)
    axes.axis("off")


def draw_soft_targets(path, data, teacher_logits, temperature):
    """What soft targets look like: the teacher's answers at T = 1 and softened."""
    figure, panels = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for index in range(min(4, len(teacher_logits))):
        show_image(panels[0, index], data, index)
        axes = panels[1, index]
        for t, offset in ((1, -0.2), (temperature, 0.2)):
            soft_targets = (teacher_logits[index] / t).softmax(dim=0).numpy()
            axes.bar(np.arange(10) + offset, soft_targets, width=0.4, label=f"T = {t:g}")
        axes.set_xticks(range(10), CLASSES, rotation=90)
        axes.set_ylim(0, 1)
        axes.legend()
    save_figure(path, figure)


def draw_answers(path, title, data, logits, rows):
    """Three rows of up to six test images, given by their indices, with the networks' answers."""
    figure, panels = plt.subplots(3, 6, figsize=(13, 9), layout="constrained")
    figure.suptitle(title)
    for axes in panels.flat:
        axes.axis("off")
    for row, indices in enumerate(rows):
        for column, index in enumerate(indices.tolist()):
            text = ""
            for name in ("teacher", "student", "dist_student"):
                confidence, answer = logits[name][index].softmax(dim=0).max(dim=0)
                text += f"\n{IN_WORDS[name]}: {CLASSES[answer]} {confidence:.0%}"
            show_image(panels[row, column], data, index, text)
    save_figure(path, figure)


def draw_predictions(path, data, logits):
    first = torch.arange(len(data.test_labels))[:18]
    draw_answers(path, "What the networks answer", data, logits, first.split(6))


def draw_misclassified(path, data, logits):
    """What distillation has changed: of each kind, the six most confident answers."""
    student_right = logits["student"].argmax(dim=1) == data.test_labels
    confidence, answers = logits["dist_student"].softmax(dim=1).max(dim=1)
    right = answers == data.test_labels
    groups = {
        "wrong": ~right,
        "corrected": right & ~student_right,
        "newly wrong": ~right & student_right,
    }
    title = "After distillation"
    rows = []
    for group, chosen in groups.items():
        title += f", {chosen.sum():,} {group}"
        members = chosen.nonzero().flatten()
        most_confident = confidence[members].argsort(descending=True)[:6]
        rows.append(members[most_confident])
    title += ": a row of each, the most confident answers"
    draw_answers(path, title, data, logits, rows)


def draw_confusion(path, data, logits):
    figure, panels = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
    figure.suptitle("Of 100 images of a class (row), how many are taken for which (column)?")
    truth = F.one_hot(data.test_labels, 10).float()
    for axes, name in zip(panels, ("student", "dist_student"), strict=True):
        answers = F.one_hot(logits[name].argmax(dim=1), 10).float()
        shares = (100 * truth.T @ answers / truth.sum(dim=0)[:, None]).numpy()
        axes.imshow(shares, cmap="Blues", vmax=150)  # even 100 is light enough for black text
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center")
        axes.set_title(IN_WORDS[name])
        axes.set_xticks(range(10), CLASSES, rotation=90)
        axes.set_yticks(range(10), CLASSES)
    save_figure(path, figure)


# === 8. The five stages: the experiment ===========================================================


def train_teacher(args, data):
    """A new teacher learns from the labels."""
    teacher = new_network(TeacherModel, args)
    train("teacher", teacher, args.settings_from_scratch, args, data)


def train_student(args, data):
    """A new student learns from the labels."""
    student = new_network(StudentModel, args)
    train("student", student, args.settings_from_scratch, args, data)


def distill(args, data):
    """The trained student trains on, with the trained teacher's soft targets."""
    student, _ = load_trained("student", args)
    teacher, _ = load_trained("teacher", args)
    builds_on = ["student", "teacher"]
    train("dist_student", student, args.settings_from_student, args, data, teacher, builds_on)


def control(args, data):
    """The trained student trains on without a teacher: as many epochs as the distilled student,
    with the same settings."""
    student, _ = load_trained("student", args)
    _, distilled = load_trained("dist_student", args)
    settings = args.settings_from_student
    # Distillation must have had the settings that are given now.
    path = args.results_dir / "dist_student.json"
    require_same("dist_student", path, distilled["experiment"], dataclasses.asdict(settings))
    # Early stopping has decided when distillation ends, and so when the control ends.
    settings = dataclasses.replace(settings, epochs=len(distilled["log"]), patience=None)
    builds_on = ["student", "dist_student"]  # the latter for its number of epochs
    train("control", student, settings, args, data, builds_on=builds_on)


def evaluate(args, data):
    """All four on the test images: table, verdict, pictures."""
    folder = args.results_dir
    rows = {}
    logs = {}
    logits = {}
    on_cpu = Data(*[tensor.cpu() for tensor in data])
    for name in STAGE_OF:  # the teacher first: the others are compared with it
        model, record = load_trained(name, args)
        start = time.perf_counter()
        logits[name] = predict(model, data.test_images).cpu()
        seconds = time.perf_counter() - start
        logs[name] = record["log"]
        rows[name] = measure(model, logs[name], logits[name], logits["teacher"], on_cpu.test_labels)
        rows[name]["images_per_second"] = len(logits[name]) / seconds
    verdict = [
        "From the teacher: " + compare(logits, "dist_student", "control", on_cpu.test_labels),
        "From longer training: " + compare(logits, "control", "student", on_cpu.test_labels),
    ]
    table = summary_table(rows, verdict)
    print(table)
    with whole_file(folder / "summary.md") as path:
        path.write_text(table, encoding="utf-8")
    with whole_file(folder / "summary.json") as path:
        path.write_text(json.dumps({"rows": rows, "verdict": verdict}, indent=1))
    temperature = read_record("dist_student", args)["experiment"]["temperature"]
    draw_accuracy(folder / "accuracy.png", logs)
    draw_soft_targets(folder / "soft_targets.png", on_cpu, logits["teacher"], temperature)
    draw_predictions(folder / "predictions.png", on_cpu, logits)
    draw_misclassified(folder / "misclassified.png", on_cpu, logits)
    draw_confusion(folder / "confusion_matrix.png", on_cpu, logits)


STAGES = {
    "teacher": train_teacher,
    "student": train_student,
    "distill": distill,
    "control": control,
    "evaluate": evaluate,
}


def new_network(kind, args):
    """A TeacherModel or StudentModel; its initial weights follow from the seed."""
    # summary runs the network and so changes BatchNorm's averages: it gets one of its own.
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    torch.manual_seed(args.seed)
    return kind().to(args.device, memory_format=torch.channels_last)


# === 9. Command line ==============================================================================


def within(kind, low, high):
    """An argparse type: a number from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # nan is in no range
            raise argparse.ArgumentTypeError(f"{value} is not from {low:g} to {high:g}")
        return value

    return number


def parse_args(argv):
    """The options, and what follows from them."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices = ["cuda", "cpu"]
    whole = within(int, 0, 10**6)
    count = within(int, 1, 10**6)
    positive = within(float, 1e-9, 1e9)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--stage", required=True, choices=[*STAGES, "all"], help="which part to run")
    add("--recipe", choices=RECIPES, default="reference", help="settings of the trainings")
    add("--data-dir", type=Path, default="data", help="where the images are, or shall be")
    add("--results-dir", type=Path, help="default: results/<recipe>")
    add("--device", choices=devices, default=devices[0], help=f"default: {devices[0]}")
    add("--resume", action="store_true", help="keep what is finished, go on with what is not")
    add("--seed", type=whole, default=0, help="of initial weights, order and augmentation")
    add("--holdout", type=whole, default=0, help="test on so many training images, for tuning")
    add("--limit", type=whole, default=0, help="take only so many images of each split; 0: all")
    add = parser.add_argument_group("settings, otherwise the recipe's").add_argument
    add("--epochs", type=count, help="at most so many per training")
    add("--batch-size", type=count, help="images per step")
    add("--lr", type=positive, help="learning rate")
    add("--temperature", type=positive, help="T, which divides the logits")
    add("--alpha", type=within(float, 0, 1), help="weight of the labels in distillation")
    add("--patience", type=count, help="epochs on a plateau before the stop")
    add("--min-delta", type=within(float, 0, 1e9), help="a smaller change of loss is a plateau")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    args.results_dir = args.results_dir or Path("results", args.recipe)
    args.command = shlex.join(["python", "kd.py", *argv])
    changes = {}
    for field in dataclasses.fields(Settings):
        if getattr(args, field.name, None) is not None:
            changes[field.name] = getattr(args, field.name)
    args.settings_from_scratch = dataclasses.replace(RECIPES[args.recipe].from_scratch, **changes)
    args.settings_from_student = dataclasses.replace(RECIPES[args.recipe].from_student, **changes)
    stops_early = "patience" in changes or "min_delta" in changes
    if stops_early and args.settings_from_scratch.decay > 0:
        parser.error("--patience, --min-delta: nothing stops early where lr is to fall to 0")
    return args


def load_data(args):
    """The images of this run."""
    data = choose_images(load_cifar10(args.data_dir), args.holdout, args.limit)
    for split, labels in (("training", data.train_labels), ("test", data.test_labels)):
        counts = labels.bincount(minlength=10).tolist()
        print(f"{len(labels):,} {split} images; from airplane to truck: {counts}")
    return data


def keep_freed_memory():
    """Let glibc reuse freed memory instead of returning it to Linux at every step: on a CPU, an
    epoch takes a third less. Other C libraries are left alone."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold = -1  # names and numbers from malloc.h
        m_mmap_max = -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def run(args):
    """One stage, or all of them in turn."""
    stages = [args.stage]
    if args.stage == "all":
        stages = list(STAGES)
    for name, stage in STAGE_OF.items():
        path = args.results_dir / f"{name}_checkpoint.pt"
        if stage in stages and path.exists() and not args.resume:
            raise UserError(f"{path} is of an unfinished training: add --resume, or delete it")
    args.results_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    data = load_data(args)
    args.images_digest = digest(b"".join(tensor.numpy().tobytes() for tensor in data))
    data = Data(*[tensor.to(args.device) for tensor in data])
    for stage in stages:
        STAGES[stage](args, data)


def main(argv=None):
    """Do what the command line asks for. Returns the exit code; wrong options end in SystemExit."""
    if argv is None:
        argv = sys.argv[1:]
    args = parse_args(argv)
    code = 1
    try:
        run(args)
        return 0
    except BrokenPipeError:
        # Nobody reads the output any more. At exit Python would try to write the rest of it: let
        # that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = "the output was closed"
    except (UserError, OSError) as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        message = "stopped; to go on after the last whole epoch: the same command with --resume"
        code = 130
    print(f"kd.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is like Ctrl-C
    sys.exit(main())
