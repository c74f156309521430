"""Knowledge distillation in one file: a small network learns from a large one, on CIFAR-10.

A label says "cat". A trained teacher says more: a cat, perhaps a dog, certainly no truck. Most of
that hides in probabilities close to zero, until a temperature T > 1 divides the logits and lifts
them (Hinton, Vinyals & Dean 2015, arXiv:1503.02531). The student learns from labels and from that:

    loss = alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T)

Did the teacher help? Distillation starts from the trained student, so that it also trains longer. A
control starts from the same weights: same optimizer, images, order and epochs, but labels alone.
`python kd.py --stage all` trains all four; weights, logs, pictures and table: results/reference.
"""
import argparse, ctypes, functools, json, math, os, platform, re, shlex, sys, time, timeit
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
# [t] the assignment's text, [n] its public notebook (mHemaAP/EPAiV5-Session29), [m] measured by us
SETTINGS = {  # of a training, and each an option too: (default, lowest, highest, meaning)
    "seed": (0, 0, 2**32 - 1, "of the initial weights, the order and the augmentation"),
    "holdout": (0, 0, 49_999, "so many training images take the test set's place, for tuning"),
    "limit": (0, 0, 1_000_000, "only so many images of each split, after a shuffle; 0: all"),
    "epochs": (100, 1, 10_000, "at most so many epochs"),                                     # [t]
    "batch_size": (2048, 1, 50_000, "images per step"),                                       # [n]
    "lr": (0.01, 1e-9, 100.0, "learning rate"),                                               # [n]
    "momentum": (0.9, 0.0, 0.999, "SGD's momentum"),                                          # [n]
    "weight_decay": (0.0, 0.0, 1.0, "SGD's weight decay"),                                    # [n]
    "degrees": (10.0, 0.0, 180.0, "training images are rotated by up to ± so many degrees"),  # [t]
    "shear": (10.0, 0.0, 80.0, "training images are x-sheared by up to ± so many degrees"),   # [t]
    "temperature": (5.0, 0.01, 1000.0, "T divides the logits; needs a teacher"),              # [n]
    "alpha": (1.0, 0.0, 1.0, "weight of the labels; 1 - alpha is that of the soft targets"),
    "patience": (5, 1, 10_000, "a training stops after so many epochs on a plateau"),         # [n]
    "min_delta": (0.02, 0.0, 1000.0, "a plateau: the training loss changes by less"),         # [n]
}
RECIPES = {"reference": {  # where a training differs from these defaults; the control: see train()
    "teacher": {},
    "student": {},
    # From the trained student [n]; SGD with weight decay [t], where the notebook has Adam at 1e-3;
    # alpha [n]; lr [m, on held-out training images]: 0.01 learns less, 0.05 throws it off for good.
    "dist_student": {"starts_from": "student", "lr": 0.02, "weight_decay": 5e-4, "alpha": 0.5},
}}
STAGES = dict(teacher="teacher", student="student", distill="dist_student", control="control")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # R, G, B of the training images
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

class KDError(Exception):
    """KDError(what is wrong and what to do, in one line; the exit code, 1 if left out)."""

# === 2. Two networks: one design, two widths =====================================================
def block(c_in, c_out):
    """Four 3×3 convolutions, then half the size: (N, c_in, H, W) → (N, c_out, H/2, W/2)."""
    layers = [nn.Sequential(nn.Conv2d(c, c_out, 3, padding=1, bias=False),
                            nn.ReLU(inplace=True), nn.BatchNorm2d(c_out))
              for c in (c_in, c_out, c_out, c_out)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(c_out, c_out, 1, bias=False))

def separable(c_in, c_out):
    """A depthwise 3×3 convolution, then a 1×1 that mixes the channels; H and W stay."""
    return nn.Sequential(nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False),
                         nn.ReLU(inplace=True), nn.Conv2d(c_in, c_out, 1, bias=False),
                         nn.ReLU(inplace=True), nn.BatchNorm2d(c_out))

