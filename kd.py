"""Knowledge distillation in one file: a small network learns from a large one, on CIFAR-10.

A label says "cat". A trained teacher says more: a cat, perhaps a dog, certainly no truck. Most of
that hides in probabilities close to zero, until a temperature T > 1, dividing the logits, lifts
them (Hinton, Vinyals & Dean 2015, arXiv:1503.02531). The student learns from labels and from that:
    loss = alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T)
Did the teacher help? Distillation starts from the trained student, so it has trained longer, too. A
control starts from the same weights: same optimizer, images, order and epochs, but labels alone.
`python kd.py --stage all` trains all four; weights, logs, pictures and table: results/reference.
"""
import argparse, ctypes, functools, hashlib, json, os, platform, re, shlex, signal, sys, timeit
import zipfile
from pathlib import Path
import numpy as np, torch, torchsummary, torchvision
import torch.nn.functional as F
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
    "warmup": (0.0, 0.0, 1.0, "share of all epochs, the first ones, in which lr rises from 0"),
    "cooldown": (0.0, 0.0, 1.0, "share of all epochs, the last ones, in which lr falls to 0"),
    "momentum": (0.9, 0.0, 0.999, "SGD's momentum"),                                          # [n]
    "weight_decay": (0.0, 0.0, 1.0, "SGD's weight decay"),                                    # [n]
    "degrees": (10.0, 0.0, 180.0, "training images are rotated by up to ± so many degrees"),  # [t]
    "shear": (10.0, 0.0, 80.0, "training images are x-sheared by up to ± so many degrees"),   # [t]
    "shift": (0, 0, 16, "training images are moved by up to ± so many pixels, both ways"),
    "flip": (0.0, 0.0, 1.0, "share of the training images that are mirrored"),
    "temperature": (5.0, 0.01, 1000.0, "T, which divides the logits"),                        # [n]
    "alpha": (1.0, 0.0, 1.0, "weight of the labels; 1 - alpha is that of the soft targets"),
    "patience": (5, 1, 10_000, "a training stops after so many epochs on a plateau"),         # [n]
    "min_delta": (0.02, 0.0, 1000.0, "a plateau: training loss changes by less per epoch"),   # [n]
}
RECIPES = {"reference": {  # where a training differs from these defaults; the control: see train()
    # From the trained student [n]; SGD with weight decay [t], where the notebook has Adam at 1e-3;
    # alpha [n]; lr [m, on held-out training images]: 0.01 learns less, 0.05 throws it off for good.
    "dist_student": {"starts_from": "student", "lr": 0.02, "weight_decay": 5e-4, "alpha": 0.5}}}
STRONG = {"epochs": 60, "batch_size": 128, "lr": 0.05, "warmup": 0.2, "cooldown": 0.8, "shift": 4,
          "flip": 0.5, "degrees": 0.0, "shear": 0.0, "weight_decay": 5e-4, "patience": 10_000}
RECIPES["strong"] = {"teacher": STRONG, "student": STRONG,  # lr falls by plan: no early stopping
                     "dist_student": {**STRONG, "temperature": 4.0, "alpha": 0.1}}  # [m], see README
STAGES = dict(teacher="teacher", student="student", dist_student="distill", control="control")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # R, G, B of the training images
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

class KDError(Exception):
    """Its arguments: one line, what is wrong and what to do; the exit code, unless it is 1."""

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
    torchsummary counts all four: teacher 729,712 (really 722,752), student 230,192 (223,232)."""
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

def TeacherModel(): return Network(c2=64, c3=128)
def StudentModel(): return Network(c2=32, c3=64)

def derived_seed(seed, *purpose):
    """A 32-bit seed for one purpose (integers), so that no two purposes share random numbers."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])

