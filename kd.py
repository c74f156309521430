"""Knowledge distillation in one file: a small network learns from a large one, on CIFAR-10.

A classifier knows more than its answer: "a cat, perhaps a dog, certainly no truck". A label holds
only the answer. A trained teacher's probabilities hold the rest, mostly in numbers close to zero;
so its logits and the student's are divided by a temperature T > 1 before the softmax, which lifts
small probabilities to where they count. The student learns from the labels and from these soft
targets at once (Hinton, Vinyals & Dean 2015, arXiv:1503.02531):

    loss = alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T)

Did the teacher help? The distilled student has also trained for longer. So a control trains on
from the same student: same optimizer, same images in the same order, as many epochs, no teacher.

    python kd.py --stage all        # teacher, student, distilled student, control, evaluation
    python kd.py --stage all --limit 2000 --epochs 3 --batch-size 128 --results-dir runs/tour

Weights, logs, pictures and the table of results are left in results/reference (or runs/tour).
"""
import argparse
import ctypes
import functools
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# === 1. Settings =================================================================================
# Where a value comes from: [t] the assignment's text, [n] its public notebook
# (mHemaAP/EPAiV5-Session29), [m] measured by us on 5,000 training images that were held out.
SETTINGS = {  # a training's numbers, each an option too: (default, lowest, highest, meaning)
    "epochs": (100, 1, 10_000, "at most this many epochs"),                                  # [t]
    "batch_size": (2048, 1, 50_000, "images per step"),                                      # [n]
    "lr": (0.01, 1e-9, 100.0, "learning rate"),                                              # [n]
    "momentum": (0.9, 0.0, 0.999, "SGD's momentum"),                                         # [n]
    "weight_decay": (0.0, 0.0, 1.0, "SGD's weight decay"),                                   # [n]
    "degrees": (10.0, 0.0, 180.0, "training images are rotated by up to ± so many degrees"),  # [t]
    "shear": (10.0, 0.0, 80.0, "and sheared along x by up to ± so many degrees"),            # [t]
    "temperature": (5.0, 0.01, 1000.0, "T, divides the logits; used only with a teacher"),   # [n]
    "alpha": (1.0, 0.0, 1.0, "weight of the labels; 1 - alpha is that of the soft targets"),
    "patience": (5, 1, 10_000, "epochs at rest before a training stops"),                    # [n]
    "min_delta": (0.02, 0.0, 1000.0, "the training loss rests if it changes by less"),       # [n]
}
RECIPES = {"reference": {  # how a training differs from these defaults
    "teacher": {},
    "student": {},
    # From the trained student [n]; SGD with weight decay [t], where the notebook has Adam at 1e-3;
    # lr [m]: 0.01 learns less, 0.05 throws the trained student off for good; alpha [n].
    "dist_student": {"starts_from": "student", "lr": 0.02, "weight_decay": 5e-4, "alpha": 0.5},
}}
STAGES = {"teacher": "teacher", "student": "student", "distill": "dist_student",
          "control": "control"}  # the network that a stage trains, and the name of its files
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # R, G, B of the training images


class KDError(Exception):
    """KDError(what is wrong and what to do, in one line; the exit code, 1 if left out)."""


# === 2. Two networks: one design, two widths =====================================================
def conv_relu_bn(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                         nn.ReLU(inplace=True), nn.BatchNorm2d(c_out))


def block(c_in, c_out):
    """(N, c_in, H, W) → (N, c_out, H/2, W/2)."""
    return nn.Sequential(conv_relu_bn(c_in, c_out), *[conv_relu_bn(c_out, c_out) for _ in range(3)],
                         nn.MaxPool2d(2), nn.Conv2d(c_out, c_out, 1, bias=False))


def separable(c_in, c_out):
    """A depthwise 3×3 convolution, then a 1×1 that mixes the channels; H and W stay."""
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
                         nn.ReLU(inplace=True), nn.Conv2d(c_in, c_out, 1, bias=False),
                         nn.ReLU(inplace=True), nn.BatchNorm2d(c_out))