class Network(nn.Module):
    """Normalised images, float (N, 3, 32, 32) → logits (N, 10).
    The skip path runs *one* convolution (2,320 parameters) four times: 32 → 28 → 24 → 20 → 16 wide.
    torchsummary counts it each time and reports 729,712 parameters for the teacher (really 722,752)
    and 230,192 for the student (really 223,232)."""
    def __init__(self, c2, c3):
        super().__init__()
        self.block1 = block(3, 16)                                             # → 16×16×16
        self.skip = nn.Conv2d(16, 16, 3, dilation=2)                           # → 16×16×16 at last
        self.block2 = block(16, c2)                                            # → c2×8×8
        self.block3 = block(c2, c3)                                            # → c3×4×4
        self.head = nn.Sequential(separable(c3, 128), separable(128, 256),     # → 256×4×4
                                  nn.AvgPool2d(4), nn.Conv2d(256, 10, 1, bias=False), nn.Flatten())

    def forward(self, x):
        skip = self.block1[0](x)                                               # → 16×32×32
        x = self.block1[1:](skip)
        for _ in range(4):
            skip = self.skip(skip)
        return self.head(self.block3(self.block2(x + skip)))

def TeacherModel():
    return Network(c2=64, c3=128)

def StudentModel():
    return Network(c2=32, c3=64)

def derived_seed(seed, *purpose):
    """A 32-bit seed for one purpose (integers), so that no two purposes share random numbers."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])

def new_network(kind, seed):
    """A TeacherModel or StudentModel; its initial weights follow from seed and kind alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, *kind.__name__.encode()))
        return kind()

# === 3. Data: the images live on the training device, as bytes ===================================
def load_cifar10(data_dir):
    """(train_images, train_labels, test_images, test_labels): uint8 (N, 3, 32, 32), int64 (N,).
    From data_dir/{train,test}/<class>/ if there are such folders, otherwise from torchvision's
    CIFAR10, which downloads what is missing. The two order the images differently, so both are
    sorted by label and bytes: a seed then means the same for both."""
    data_dir, tensors = Path(data_dir), []
    folders = (data_dir / "train").exists() or (data_dir / "test").exists()
    for split in ("train", "test"):
        try:
            dataset = torchvision.datasets.ImageFolder(data_dir / split) if folders else (
                torchvision.datasets.CIFAR10(data_dir, split == "train", download=True))
            pairs = [(label, TF.pil_to_tensor(image)) for image, label in dataset]
        except (OSError, RuntimeError) as error:
            raise KDError(f"no CIFAR-10 in {data_dir} ({error}): put images into train/<class>/ "
                          "and test/<class>/ there, or go online for torchvision to download it")
        if dataset.classes != list(CLASSES):  # one missing would shift the others' labels
            raise KDError(f"{data_dir / split} must hold ten folders: {', '.join(CLASSES)}")
        for (path, _), (_, image) in zip(getattr(dataset, "samples", ()), pairs):  # if from files
            if image.shape != (3, 32, 32):
                raise KDError(f"{path} is {image.shape[2]}×{image.shape[1]} pixels, not 32×32")
        labels, images = zip(*sorted(pairs, key=lambda pair: (pair[0], pair[1].numpy().tobytes())))
        tensors += [torch.stack(images), torch.tensor(labels)]
    return tuple(tensors)

def affine(images, angles, shears):
    """Rotate and x-shear each image by its own angles: nearest neighbour, black outside.
    images (N, 3, S, S), 0–255, uint8 or float; angles, shears (N,) in degrees → float32, 0–255.
    Pixel for pixel torchvision's affine(image, angle, [0, 0], 1.0, [shear, 0.0]); F.affine_grid
    rounds otherwise (1 pixel in 2.5 million) and gives bf16 under autocast (1 in 27 differs)."""
    dtype = torch.float32 if images.device.type == "mps" else torch.float64  # MPS has no float64
    angle, shear = (degrees.to(images.device, dtype).deg2rad() for degrees in (angles, shears))
    cos, sin, tan, half = angle.cos(), angle.sin(), shear.tan(), images.shape[-1] / 2
    # The inverse of rotation · shear: for each output pixel the place in the input to look at. Both
    # are measured from the image's centre; the result in halves of an image, for grid_sample.
    inverse = torch.stack([cos - sin * tan, sin + cos * tan, -sin, cos]).float() / half
    a, b, c, d = inverse[:, :, None, None]                                     # (N, 1, 1) each
    x = torch.arange(images.shape[-1], device=images.device) - (half - 0.5)    # a row
    y = x[:, None]                                                             # a column
    grid = torch.stack([a * x + b * y, c * x + d * y], dim=-1)                 # (N, S, S, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)