def new_network(kind, seed):
    """A TeacherModel or StudentModel; its initial weights follow from seed and kind alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, *kind.__name__.encode()))
        return kind()

# === 3. Data: the images live on the training device, as bytes ===================================
def read_image(path):
    """An image file, whatever its colour mode → uint8 (3, 32, 32), RGB."""
    try:
        image = TF.pil_to_tensor(torchvision.datasets.folder.default_loader(path))
        if image.shape != (3, 32, 32):
            raise ValueError(f"it has {image.shape[2]}×{image.shape[1]} pixels")
        return image
    except Exception as error:  # Pillow raises all kinds, for files that are not what they seem
        raise KDError(f"{path} is no readable image of 32×32 pixels: {error}")

def load_cifar10(data_dir):
    """(train_images, train_labels, test_images, test_labels): uint8 (N, 3, 32, 32), int64 (N,).
    From data_dir/{train,test}/<class>/ if they exist, otherwise from torchvision's CIFAR10, which
    downloads it. Both are sorted by label and bytes, so that a seed means the same for both."""
    data_dir, tensors = Path(data_dir), []
    folders = (data_dir / "train").exists() or (data_dir / "test").exists()
    for split in ("train", "test"):
        try:
            dataset = (torchvision.datasets.ImageFolder(data_dir / split, loader=read_image)
                       if folders else torchvision.datasets.CIFAR10(
                           data_dir, split == "train", TF.pil_to_tensor, download=True))
        except (OSError, RuntimeError) as error:
            raise KDError(f"no CIFAR-10 in {data_dir} ({split}: {error}): put images into train/"
                          "<class>/ and test/<class>/, or go online for torchvision to download it")
        if dataset.classes != list(CLASSES):  # one missing would shift the others' labels
            raise KDError(f"{data_dir / split} must hold ten folders: {', '.join(CLASSES)}")
        images, labels = zip(*sorted(dataset, key=lambda p: (p[1], p[0].numpy().tobytes())))
        tensors += [torch.stack(images), torch.tensor(labels)]
    return tuple(tensors)

def affine(images, angles, shears, dx=0, dy=0, mirror=1):
    """Mirror (-1), x-shear, rotate, move each image by its own: nearest neighbour, black outside.
    images (N, 3, S, S), 0–255, uint8 or float; angles and shears in degrees, dx and dy in pixels,
    each (N,) → float32, 0–255. The pixels of torchvision's affine on tensors, to the last one."""
    dtype = torch.float32 if images.device.type == "mps" else torch.float64  # MPS has no float64
    angle, shear, dx, dy, mirror = (torch.as_tensor(t).to(images.device, dtype)[..., None, None]
                                    for t in (angles, shears, dx, dy, mirror))
    angle, tan, half = angle.deg2rad(), shear.deg2rad().tan(), images.shape[-1] / 2
    cos, sin = angle.cos(), angle.sin()
    # The inverse of rotation · shear: where to look in the input, in half images from its centre.
    a, b, c, d = (t.float() / half for t in (cos - sin * tan, sin + cos * tan, -sin, cos))
    x = torch.arange(images.shape[-1], device=images.device) - (half - 0.5)
    x, y = x - dx.float(), x[:, None] - dy.float()                             # a row, a column
    grid = torch.stack([mirror.float() * (a * x + b * y), c * x + d * y], -1)  # (N, S, S, 2)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False)