class Network(nn.Module):
    """Normalised images, float (N, 3, 32, 32) → logits (N, 10).

    The skip path runs *one* convolution four times, 32 → 28 → 24 → 20 → 16 pixels wide. Its 2,320
    parameters exist once, but torchsummary counts a module each time it runs, 3 · 2,320 too many:
    729,712 for the teacher (really 722,752), 230,192 for the student (really 223,232).
    """

    def __init__(self, c2, c3):
        super().__init__()
        self.block1 = block(3, 16)                                             # → 16×16×16
        self.skip = nn.Conv2d(16, 16, 3, dilation=2)                           # → 16×16×16, in all
        self.block2 = block(16, c2)                                            # → c2×8×8
        self.block3 = block(c2, c3)                                            # → c3×4×4
        self.head = nn.Sequential(separable(c3, 128), separable(128, 256),     # → 256×4×4
                                  nn.AvgPool2d(4), nn.Conv2d(256, 10, 1, bias=False), nn.Flatten())

    def forward(self, x):
        x = skip = self.block1[0](x)                                           # → 16×32×32
        for _ in range(4):
            skip = self.skip(skip)
        x = self.block1[1:](x) + skip
        return self.head(self.block3(self.block2(x)))


class TeacherModel(Network):
    def __init__(self):
        super().__init__(c2=64, c3=128)


class StudentModel(Network):
    def __init__(self):
        super().__init__(c2=32, c3=64)


def derived_seed(seed, *purpose):
    """A 32-bit seed for one purpose (integers): no two purposes share their random numbers."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])


def new_network(kind, seed):
    """A TeacherModel or StudentModel whose initial weights follow from seed and kind alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, *kind.__name__.encode()))
        return kind()


# === 3. Data: the images live on the training device, as bytes ===================================
# All of CIFAR-10 is 184 MB. With the images in place, a batch costs three operations on the whole
# batch, index, augment, normalise: no DataLoader, no worker processes, no copies to the device.
def load_cifar10(data_dir):
    """(train_images, train_labels, test_images, test_labels): uint8 (N, 3, 32, 32), int64 (N,).

    Reads data_dir/{train,test}/<class>/*.png if there is such a folder, otherwise torchvision's
    CIFAR10, which downloads what is missing. The images are sorted by label and bytes, since the
    two sources order them differently and a seed should mean the same for both.
    """
    splits, as_folders = [], any(Path(data_dir, split).is_dir() for split in ("train", "test"))
    for split in ("train", "test"):
        folder = Path(data_dir, split)
        try:
            if as_folders:
                found = {path.name for path in folder.iterdir() if path.is_dir()}
                if odd := ", ".join(found ^ set(CLASSES)):  # ImageFolder would shift the labels
                    raise KDError(f"{folder} must hold CIFAR-10's ten classes, not more or less: {odd}")
                dataset = torchvision.datasets.ImageFolder(folder)
            else:
                dataset = torchvision.datasets.CIFAR10(data_dir, split == "train", download=True)
            pairs = [(label, TF.pil_to_tensor(image)) for image, label in dataset]
        except (OSError, RuntimeError) as error:
            raise KDError(f"no CIFAR-10 in {data_dir} ({error}): put PNG images into train/<class>/ "
                          "and test/<class>/ there, or go online for torchvision to download it")
        for (path, _), (_, image) in zip(getattr(dataset, "samples", ()), pairs):
            if image.shape != (3, 32, 32):
                raise KDError(f"{path} is {image.shape[2]}×{image.shape[1]} pixels, not 32×32")
        labels, images = zip(*sorted(pairs, key=lambda pair: (pair[0], pair[1].numpy().tobytes())))
        splits += [torch.stack(images), torch.tensor(labels)]
    return tuple(splits)