def draw_affine(n, degrees, shear, generator):
    """n angles and n shears, float32 (n,), uniform in ±degrees and ±shear, from a CPU generator."""
    angles, shears = torch.rand(2, n, generator=generator) * 2 - 1
    return angles * degrees, shears * shear

def random_affine(images, degrees, shear, generator):
    """`affine` with one draw per image; the generator lives on the CPU, wherever the images do."""
    return affine(images, *draw_affine(len(images), degrees, shear, generator))

def memory_format(device):  # channels last is faster, but makes BatchNorm's gradients wrong on MPS
    return torch.contiguous_format if device.type == "mps" else torch.channels_last

def normalise(images):
    """Images, 0–255 → network input, float32 (N, 3, 32, 32)."""
    inputs = TF.normalize(images / 255, MEAN, STD, inplace=True)
    return inputs.contiguous(memory_format=memory_format(images.device))

def training_batches(images, labels, settings, epoch):
    """One epoch, shuffled and augmented: yields (inputs, labels); the last batch may be smaller.
    Chance follows from (seed, epoch) alone: no epoch depends on what ran before it, and trainings
    with one seed, such as distilled student and control, see the same images in the same order."""
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, epoch))
    order = torch.randperm(len(images), generator=generator)
    draws = draw_affine(len(images), settings.degrees, settings.shear, generator)
    chunks = [t.to(images.device).split(settings.batch_size) for t in (order, *draws)]
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
    from log_softmax, since a softmax can underflow to 0, whose log is -inf.

    Why T²? KL alone has the gradient (q - p) / T in the student's logits, and for large T, q - p
    shrinks as 1/T as well. T² makes up for both: alpha means much the same at every T.

    Why batchmean? KL is a sum over classes; "mean" would also divide by their number, ten."""
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    loss_hard = F.cross_entropy(student_logits, targets)
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    loss_soft = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * loss_hard + (1 - alpha) * loss_soft

# === 5. Training: one loop for all four, and when it stops =======================================
class EarlyStopping:
    """Called with each epoch's mean training loss: True once it has changed by less than min_delta,
    up or down, `patience` times in a row. (The distillation loss is on another scale than
    cross-entropy: the same min_delta means something else there.)"""
    def __init__(self, patience, min_delta):
        self.patience, self.min_delta = patience, min_delta
        self.previous, self.in_a_row = float("inf"), 0

    def __call__(self, loss):
        self.in_a_row = self.in_a_row + 1 if abs(loss - self.previous) < self.min_delta else 0
        self.previous = loss
        return self.in_a_row >= self.patience

def has_bf16(device):  # a CPU without the instructions emulates them, at a crawl
    return torch.cuda.get_device_capability()[0] > 7 if device.type == "cuda" else "bf16" in CPUINFO

def logits_of(model, inputs):
    kind = "cuda" if inputs.is_cuda else "cpu"
    with torch.autocast(kind, torch.bfloat16, enabled=has_bf16(inputs.device)):
        return model(inputs).float()

@torch.no_grad()
def predict(model, images):
    """Logits, float32 (N, 10), of images as bytes: in eval mode, not augmented."""
    return torch.cat([logits_of(model.eval(), normalise(batch)) for batch in images.split(2000)])

def write_file(path, save):
    """`save(file)` fills a temporary file, which then takes its place: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)