def draw_affine(n, degrees, shear, generator, shift=0, flip=0.0):
    """Arguments for `affine`, float32 (n,) each, from a CPU generator: angles and shears uniform in
    ±degrees and ±shear, dx and dy whole numbers in ±shift, mirror -1 with probability flip."""
    u = torch.rand(5, n, generator=generator)
    (angles, shears), (dx, dy) = u[:2] * 2 - 1, (u[2:4] * (2 * shift + 1)).floor() - shift
    return angles * degrees, shears * shear, dx, dy, torch.where(u[4] < flip, -1.0, 1.0)

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
    Chance follows from (seed, epoch) alone: with one seed every training sees the same batches."""
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, epoch))
    order = torch.randperm(len(images), generator=generator)
    draws = draw_affine(len(images), settings.degrees, settings.shear, generator, settings.shift,
                        settings.flip)
    chunks = [t.to(images.device).split(settings.batch_size) for t in (order, *draws)]
    for index, *draw in zip(*chunks):
        yield normalise(affine(images[index], *draw)), labels[index]

# === 4. The loss: what this file is about ========================================================
def distillation_loss(student_logits, teacher_logits, targets, temperature, alpha):
    """alpha · CE(student, label) + (1 - alpha) · T² · KL(teacher_T ‖ student_T) → scalar.

    Logits (N, C), any float type, computed in float32; targets int64 (N,). The teacher gets no
    gradient. After Hinton et al. 2015, section 2. A cat, as a teacher of three classes may see it:
        logits   cat 8       dog 5       truck 0
        T = 1    cat 0.952   dog 0.047   truck 0.000   hardly more than the label
        T = 5    cat 0.571   dog 0.313   truck 0.115   a cat, more like a dog than a truck

    Which side is the target? With p and q the softmax of teacher's and student's logits / T,
    KL(p ‖ q) = Σ p (log p - log q) weighs by p: where the teacher sees a likeness the student must.
    F.kl_div wants log q, then log p, both from log_softmax: a softmax may be 0, whose log is -inf.

    Why T²? KL alone has the gradient (q - p) / T in the student's logits, and for large T, q - p
    shrinks as 1/T as well. T² makes up for both: alpha means much the same at every large T.

    Why batchmean? KL is a sum over classes; "mean" would also divide by their number, ten."""
    student_logits, teacher_logits = student_logits.float(), teacher_logits.detach().float()
    loss_hard = F.cross_entropy(student_logits, targets)
    log_q = F.log_softmax(student_logits / temperature, dim=1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=1)
    loss_soft = temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * loss_hard + (1 - alpha) * loss_soft

# === 5. Training: one loop for all four, and when it stops =======================================
class EarlyStopping:
    """Called with each epoch's mean training loss: True once it has changed by less than min_delta
    `patience` times in a row, up or down; a slow steady fall counts. (Each loss has its scale.)"""
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
    with torch.autocast(inputs.device.type, torch.bfloat16, has_bf16(inputs.device)):
        return model(inputs).float()

@torch.no_grad()
def predict(model, images):
    """Logits, float32 (N, 10), of images as bytes: in eval mode, not augmented."""
    return torch.cat([logits_of(model.eval(), normalise(batch)) for batch in images.split(2000)])

def write_file(path, save):
    """`save(file)` fills a temporary file, which then takes its place: whole or not at all."""
    with open(path.with_name(path.name + ".part"), "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)

def load_checkpoint(model, path):
    """Fill the model from a .pt file, whoever made it: runs no code in it. Returns all it holds."""
    try:
        zipfile.ZipFile(path).close()  # torch.save's format; any other fails here
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key, value in model.state_dict().items():
            if (new := checkpoint[key]).shape != value.shape or not new.isfinite().all():
                raise ValueError(f"{key} must be {tuple(value.shape)} finite numbers")
            value.copy_(new)  # into the model, whose memory a state_dict shares
        return checkpoint
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition(". ")[0]  # not torch's further advice
        raise KDError(f"{path} does not hold this network's weights: {reason}")

def fit(name, model, data, settings, folder, teacher=None, state=None):
    """Train the model, with a teacher and from earlier state if given; leaves weights and log."""
    train_images, _, test_images, test_labels = data
    n, device = len(train_images), train_images.device
    model.to(device, memory_format=memory_format(device))
    if teacher is not None:
        teacher.eval().requires_grad_(False)  # frozen: nothing of it is trained or recorded
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, settings.momentum,
                                weight_decay=settings.weight_decay)
    early_stopping = EarlyStopping(settings.patience, settings.min_delta)
    state = {"log": [], "optimizer": optimizer.state_dict(), **(state or {})}
    optimizer.load_state_dict(state["optimizer"])
    log = state["log"]
    stop = any([early_stopping(row["train_loss"]) for row in log])
    rise, fall = settings.warmup, 1 - settings.cooldown  # when lr has risen; when it starts to fall
    while not stop and (epoch := len(log) + 1) <= settings.epochs:
        model.train()
        start, totals = timeit.default_timer(), torch.zeros(2, device=device)  # loss, correct
        with tqdm(total=n, desc=f"{name} {epoch}", unit=" image", leave=False, disable=None) as bar:
            for i, (x, labels) in enumerate(training_batches(*data[:2], settings, epoch)):
                progress = (epoch - 1 + i * settings.batch_size / n) / settings.epochs
                optimizer.param_groups[0]["lr"] = settings.lr * float(np.interp(
                    progress, (0, rise, max(rise, fall), 1), (0, 1, 1, 0)))
                logits = logits_of(model, x)
                loss = F.cross_entropy(logits, labels) if teacher is None else distillation_loss(
                    logits, logits_of(teacher, x), labels, settings.temperature, settings.alpha)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                correct = (logits.argmax(1) == labels).sum()
                totals += torch.stack([loss.detach() * len(labels), correct])
                if bar.update(len(labels)):  # when it is redrawn, on a terminal only: this waits
                    bar.set_postfix_str("loss {:.3f}, accuracy {:.1%}".format(*(totals / bar.n)))
        loss_sum, correct, seconds = *totals.tolist(), timeit.default_timer() - start  # waits
        outputs = predict(model, test_images)  # watched, never used to choose anything
        row = {"epoch": epoch, "train_loss": loss_sum / n, "train_acc": 100 * correct / n,
               "test_loss": F.cross_entropy(outputs, test_labels).item(),
               "test_acc": 100 * (outputs.argmax(1) == test_labels).sum().item() / len(outputs),
               "seconds": seconds}
        if not np.isfinite(row["train_loss"] + row["test_loss"]):
            raise KDError(f"{name} diverged, its loss is not finite in epoch {epoch}: lower --lr")
        log.append({key: round(value, 6) for key, value in row.items()})
        print(f"{name:12}", *(f"{key} {value:<8.5g}" for key, value in row.items()), flush=True)
        stop = early_stopping(log[-1]["train_loss"])
        state.update(model.state_dict(), optimizer=optimizer.state_dict())  # what --resume needs
        write_file(folder / f"unfinished.{name}.pt", lambda file: torch.save(state, file))
        if timeit.default_timer() // 10 > start // 10:  # drawing takes a moment: once in 10 s
            write_log(folder / f"unfinished.{name}", name, log)
    write_log(folder / f"{name}_train_logs", name, log)
    weights = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    write_file(folder / f"{name}.pt", lambda file: torch.save(weights, file))
    return {"train_acc": log[-1]["train_acc"], "epochs": len(log),
            "seconds_per_epoch": float(np.median([row["seconds"] for row in log]))}

# === 6. Evaluation: the table and the pictures ===================================================
def write_log(stem, name, log):
    """<stem>.csv, a row per epoch, and <stem>.png, its picture."""
    columns = {key: [row[key] for row in log] for key in log[0]}
    rows = list(zip(*columns.values()))
    write_file(Path(f"{stem}.csv"), lambda file: np.savetxt(
        file, rows, "%.10g", ",", header=",".join(columns), comments=""))
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "acc"], ["table", "table"]], height_ratios=[4, 1])
    for kind, title, scale in (("loss", "loss", "log"), ("acc", "accuracy (%)", "linear")):
        for split, style in (("train", ".--"), ("test", ".-")):
            axes[kind].plot("epoch", f"{split}_{kind}", style, data=columns, label=split)
        axes[kind].set(title=f"{name}: {title}", xlabel="epoch", yscale=scale)
        axes[kind].locator_params(axis="x", integer=True)
        axes[kind].legend()
    axes["table"].axis("off")
    axes["table"].table(np.char.mod("%.5g", rows[-5:]), colLabels=list(columns), loc="center")
    write_file(Path(f"{stem}.png"), figure.savefig)

def write_grid(path, title, panels, images, labels, logits):
    """Six panels a row: (i, heading) shows image i with the answers, (i, None) its soft targets."""
    rows = -(-len(panels) // 6) or 1
    figure = Figure(figsize=(13, 3.1 * rows), layout="constrained")
    figure.suptitle(title, fontsize=14)
    for place, (i, heading) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, 6, place)
        if heading is None:
            for t, x in ((1, np.arange(10) - 0.2), (5, np.arange(10) + 0.2)):
                axes.bar(x, (logits[0, i] / t).softmax(0).numpy(), 0.4, label=f"T = {t}")
            axes.set_xticks(range(10), CLASSES, rotation=90, fontsize=8)
            axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
            continue
        caption = heading + CLASSES[labels[i]].upper()
        for name, p, k in zip(("teacher", "student", "distilled"), *logits[:, i].softmax(1).max(1)):
            caption += f"\n{'✓' if k == labels[i] else '✗'} {name}: {CLASSES[k]} {p:.0%}"
        axes.imshow(images[i].permute(1, 2, 0).cpu().numpy())
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
    models = {name: load_trained(name, args) for name in args.trainings}
    _, _, images, labels = get_data()
    logits = torch.stack([predict(model, images) for model in models.values()]).cpu()  # (·, N, 10)
    labels, n = labels.cpu(), len(labels)
    confidence, predictions = logits.softmax(2).max(2)
    correct = predictions == labels
    test_acc = (100 * correct.double().mean(1)).tolist()
    _, student, distilled, control = [*test_acc, test_acc[1]][:4]  # no control: the student is it
    for i, (name, model) in enumerate(models.items()):
        acc, sure, batch, result = test_acc[i], confidence[i], images[:1000], runs[name]["result"]
        seconds = np.median(timeit.repeat(lambda: predict(model, batch).cpu(), number=1, repeat=5))
        gaps = np.histogram(sure, 15, (0, 1), weights=correct[i].double() - sure)[0]  # sums
        params, skip = (sum(p.numel() for p in part.parameters()) for part in (model, model.skip))
        rows[name] = {"train_acc": result["train_acc"], "test_acc": acc,
                      "sampling_error": (acc * (100 - acc) / n) ** 0.5, "change": acc - student,
                      "test_loss": F.cross_entropy(logits[i], labels).item(),
                      "params": params, "params_torchsummary": params + 3 * skip,  # once per call
                      "file_bytes": (folder / f"{name}.pt").stat().st_size,
                      "epochs": result["epochs"], "seconds_per_epoch": result["seconds_per_epoch"],
                      "images_per_second": len(batch) / seconds, "ece": np.abs(gaps).sum() / n,
                      "agreement": (predictions[i] == predictions[0]).double().mean().item()}
    verdict = f"from the teacher = distilled − control = {distilled - control:+.2f} points" + (
        f", from longer training = control − student = {control - student:+.2f} points"
        if "control" in models else " (the student is the control)")
    lines = [["", *rows["teacher"]], ["---"] * (1 + len(rows["teacher"]))]
    lines += [[name, *(f"{round(v, 4):,}" for v in row.values())] for name, row in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{verdict}\n"
    summary = json.dumps({"rows": rows, "verdict": verdict, "test_images": n}, indent=2)
    write_file(folder / "summary.json", lambda file: file.write(summary.encode()))
    write_file(folder / "summary.md", lambda file: file.write(table.encode()))
    shown = torch.linspace(0, n - 1, 12).long().tolist()  # all over the classes
    unsure = sorted(shown, key=lambda i: confidence[0, i])[:3]
    panels = [(i, "") for i in shown] + [(i, heading) for i in unsure for heading in ("", None)]
    write_grid(folder / "predictions.png", "What the networks answer; below, the teacher's soft "
               "targets where it is least sure", panels, images, labels, logits)
    was, now, surest = *correct[1:3], confidence[2].argsort(descending=True)
    groups = {"wrong after distillation": ~now, "mended": now & ~was, "introduced": was & ~now}
    counts = ", ".join(f"{chosen.sum():,} {group}" for group, chosen in groups.items())
    panels = [(i, f"{group}\n") for group, mask in groups.items() for i in surest[mask[surest]][:6]]
    write_grid(folder / "misclassified.png", f"Of {n:,} test images {counts}: the surest of each",
               panels, images, labels, logits)
    write_confusion(folder / "confusion_matrix.png", labels, dict(zip(models, predictions)))
    print(table)

# === 7. Command line =============================================================================
def refuse(message): raise KDError(f"{message} (python kd.py --help lists the options)", 2)

def parse(argv, name=None):
    """The options; where they say nothing the recipe's training `name`, otherwise the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse  # argparse itself would print two lines and exit
    devices = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    add = parser.add_argument
    add("--stage", required=True, choices=["all", *STAGES.values(), "evaluate"], help="which part")
    add("--recipe", choices=[*RECIPES], default="reference", help="sets some defaults")
    add("--device", choices=["auto", *devices], default="auto", help="default: auto, the first")
    add("--data-dir", type=Path, default=Path("data"), help="default: data")
    add("--results-dir", type=Path, help="default: results/<recipe>")
    add("--resume", action="store_true", help="continue what was interrupted")
    for key, (default, low, high, meaning) in SETTINGS.items():
        add(f"--{key.replace('_', '-')}", type=type(default), default=default, metavar="N",
            help=f"{meaning}; {low:,} to {high:,}, else {default:,}")
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe].get(name, {}))
    args = parser.parse_args(argv)
    for key, (_, low, high, _) in SETTINGS.items():
        if not low <= (value := getattr(args, key)) <= high:  # true of nan, too
            refuse(f"--{key.replace('_', '-')} must be from {low:,} to {high:,}, not {value}")
    args.trainings = [*STAGES][:4 if "starts_from" in RECIPES[args.recipe]["dist_student"] else 3]
    if args.stage == "control" and "control" not in args.trainings:
        refuse("--stage control: here the student is the control, it differs in the loss alone")
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
    data = [t[n:] for t in data[:2]] + [t[:n] for t in data[:2]] if n else data
    data = [t[:args.limit or None].to(args.device) for t in data]
    print(f"{len(data[1]):,} training images (of 50,000), {len(data[3]):,} test images (of 10,000)")
    return data