def affine(images, angles, shears):
    """Rotate and x-shear each image by its own angles: nearest neighbour, black outside.

    images (N, 3, S, S), 0–255, uint8 or float; angles, shears (N,) in degrees → float32, 0–255.
    Every pixel is torchvision's affine(image, angle, [0, 0], 1.0, [shear, 0.0]), which knows one
    angle per batch. F.affine_grid instead of the grid below would round otherwise (one pixel in
    2.5 million differs), and under autocast it would be bf16 (one in 28).
    """
    exact = torch.float32 if angles.device.type == "mps" else torch.float64  # MPS has no float64
    angle, shear = angles.to(exact).deg2rad(), shears.to(exact).deg2rad()
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    # The inverse of rotation · shear: for each output pixel, the place in the input to look at,
    # both measured from the centre; grid_sample's unit is half an image.
    half = images.shape[-1] / 2
    inverse = torch.stack([cos - sin * tan, sin + cos * tan, -sin, cos]).float() / half
    a, b, c, d = inverse[:, :, None, None]                                     # (N, 1, 1) each
    x = torch.arange(images.shape[-1], device=images.device) - (half - 0.5)
    y = x[:, None]
    grid = torch.stack([a * x + b * y, c * x + d * y], dim=-1)                 # (N, S, S, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)


def draw_affine(n, degrees, shear, generator):
    """n angles and n shears, float32 (n,), uniform in ±degrees and ±shear, from a CPU generator."""
    angles, shears = torch.rand(2, n, generator=generator) * 2 - 1
    return angles * degrees, shears * shear


def random_affine(images, degrees, shear, generator):
    """`affine` with one draw per image; the generator lives on the CPU, wherever the images do."""
    draws = draw_affine(len(images), degrees, shear, generator)
    return affine(images, *(draw.to(images.device) for draw in draws))


def layout(device):  # channels last is faster; on MPS it makes BatchNorm's gradients wrong
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def normalise(images):
    """Images, 0–255 → network input, float32 (N, 3, 32, 32)."""
    inputs = TF.normalize(images / 255, MEAN, STD, inplace=True)
    return inputs.contiguous(memory_format=layout(images.device))


def training_batches(images, labels, settings, seed, epoch):
    """One epoch, shuffled and augmented: yields (inputs, labels); the last batch may be smaller.

    Chance follows from (seed, epoch) alone: no epoch depends on what ran before it, and trainings
    with the same seed, such as distilled student and control, see the same images in order.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    order = torch.randperm(len(images), generator=generator)
    draws = draw_affine(len(images), settings["degrees"], settings["shear"], generator)
    chunks = [t.to(images.device).split(settings["batch_size"]) for t in (order, *draws)]
    for index, angles, shears in zip(*chunks):
        yield normalise(affine(images[index], angles, shears)), labels[index]


# === 4. The loss: what this file is about ========================================================
def distillation_loss(student_logits, teacher_logits, targets, temperature, alpha):
    """alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T) → scalar.

    Logits (N, C), any float type, computed in float32; targets int64 (N,). The teacher gets no
    gradient. After Hinton et al. 2015, section 2. An image of a cat, as a teacher may see it:

        logits   cat 8       dog 5       truck 0
        T = 1    cat 0.952   dog 0.047   truck 0.000   hardly more than the label
        T = 5    cat 0.571   dog 0.313   truck 0.115   a cat; rather like a dog, unlike a truck

    Which side is the target? KL(p ‖ q) = Σ p (log p - log q) weighs by p, the teacher: wherever it
    sees a likeness the student has to see one. F.kl_div wants log q first, then log p. Both come
    from log_softmax, since log(softmax(x)) underflows to -inf.

    Why T²? The soft loss alone has the gradient (q - p) / T in the student's logits, and q - p
    itself shrinks as 1/T. T² makes up for both, so that alpha means the same at every T.

    Why batchmean? KL is a sum over classes. reduction="mean" would divide by their number too and
    leave a tenth of the soft loss.
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    loss_hard = F.cross_entropy(student_logits, targets)
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    loss_soft = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * loss_hard + (1 - alpha) * loss_soft