def weights_of(model):
    return {key: value.cpu().contiguous() for key, value in model.state_dict().items()}

def settings_of(args):
    return {key: vars(args)[key] for key in ("starts_from", *SETTINGS) if key in args}

def fit(name, model, data, settings, folder, teacher=None, state=None):
    """Train the model, with a teacher if there is one, and from where an interrupted training stood
    if there is its state; leaves weights and log in `folder`."""
    train_images, train_labels, test_images, test_labels = data
    n, device = len(train_images), train_images.device
    model.to(device, memory_format=memory_format(device))
    if teacher is not None:
        teacher.eval().requires_grad_(False)  # frozen: nothing of it is trained or recorded
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum,
                                weight_decay=settings.weight_decay)
    early_stopping, log, last_plot = EarlyStopping(settings.patience, settings.min_delta), [], 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    stop = [early_stopping(row["train_loss"]) for row in log][-1:] == [True]
    while not stop and len(log) < settings.epochs:
        epoch = len(log) + 1
        model.train()
        start, totals = time.perf_counter(), torch.zeros(2, device=device)  # loss, correct answers
        bar = tqdm(total=n, desc=f"{name} {epoch}", unit=" images", leave=False, disable=None)
        for inputs, labels in training_batches(train_images, train_labels, settings, epoch):
            logits = logits_of(model, inputs)
            if teacher is None:
                loss = F.cross_entropy(logits, labels)
            else:
                loss = distillation_loss(logits, logits_of(teacher, inputs), labels,
                                         settings.temperature, settings.alpha)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
            if bar.update(len(labels)):  # True when it is redrawn, on a terminal only
                loss_so_far, accuracy = (totals / bar.n).tolist()  # waits for the device
                bar.set_postfix_str(f"loss {loss_so_far:.3f}, accuracy {accuracy:.1%}")
        bar.close()
        loss_sum, correct = totals.tolist()  # waits for the device
        seconds = time.perf_counter() - start
        outputs = predict(model, test_images)  # watched, never used to choose anything
        row = {"epoch": epoch, "train_loss": loss_sum / n, "train_acc": 100 * correct / n,
               "test_loss": F.cross_entropy(outputs, test_labels).item(),
               "test_acc": 100 * (outputs.argmax(1) == test_labels).sum().item() / len(outputs),
               "seconds": seconds}
        log.append({key: round(value, 6) for key, value in row.items()})
        print(f"{name:12}", *(f"{key} {value:<8.5g}" for key, value in row.items()), flush=True)
        if time.perf_counter() - last_plot > 10:
            write_log(folder, name, log)
            last_plot = time.perf_counter()
        stop = early_stopping(log[-1]["train_loss"])
        state = {"name": name, "model": weights_of(model), "optimizer": optimizer.state_dict(),
                 "settings": settings_of(settings), "log": log}
        write_file(folder / "unfinished.pt", lambda file: torch.save(state, file))
    write_log(folder, name, log)
    write_file(folder / f"{name}.pt", lambda file: torch.save(weights_of(model), file))
    (folder / "unfinished.pt").unlink()
    return {"train_acc": log[-1]["train_acc"], "epochs": len(log),
            "seconds_per_epoch": float(np.median([row["seconds"] for row in log]))}

# === 6. Evaluation: the table and the pictures ===================================================
def write_log(folder, name, log):
    """<name>_train_logs.csv, a row per epoch, and <name>_train_logs.png, its picture."""
    columns = {key: [row[key] for row in log] for key in log[0]}
    rows = list(zip(*columns.values()))
    write_file(folder / f"{name}_train_logs.csv", lambda file: np.savetxt(
        file, rows, "%.10g", ",", header=",".join(columns), comments=""))
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "acc"], ["table", "table"]], height_ratios=[4, 1])
    for kind, title in (("loss", "loss"), ("acc", "accuracy (%)")):
        for split, style in (("train", ".--"), ("test", ".-")):
            axes[kind].plot("epoch", f"{split}_{kind}", style, data=columns, label=split)
        axes[kind].set(title=f"{name}: {title}", xlabel="epoch")
        axes[kind].legend()
    axes["table"].axis("off")
    axes["table"].table([[f"{value:.5g}" for value in row] for row in rows[-5:]],
                        colLabels=list(columns), loc="center")
    write_file(folder / f"{name}_train_logs.png", figure.savefig)