def read_runs(folder):
    """run.json: how each finished training was made."""
    return json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}

def require_same(path, made, wanted):
    """Refuse what was made otherwise than is wanted, and name the difference."""
    for key, new in wanted.items():
        if (old := made.get(key)) != new:
            raise KDError(f"{path} was made with {key} {old}, not {new}: use another --results-dir")

def load_trained(name, args):
    """The network `name`, on the device, with the weights that its stage left on disk."""
    path, runs = args.results_dir / f"{name}.pt", read_runs(args.results_dir)
    if not path.exists() or name not in runs:
        command = re.sub(r"--stage[= ]\w+", f"--stage {STAGES[name]}", args.command)
        raise KDError(f"{path} is missing or outdated; run {command}")
    require_same(path, runs[name], {key: vars(args)[key] for key in ("seed", "holdout", "limit")})
    model = TeacherModel() if name == "teacher" else StudentModel()
    load_checkpoint(model, path)
    return model.to(args.device, memory_format=memory_format(args.device))

def train(name, args, get_data):
    """One of the four trainings; its files bear its name, and what it starts from is on disk."""
    folder, runs = args.results_dir, read_runs(args.results_dir)
    if name == "control":  # the distilled student's training, but for the teacher
        load_trained("dist_student", args)  # or say that it is missing
        was = runs["dist_student"]
        vars(args).update({key: was[key] for key in ("starts_from", *SETTINGS)}, alpha=1.0)
        args.epochs = args.patience = was["result"]["epochs"]  # as many, and never fewer
    kind = TeacherModel if name == "teacher" else StudentModel
    start = getattr(args, "starts_from", None)
    model = load_trained(start, args) if start else new_network(kind, args.seed)
    teacher = load_trained("teacher", args) if name == "dist_student" else None
    data = get_data()
    run = {"name": name, "recipe": args.recipe, "torch": str(torch.__version__),
           "starts_from": start, **{key: vars(args)[key] for key in SETTINGS},
           "images": hashlib.sha256(b"".join(t.cpu().numpy() for t in data)).hexdigest(),
           "device": args.device.type, "bf16": has_bf16(args.device)}
    state, unfinished = {"run": run, "log": []}, folder / f"unfinished.{name}.pt"
    if args.resume and unfinished.exists():
        state = load_checkpoint(model, unfinished)
        require_same(unfinished, state.get("run", {}), run)
        print(f"{name} goes on after epoch {len(state['log'])}")
    elif args.resume and name in runs and (folder / f"{name}.pt").exists():
        require_same(folder / "run.json", runs[name], run)
        return print(f"{name} is finished")
    elif args.resume or unfinished.exists():
        print(f"{name} starts anew; there is {'nothing' if args.resume else unfinished} to resume")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"unfinished.{name}.part").touch()  # is it a place to write? ask before the work
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")  # a spare one: BatchNorm is updated
    try:
        result = fit(name, model, data, args, folder, teacher, state)
    except KeyboardInterrupt as stop:
        raise KDError(f"{name} was stopped in epoch {len(state['log']) + 1}; to go on: "
                      f"{args.command}{' --resume' * (not args.resume)}", 128 + (*stop.args, 2)[0])
    cpus = re.findall(r"model name\s*: (.*)", CPUINFO) or [platform.processor()]
    cpu, gpu = f"{len(cpus)} × {cpus[0]}", data[0].is_cuda and torch.cuda.get_device_name()
    names, i = [*STAGES], [*STAGES].index(name)
    outdated = {name, *names[max(2, i):] * (i != 1 or "control" in args.trainings)}  # build on it
    void = outdated.union(names[i:] if args.stage == "all" else ())
    runs = {key: old for key, old in read_runs(folder).items() if key not in void}
    runs[name] = {"command": args.command, **run, "result": result, "hardware": gpu or cpu,
                  "torchvision": torchvision.__version__, "python": platform.python_version()}
    write_file(folder / "run.json", lambda file: file.write(json.dumps(runs, indent=2).encode()))
    for path in [path for key in outdated for path in folder.glob(f"unfinished.{key}.*")]:
        path.unlink()

def main(argv=None):
    """Do what the command line asks for. Returns the exit code: 0, 1, 2 or 128 + signal."""
    try:
        args = parse(argv)
        if platform.libc_ver()[0] == "glibc":  # keep freed memory: page faults cost a third
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        get_data = functools.cache(lambda: prepare(args))  # once, when a stage has all else
        for name in args.trainings:
            if args.stage in ("all", STAGES[name]):
                train(name, parse(argv, name), get_data)
        if args.stage in ("all", "evaluate"):
            evaluate(args, get_data)
        return 0
    except KDError as error:
        message, code = (*error.args, 1)[:2]
    except KeyboardInterrupt as stop:
        message, code = "stopped", 128 + (*stop.args, 2)[0]  # Ctrl-C has no number: 2
    except Exception as error:  # a full disk, …
        hint = "a lower --batch-size needs less memory: " if "memory" in repr(error).lower() else ""
        message, code = f"{hint}{type(error).__name__}: {error}", 1
    print("kd.py:", " ".join(message.split()), file=sys.stderr)
    return code

def interrupt(number, frame): raise KeyboardInterrupt(number)
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C does by itself, where number is 2
    sys.exit(main())