# === 5. Early stopping ===========================================================================
class EarlyStopping:
    """Called with each epoch's mean training loss; True once it has come to rest.

    That is, when it has changed by less than min_delta, up or down, for `patience` epochs in a row.
    The distillation loss has another scale (T² = 25): the same min_delta is stricter there.
    """

    def __init__(self, patience, min_delta):
        self.patience, self.min_delta = patience, min_delta
        self.previous, self.in_a_row = float("inf"), 0

    def __call__(self, loss):
        self.in_a_row = self.in_a_row + 1 if abs(loss - self.previous) < self.min_delta else 0
        self.previous = loss
        return self.in_a_row >= self.patience


# === 6. Training: one loop for all four ==========================================================
@functools.cache
def has_bf16(device):
    """Whether the device computes in bf16; CPUs without the instructions emulate it, at a crawl."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    return device.type == "cpu" and cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def logits_of(model, inputs):
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=has_bf16(inputs.device)):
        return model(inputs).float()


@torch.no_grad()
def predict(model, images):
    """Logits, float32 (N, 10), of images as bytes: in eval mode, not augmented."""
    model.eval()
    return torch.cat([logits_of(model, normalise(batch)) for batch in images.split(2000)])


def write_file(path, save):
    """`save(file)` fills a temporary file, which then takes its place: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def fit(name, model, data, settings, seed, folder, teacher=None):
    """Train the model, with a teacher if there is one; leaves <name>.pt and the log in `folder`."""
    train_images, train_labels, test_images, test_labels = data
    device, n = train_images.device, len(train_images)
    model.to(device, memory_format=layout(device))
    if teacher is not None:
        teacher.to(device, memory_format=layout(device)).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"],
                                momentum=settings["momentum"], weight_decay=settings["weight_decay"])
    at_rest, log, drawn = EarlyStopping(settings["patience"], settings["min_delta"]), [], 0.0
    for epoch in range(1, settings["epochs"] + 1):
        model.train()
        start, totals = time.perf_counter(), torch.zeros(2, device=device)  # loss, right answers
        bar = tqdm(total=n, desc=f"{name} {epoch}", unit=" images", unit_scale=True, leave=False,
                   mininterval=0.3, disable=None)  # None: silent where there is no terminal
        for inputs, labels in training_batches(train_images, train_labels, settings, seed, epoch):
            logits = logits_of(model, inputs)
            if teacher is None:
                loss = F.cross_entropy(logits, labels)
            else:
                with torch.no_grad():
                    teacher_logits = logits_of(teacher, inputs)  # of the very same inputs
                loss = distillation_loss(logits, teacher_logits, labels,
                                         settings["temperature"], settings["alpha"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right = (logits.argmax(1) == labels).sum()
            totals += torch.stack([loss.detach() * len(labels), right])
            if bar.update(len(labels)):  # True a few times a second, when it is redrawn
                mean_loss, share = (totals / bar.n).tolist()  # waits for the device
                bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy=f"{100 * share:.1f} %")
        bar.close()
        loss_sum, right_sum = totals.tolist()  # waits for the device
        seconds = time.perf_counter() - start
        outputs = predict(model, test_images)  # watched, never used to choose anything
        row = {"epoch": epoch, "train_loss": loss_sum / n, "train_acc": 100 * right_sum / n,
               "test_loss": F.cross_entropy(outputs, test_labels).item(),
               "test_acc": 100 * (outputs.argmax(1) == test_labels).sum().item() / len(outputs),
               "seconds": seconds}
        log.append({key: round(value, 6) for key, value in row.items()})
        print(f"{name:12}", *(f"{key} {value:<8.5g}" for key, value in row.items()), flush=True)
        stop = at_rest(log[-1]["train_loss"]) or epoch == settings["epochs"]
        if stop or time.perf_counter() - drawn > 10:
            write_log(folder, name, log)
            drawn = time.perf_counter()
        if stop:
            break
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    write_file(folder / f"{name}.pt", lambda file: torch.save(weights, file))
    return log


# === 7. Pictures =================================================================================
BLUE, ORANGE = "#0072B2", "#D55E00"  # colour-blind readers tell them apart (Okabe & Ito)


def write_picture(path, title, *rows, height=3):
    """A row is (heading, panels); each panel is a function that draws on the axes it is given."""
    figure = Figure(figsize=(12, height * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize=14)
    for part, (heading, panels) in zip(figure.subfigures(len(rows), squeeze=False)[:, 0], rows):
        part.suptitle(heading)
        for axes, draw in zip(part.subplots(1, max(1, len(panels)), squeeze=False)[0], panels):
            draw(axes)
    write_file(path, figure.savefig)


def draw_curves(log, kind, axes):
    for split, colour, line in (("train", BLUE, "--"), ("test", ORANGE, "-")):
        axes.plot([row["epoch"] for row in log], [row[f"{split}_{kind}"] for row in log], line,
                  color=colour, marker=".", label=split)
    axes.set(xlabel="epoch", ylabel={"loss": "loss", "acc": "accuracy (%)"}[kind])
    axes.legend()


def draw_table(log, axes):
    axes.axis("off")
    axes.table([[f"{value:.5g}" for value in row.values()] for row in log[-5:]],
               colLabels=list(log[0]), loc="center")


def write_log(folder, name, log):
    """<name>_train_logs.csv, a row per epoch, and <name>_train_logs.png."""
    lines = [log[0].keys(), *(row.values() for row in log)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    write_file(folder / f"{name}_train_logs.csv", lambda file: file.write(text.encode()))
    write_picture(folder / f"{name}_train_logs.png", name,
                  ("", [partial(draw_curves, log, "loss"), partial(draw_curves, log, "acc")]),
                  ("The last epochs", [partial(draw_table, log)]))


def draw_image(image, caption, axes):
    axes.imshow(image.permute(1, 2, 0))
    axes.set_title(caption, fontsize=9)
    axes.axis("off")


def draw_soft_targets(logits, axes):
    for t, shift, colour in ((1, -0.2, BLUE), (5, 0.2, ORANGE)):
        axes.bar(np.arange(10) + shift, (logits / t).softmax(0), 0.4, color=colour, label=f"T = {t}")
    axes.set_xticks(range(10), CLASSES, rotation=90)
    axes.legend()


def draw_confusion(labels, answers, name, axes):
    counts = torch.bincount(10 * labels + answers, minlength=100).view(10, 10)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(percent.numpy()):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                  color="black" if value > 50 else "white")
    axes.set_title(f"{name}: {100 * (answers == labels).float().mean():.2f} % right")
    axes.set_xticks(range(10), CLASSES, rotation=90)
    axes.set_yticks(range(10), [f"{c} {p:.1f} %" for c, p in zip(CLASSES, percent.diagonal())])


# === 8. Evaluation: what is on disk, on the test images ==========================================
def evaluate(args, data):
    """Leaves summary.json, summary.md and three pictures in the results folder."""
    folder, device, images, labels = args.results_dir, data[2].device, data[2].cpu(), data[3].cpu()
    n, rows, logits, answers, sure = len(labels), {}, {}, {}, {}
    for name in STAGES.values():
        model = trained(name, args).to(device, memory_format=layout(device))
        speeds = []
        for _ in range(5):
            start = time.perf_counter()
            logits[name] = predict(model, data[2][:5000]).cpu()  # waits for the device
            speeds.append(len(logits[name]) / (time.perf_counter() - start))
        logits[name] = predict(model, data[2]).cpu()
        sure[name], answers[name] = logits[name].softmax(1).max(1)
        right = (answers[name] == labels).float()
        # Expected calibration error: how far confidence is from accuracy, in 15 equal bins.
        bins = (sure[name] * 15).long().clamp(max=14)
        gaps = torch.zeros(15).index_add(0, bins, right - sure[name]).abs()
        log = np.genfromtxt(folder / f"{name}_train_logs.csv", delimiter=",", names=True, ndmin=1)
        params, skip = (sum(p.numel() for p in part.parameters()) for part in (model, model.skip))
        p = right.mean().item()
        rows[name] = {
            "train_acc": log["train_acc"][-1], "test_acc": 100 * p,
            "plus_minus": 100 * (p * (1 - p) / n) ** 0.5, "change": 100 * p,
            "test_loss": F.cross_entropy(logits[name], labels).item(), "params": params,
            "params_torchsummary": params + 3 * skip,  # it counts the skip convolution four times
            "file_bytes": (folder / f"{name}.pt").stat().st_size, "epochs": len(log),
            "seconds_per_epoch": np.median(log["seconds"]), "images_per_second": np.median(speeds),
            "ece": gaps.sum().item() / n,
            "agreement": (answers[name] == answers["teacher"]).float().mean().item()}
    for row in rows.values():
        row["change"] = row["test_acc"] - rows["student"]["test_acc"]

    def gain(after, before):  # in points, ± the standard error of the paired difference
        change = 100.0 * ((answers[after] == labels).int() - (answers[before] == labels).int())
        return f"{change.mean():+.2f} ± {change.std() / n**0.5:.2f} points"

    verdict = (f"from the teacher = distilled − control = {gain('dist_student', 'control')}, "
               f"from longer training = control − student = {gain('control', 'student')}")
    table = [["", *rows["teacher"]], ["---"] * 14]
    table += [[name, *(f"{value:,.6g}" for value in row.values())] for name, row in rows.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in table) + f"\n\n{verdict}\n"
    summary = json.dumps({"rows": rows, "verdict": verdict, "test_images": n}, indent=2)
    write_file(folder / "summary.json", lambda file: file.write(summary.encode()))
    write_file(folder / "summary.md", lambda file: file.write(text.encode()))
    print(text)

    def panels(indices, *names):
        return [partial(draw_image, images[i], "\n".join([CLASSES[labels[i]].upper()] + [
            f"{name}: {CLASSES[answers[name][i]]} {sure[name][i]:.0%}" for name in names]))
            for i in indices]

    shown = torch.linspace(0, n - 1, 12).long().tolist()  # sorted by class: from all of them
    unsure = sorted(shown, key=lambda i: sure["teacher"][i])[:2]
    soft = [panel for i in unsure for panel in (
        *panels([i], "teacher"), partial(draw_soft_targets, logits["teacher"][i]))]
    three = "teacher", "student", "dist_student"
    write_picture(folder / "predictions.png", "The class of an image, and what three networks see",
                  ("", panels(shown[:6], *three)), ("", panels(shown[6:], *three)),
                  ("Soft targets of the two that the teacher is least sure of", soft))
    was, now = (answers[name] == labels for name in three[1:])
    by_confidence = sure["dist_student"].argsort(descending=True)
    write_picture(folder / "misclassified.png", "Where the distilled student is wrong", *(
        (f"{heading}: {chosen.sum()} of {n} images, the most confident answers first",
         panels(by_confidence[chosen[by_confidence]][:6], *three[1:])) for heading, chosen in (
            ("Wrong after distillation", ~now), ("Mended by distillation", now & ~was),
            ("Introduced by distillation", was & ~now))))
    write_picture(folder / "confusion_matrix.png", "Of 100 images of a class (row), how many are "
                  "taken for which (column)", ("", [partial(draw_confusion, labels, answers[name],
                                                            name) for name in three[1:]]), height=6)


# === 9. Command line =============================================================================
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise KDError(message, 2)


def parse(argv):
    """The options, each within its range; the device as torch.device."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["all", *STAGES, "evaluate"], required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="reference")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--results-dir", type=Path, help="default: results/<recipe>")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    numbers = {"seed": (0, 0, 2**32 - 1, "seed of weights, order and augmentation"),
               "holdout": (0, 0, 49_999, "training images kept out, to stand in for the test set"),
               "limit": (50_000, 1, 50_000, "images per split, after a shuffle"), **SETTINGS}
    for name, (default, low, high, meaning) in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), metavar="N",
                            help=f"{meaning}; {low:g} to {high:g}, default: {default:g}"
                            + " or the recipe's" * (name in SETTINGS))
    args = parser.parse_args(argv)
    for name, (default, low, high, _) in numbers.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # nan is refused too
            raise KDError(f"--{name.replace('_', '-')} must be {low:g} to {high:g}, not {value}", 2)
        if value is None and name not in SETTINGS:
            setattr(args, name, default)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    name = next(filter(there.get, there)) if args.device == "auto" else args.device
    if not there[name]:
        raise KDError(f"PyTorch finds no device {name} here; --device auto takes what there is", 2)
    args.device, args.results_dir = torch.device(name), args.results_dir or Path("results", args.recipe)
    return args


def prepare(args):
    """load_cifar10's four tensors on the device, after --holdout and --limit."""
    data = load_cifar10(args.data_dir)
    train, test = data[:2], data[2:]
    generator = torch.Generator().manual_seed(derived_seed(args.seed, 0))

    def shuffled(split):
        order = torch.randperm(len(split[1]), generator=generator)
        return [part[order] for part in split]

    if args.holdout:
        if args.holdout >= len(train[1]):
            raise KDError(f"--holdout {args.holdout} leaves no image of {len(train[1])}", 2)
        train = shuffled(train)
        train, test = [t[args.holdout:] for t in train], [t[:args.holdout] for t in train]
    if args.limit < 50_000:
        train, test = ([t[:args.limit] for t in shuffled(split)] for split in (train, test))
    return [t.to(args.device) for t in (*train, *test)]


def trained(name, args):
    """The network `name` with the weights that its stage has left."""
    path, model = args.results_dir / f"{name}.pt", TeacherModel() if name == "teacher" else StudentModel()
    if not path.exists():
        stage = next(stage for stage in STAGES if STAGES[stage] == name)
        raise KDError(f"{path} is missing; python kd.py --stage {stage} makes it "
                      f"(--results-dir {args.results_dir})")
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def train(stage, args, data):
    """One training, from what is on disk to what it leaves there."""
    name, path = STAGES[stage], args.results_dir / "run.json"
    run = json.loads(path.read_text()) if path.exists() else {}
    defaults = {key: values[0] for key, values in SETTINGS.items()}
    given = {key: getattr(args, key) for key in SETTINGS if getattr(args, key) is not None}
    if stage == "control":
        trained("dist_student", args)
        log = np.genfromtxt(args.results_dir / "dist_student_train_logs.csv", delimiter=",", names=True, ndmin=1)
        settings = {**run["dist_student"]["settings"], "alpha": 1.0, "epochs": len(log), "patience": len(log)}
    else:
        settings = {**defaults, **RECIPES[args.recipe][name], **given}
    kind = TeacherModel if stage == "teacher" else StudentModel
    with torch.random.fork_rng(devices=[]):  # torchsummary sends noise through the network
        torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    start = settings.get("starts_from")
    model = trained(start, args) if start else new_network(kind, args.seed)
    fit(name, model, data, settings, args.seed, args.results_dir, trained("teacher", args) if stage == "distill" else None)
    run[name] = {"settings": settings}
    write_file(path, lambda file: file.write(json.dumps(run, indent=2).encode()))


def main(argv=None):
    """Run what the command line asks for; returns the exit code."""
    try:
        args = parse(argv)
        if platform.libc_ver()[0] == "glibc":  # keep freed memory instead of mapping it anew
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)           # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)   # M_TRIM_THRESHOLD
        data = prepare(args)
        for stage in [*STAGES, "evaluate"] if args.stage == "all" else [args.stage]:
            if stage == "evaluate":
                evaluate(args, data)
            else:
                train(stage, args, data)
    except KDError as error:
        message, code = (*error.args, 1)[:2]
        print(f"kd.py: {message}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