def write_grid(path, title, panels, images, labels, logits):
    """Six panels a row: (i, heading) shows image i with the answers, (i, None) its soft targets."""
    rows = math.ceil(len(panels) / 6) or 1
    figure = Figure(figsize=(13, 3.1 * rows), layout="constrained")
    figure.suptitle(title, fontsize=14)
    for place, (i, heading) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 6, place)
        if heading is None:
            for t, shift in ((1, -0.2), (5, 0.2)):
                soft_targets = (logits[0, i] / t).softmax(0).numpy()
                axes.bar(np.arange(10) + shift, soft_targets, 0.4, label=f"T = {t}")
            axes.set_xticks(range(10), CLASSES, rotation=90, fontsize=8)
            axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
            continue
        caption = heading + CLASSES[labels[i]].upper()
        for name, answer in zip(("teacher", "student", "distilled"), logits[:, i].softmax(1)):
            mark = "✓" if answer.argmax() == labels[i] else "✗"
            caption += f"\n{mark} {name}: {CLASSES[answer.argmax()]} {answer.max():.0%}"
        axes.imshow(images[i].permute(1, 2, 0).numpy())
        axes.set_title(caption, fontsize=8)
        axes.axis("off")
    write_file(path, figure.savefig)

def write_confusion(path, labels, predictions):
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    figure.suptitle("Of 100 images of a class (row), how many are taken for which (column)?")
    for axes, name in zip(figure.subplots(1, 2), ("student", "dist_student")):
        counts = np.histogram2d(labels, predictions[name], bins=range(11))[0]
        percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=150)  # never too dark for black figures
        for (row, column), value in np.ndenumerate(percent):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center")
        axes.set_title(name)
        axes.set_xticks(range(10), CLASSES, rotation=90)
        axes.set_yticks(range(10), [f"{c} {p:.1f} %" for c, p in zip(CLASSES, percent.diagonal())])
    write_file(path, figure.savefig)

def evaluate(args, get_data):
    """Test what is on disk; leaves summary.json, summary.md and three pictures beside it."""
    folder, runs, rows = args.results_dir, read_runs(args.results_dir), {}
    models = {name: load_trained(name, args) for name in STAGES.values()}
    _, _, images, labels = get_data()
    logits = torch.stack([predict(model, images) for model in models.values()]).cpu()  # (4, N, 10)
    labels, n = labels.cpu(), len(labels)
    confidence, predictions = logits.softmax(2).max(2)
    correct = predictions == labels
    _, student, distilled, control = test_acc = (100 * correct.double().mean(1)).tolist()
    for i, (name, model) in enumerate(models.items()):
        acc, batch, result = test_acc[i], images[:1000], runs[name]["result"]
        seconds = np.median(timeit.repeat(lambda: predict(model, batch).cpu(), number=1, repeat=5))
        # Expected calibration error: how far confidence is from accuracy, in 15 equal bins.
        bins = (confidence[i] * 15).long().clamp(0, 14)
        gaps = torch.zeros(15).index_add(0, bins, correct[i].float() - confidence[i]).abs()
        params, skip = (sum(p.numel() for p in part.parameters()) for part in (model, model.skip))
        rows[name] = {
            "train_acc": result.pop("train_acc"), "test_acc": acc,
            "sampling_error": (acc * (100 - acc) / n) ** 0.5, "change": acc - student,
            "test_loss": F.cross_entropy(logits[i], labels).item(),
            "params": params, "params_torchsummary": params + 3 * skip,  # it counts skip four times
            "file_bytes": (folder / f"{name}.pt").stat().st_size, **result,
            "images_per_second": len(batch) / seconds, "ece": gaps.sum().item() / n,
            "agreement": (predictions[i] == predictions[0]).double().mean().item()}
    verdict = (f"from the teacher = distilled − control = {distilled - control:+.2f} points, "
               f"from longer training = control − student = {control - student:+.2f} points")
    lines = [["", *rows["teacher"]], ["---"] * (1 + len(rows["teacher"]))]
    lines += [[name, *(f"{round(v, 4):,}" for v in row.values())] for name, row in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{verdict}\n"
    summary = json.dumps({"rows": rows, "verdict": verdict, "test_images": n}, indent=2)
    write_file(folder / "summary.json", lambda file: file.write(summary.encode()))
    write_file(folder / "summary.md", lambda file: file.write(table.encode()))
    print(table)
    shown = torch.linspace(0, n - 1, 12).long().tolist()  # all over the classes
    unsure = sorted(shown, key=lambda i: confidence[0, i])[:3]
    pictured = images.cpu(), labels, logits
    write_grid(folder / "predictions.png", "What the networks answer; below, the teacher's soft "
               "targets where it is least sure", [(i, "") for i in shown] + [
                   (i, heading) for i in unsure for heading in ("", None)], *pictured)
    _, was, now, _ = correct
    surest = confidence[2].argsort(descending=True)
    groups = {"wrong after distillation": ~now, "mended": now & ~was, "introduced": was & ~now}
    counts = ", ".join(f"{chosen.sum():,} {group}" for group, chosen in groups.items())
    write_grid(folder / "misclassified.png", f"Of {n:,} test images {counts}: the surest of each", [
        (i, f"{group}\n") for group, chosen in groups.items()
        for i in surest[chosen[surest]][:6]], *pictured)
    write_confusion(folder / "confusion_matrix.png", labels, dict(zip(models, predictions)))

# === 7. Command line =============================================================================
def refuse(message):
    raise KDError(f"{message} (python kd.py --help lists the options)", 2)

def parse(argv, name=None):
    """The options; where they say nothing the recipe's training `name`, otherwise the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse  # argparse itself would print two lines and exit
    modules = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    devices = [kind for kind, module in modules.items() if module.is_available()]
    option = parser.add_argument
    option("--stage", required=True, choices=["all", *STAGES, "evaluate"], help="all: each in turn")
    option("--recipe", choices=[*RECIPES], default="reference", help="it may change the defaults")
    option("--device", choices=["auto", *devices], default="auto", help="default: auto, the next")
    option("--data-dir", type=Path, default=Path("data"), help="default: data")
    option("--results-dir", type=Path, help="default: results/<recipe>")
    option("--resume", action="store_true", help="continue what was interrupted")
    for key, (default, low, high, meaning) in SETTINGS.items():
        option(f"--{key.replace('_', '-')}", type=type(default), default=default, metavar="N",
               help=f"{meaning}; {low:,} to {high:,}, else {default:,}")
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe].get(name, {}))
    args = parser.parse_args(argv)
    for key, (_, low, high, _) in SETTINGS.items():
        if not low <= (value := getattr(args, key)) <= high:  # true of nan, too
            refuse(f"--{key.replace('_', '-')} must be from {low:,} to {high:,}, not {value}")
    args.device = torch.device(devices[0] if args.device == "auto" else args.device)
    args.results_dir = args.results_dir or Path("results", args.recipe)
    args.command = shlex.join(["python", "kd.py", *(sys.argv[1:] if argv is None else argv)])
    return args

def prepare(args):
    """load_cifar10's four tensors on the device, after --holdout and --limit."""
    data, n = load_cifar10(args.data_dir), args.holdout
    if n >= len(data[1]):
        refuse(f"--holdout {n} leaves none of {len(data[1])} training images")
    if n or args.limit:
        generator = torch.Generator().manual_seed(derived_seed(args.seed, 0))
        order, test_order = (torch.randperm(len(t), generator=generator) for t in data[1::2])
        data = data[0][order], data[1][order], data[2][test_order], data[3][test_order]
    if n:
        data = data[0][n:], data[1][n:], data[0][:n], data[1][:n]
    return [t[:args.limit or None].to(args.device) for t in data]

def read_runs(folder):
    """run.json: how each finished training was made."""
    return json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}

def load_trained(name, args):
    """The network `name`, on the device, with the weights that its stage left on disk."""
    path, run = args.results_dir / f"{name}.pt", read_runs(args.results_dir).get(name)
    if not path.exists() or run is None:
        stage = next(stage for stage in STAGES if STAGES[stage] == name)
        command = re.sub(r"--stage[= ]\w+", f"--stage {stage}", args.command)
        raise KDError(f"{path} is missing; this makes it: {command}")
    for key in ("seed", "holdout", "limit"):
        if run["settings"][key] != getattr(args, key):
            raise KDError(f"{path} was made with --{key} {run['settings'][key]}, not --{key} "
                          f"{getattr(args, key)}: give each run a --results-dir of its own")
    model = TeacherModel() if name == "teacher" else StudentModel()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(args.device, memory_format=memory_format(args.device))

def train(stage, args, get_data):
    """Train STAGES[stage], which is also what its files are called; what it needs is on disk."""
    name, folder = STAGES[stage], args.results_dir
    if stage == "control":  # the distilled student's training, but for the teacher
        load_trained("dist_student", args)  # or say that it is missing
        distilled = read_runs(folder)["dist_student"]
        n = distilled["result"]["epochs"]  # with as much patience, it takes them all
        vars(args).update(distilled["settings"], alpha=1.0, epochs=n, patience=n)
    kind = TeacherModel if stage == "teacher" else StudentModel
    start = getattr(args, "starts_from", None)
    model = load_trained(start, args) if start else new_network(kind, args.seed)
    teacher = load_trained("teacher", args) if stage == "distill" else None
    state, unfinished = None, folder / "unfinished.pt"
    if args.resume and read_runs(folder).get(name, {}).get("settings") == settings_of(args):
        return print(f"{name} is finished")
    if args.resume and unfinished.exists():
        state = torch.load(unfinished, weights_only=True)
        if (state["name"], state["settings"]) != (name, settings_of(args)):
            raise KDError(f"{unfinished} is of {state['name']}, with {state['settings']}: the same "
                          "command and --resume continues it, no --resume starts anew")
    data = get_data()
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")  # a spare one: it moves the BatchNorm
    result = fit(name, model, data, args, folder, teacher, state)
    cpus = re.findall(r"model name\s*: (.*)", CPUINFO) or [platform.processor()]
    later = list(STAGES.values())[max(2, list(STAGES).index(stage)):]  # what built on old weights
    runs = {key: run for key, run in read_runs(folder).items() if key not in later}
    runs[name] = {
        "command": args.command, "recipe": args.recipe, "result": result,
        "settings": settings_of(args),
        "hardware": torch.cuda.get_device_name() if data[0].is_cuda else f"{len(cpus)} × {cpus[0]}",
        "device": args.device.type, "bf16": has_bf16(args.device), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "python": platform.python_version()}
    write_file(folder / "run.json", lambda file: file.write(json.dumps(runs, indent=2).encode()))

def main(argv=None):
    """Do what the command line asks for. Returns the exit code: 0, 2 for wrong options, else 1."""
    try:
        args = parse(argv)
        if platform.libc_ver()[0] == "glibc":  # keep freed memory: page faults cost a third
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        get_data = functools.cache(lambda: prepare(args))  # once, when a stage has all else
        for stage in STAGES:
            if args.stage in ("all", stage):
                train(stage, parse(argv, STAGES[stage]), get_data)
        if args.stage in ("all", "evaluate"):
            evaluate(args, get_data)
        return 0
    except KDError as error:
        message, code = (*error.args, 1)[:2]
    except Exception as error:  # a full disk, too little memory, …
        message, code = f"{type(error).__name__}: {error}", 1
    print("kd.py:", " ".join(message.split()), file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
