"""Tests of kd.py, offline: against torchvision, float64 arithmetic and hand-made cases. First what
teaches: networks, data, loss, training. Then what protects: files, refusals, kills."""

import dataclasses
import hashlib
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchsummary
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TVF

import kd

NAMES = ["teacher", "student", "dist_student", "control"]
PER_CLASS = {"train": 16, "test": 8}
EPOCHS = 5
OPTIONS = ["--epochs", EPOCHS, "--batch-size", 16, "--lr", 0.003]


@pytest.fixture(autouse=True, scope="session")
def float32():
    """On every CPU, to compare results closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "bf16_is_faster", lambda device: False)
        yield


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A learnable set: in each class a square of its colour, somewhere on dark noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, n in PER_CLASS.items():
        for label, name in enumerate(kd.CLASSES):
            (root / split / name).mkdir(parents=True)
            colour = np.array([label % 3, label // 3 % 3, label // 9 * 2]) * 90 + 60
            for i in range(n):
                image = rng.integers(0, 60, (32, 32, 3))
                x, y = rng.integers(3, 13, 2)
                image[y : y + 16, x : x + 16] = colour + rng.integers(-15, 15, (16, 16, 3))
                image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def data(data_dir):
    return kd.load_cifar10(data_dir)


def run(data_dir, folder, stage, *options):
    options = ["--stage", stage, "--data-dir", data_dir, "--results-dir", folder, *options]
    kd.main([str(option) for option in options] + ["--device", "cpu"])


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory):
    """The results of `--stage all` on the small set."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    run(data_dir, folder, "all", *OPTIONS)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def quick_pictures(monkeypatch):
    """Empty files: drawing takes most of a small run's time."""

    def savefig(figure, path):
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)


def read_pt(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def read_network(folder, name):
    network = kd.TeacherModel() if name == "teacher" else kd.StudentModel()
    network.load_state_dict(read_pt(folder, name)["model"])
    return network


def same_weights(folder, other, name):
    ours = read_pt(folder, name)["model"]
    theirs = read_pt(other, name)["model"]
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, distinct, reported",
    [(kd.TeacherModel, 722_752, 729_712), (kd.StudentModel, 223_232, 230_192)],
)
def test_parameter_counts(kind, distinct, reported, capsys):
    assert sum(p.numel() for p in kind().parameters()) == distinct
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    assert f"Total params: {reported:,}\n" in capsys.readouterr().out


def test_the_skip_path_counts():
    network = kd.StudentModel().eval()
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network(inputs)
        network.skip.weight.zero_()
        assert logits.shape == (2, 10) and not torch.allclose(logits, network(inputs))


# --- the data -------------------------------------------------------------------------------------


def by_label(images, labels):
    """To compare two sets of labelled images in any order."""
    pairs = zip(labels.tolist(), images, strict=True)
    return sorted((label, image.contiguous().numpy().tobytes()) for label, image in pairs)


def test_each_loaded_image_equals_its_file(data_dir, data):
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:])):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        files = []
        for label, name in enumerate(kd.CLASSES):
            for path in (data_dir / split / name).iterdir():
                files.append((label, np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()))
        assert by_label(images, labels) == sorted(files)


def test_torchvision_s_layout_gives_the_same_tensors(data, tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(name, images, labels):
        return [write(name, {"data": images.reshape(len(images), -1), "labels": labels.tolist()})]

    cifar = torchvision.datasets.CIFAR10
    order = torch.randperm(len(data[0]))
    train = batch("data_batch_1", data[0][order].numpy(), data[1][order])
    monkeypatch.setattr(cifar, "train_list", train)
    monkeypatch.setattr(cifar, "test_list", batch("test_batch", data[2].numpy(), data[3]))
    name, md5 = write("batches.meta", {"label_names": kd.CLASSES})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": "label_names", "md5": md5})
    for ours, theirs in zip(kd.load_cifar10(tmp_path), data, strict=True):
        assert torch.equal(ours, theirs)


def test_affine_equals_torchvision_pixel_for_pixel():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8, generator=generator)
    changes = torch.zeros(5, 600)
    changes[4] = 1
    changes[:2, :400] = torch.rand(2, 400, generator=generator) * 20 - 10
    extremes = [(10, 10), (-10, 10), (90, 0), (-90, 0), (180, 0), (30, 40), (170, -60), (0, 0)]
    changes[:2, :8] = torch.tensor(extremes).T
    changes[2:4, 400:] = torch.randint(-5, 6, (2, 200), generator=generator)
    changes[4, ::2] = -1
    theirs = []
    for image, (angle, shear, dx, dy, mirror) in zip(images, changes.T.tolist(), strict=True):
        image = TVF.hflip(image) if mirror < 0 else image
        move = [int(dx), int(dy)]
        nearest = InterpolationMode.NEAREST
        theirs.append(TVF.affine(image, angle, move, 1.0, [shear, 0.0], nearest, fill=0))
    ours = kd.affine(images, changes)
    assert ours.dtype == torch.float32 and torch.equal(ours, torch.stack(theirs).float())


def test_normalise_equals_torchvision(data):
    theirs = TVF.normalize(
        data[0][:7].float() / 255, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    )
    torch.testing.assert_close(kd.normalise(data[0][:7]), theirs)


STILL = kd.Settings(batch_size=60, rotation=0.0, shear=0.0)


def augmented(**changes):
    """60 images without black, each at every place of an epoch's one batch, and what became of
    them."""
    images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8)
    settings = dataclasses.replace(STILL, **changes)
    ((inputs, order),) = kd.training_batches(images, torch.arange(60), settings, 0, 1)
    return images[order], inputs


def test_an_epoch_shows_every_image_once_with_its_label(data):
    batches = list(kd.training_batches(data[0], data[1], STILL, 0, 1))
    inputs = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert by_label(inputs, labels) == by_label(kd.normalise(data[0]), data[1])
    assert not torch.equal(labels, data[1])


def test_flip_shift_and_rotation_follow_the_settings():
    images, inputs = augmented(flip=1.0)
    assert torch.equal(inputs, kd.normalise(images.flip(-1)))
    images, inputs = augmented(shift=1)
    padded = F.pad(images, (1, 1, 1, 1))
    places = set()
    for i in range(60):
        for place in range(9):
            top, left = divmod(place, 3)
            crop = padded[i : i + 1, :, top : top + 32, left : left + 32]
            if torch.equal(inputs[i : i + 1], kd.normalise(crop)):
                places.add(place)
    assert len(places) == 9
    images, inputs = augmented(rotation=10.0)
    assert not torch.equal(inputs, kd.normalise(images))


def test_cutout_removes_one_square_from_each_image():
    images, inputs = augmented(cutout=12)
    lost = inputs != kd.normalise(images)
    assert (inputs[lost] == 0).all()
    sizes = set()
    for mask in lost.any(dim=1):
        rows, columns = mask.any(dim=1).sum().item(), mask.any(dim=0).sum().item()
        assert mask.sum() == rows * columns and 6 <= min(rows, columns) <= max(rows, columns) <= 12
        sizes.add((rows, columns))
    assert (12, 12) in sizes and len(sizes) > 1  # some squares lie partly outside


def test_an_epoch_s_chance_follows_from_seed_and_epoch_alone(data):
    def first(seed, epoch):
        settings = kd.Settings(shift=2, flip=0.5, cutout=8)
        return next(kd.training_batches(data[0], data[1], settings, seed, epoch))[0]

    reference = first(0, 3)
    torch.rand(1000)
    assert torch.equal(reference, first(0, 3))
    assert not torch.equal(reference, first(0, 4)) and not torch.equal(reference, first(1, 3))


def test_holdout_takes_training_images_and_any_slice_has_all_classes(data):
    held = kd.hold_out(data, 40)
    assert (len(held[0]), len(held[2])) == (120, 40)
    images, labels = torch.cat([held[0], held[2]]), torch.cat([held[1], held[3]])
    assert by_label(images, labels) == by_label(data[0], data[1])
    assert len(data[1][:60].unique()) == len(data[3][:60].unique()) == 10


# --- the loss -------------------------------------------------------------------------------------


def random_logits(n=6):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, n, 10, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(0, 10, (n,), generator=generator)


def softmax(logits, t):
    powers = [math.exp(logit / t) for logit in logits]
    return [power / sum(powers) for power in powers]


def by_hand(student, teacher, labels, t, alpha):
    """The formula in Python floats, image by image and class by class."""
    total = 0.0
    for z, v, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        hard = -math.log(softmax(z, 1)[label])
        soft = 0.0
        for p, q in zip(softmax(v, t), softmax(z, t), strict=True):
            soft += p * (math.log(p) - math.log(q))
        total += alpha * hard + (1 - alpha) * t * t * soft
    return total / len(student)


@pytest.mark.parametrize("t", [1, 2.5, 5, 20])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_equals_float64_arithmetic(t, alpha, dtype):
    student, teacher, labels = random_logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = kd.distillation_loss(student, teacher, labels, t, alpha)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(student, teacher, labels, t, alpha), rel=2e-5)


@pytest.mark.parametrize("t", [1.0, 5.0])
def test_soft_loss_s_gradient(t):
    student, teacher, labels = random_logits()
    z, v = student.float().requires_grad_(), teacher.float().requires_grad_()
    kd.distillation_loss(z, v, labels, t, 0).backward()
    expected = t * ((student / t).softmax(1) - (teacher / t).softmax(1)) / len(student)
    torch.testing.assert_close(z.grad, expected.float(), atol=1e-6, rtol=1e-4)
    assert v.grad is None


def test_loss_is_finite_at_extreme_logits():
    student = torch.full((4, 10), -200.0).fill_diagonal_(200).requires_grad_()
    teacher = student.detach().flip(1)
    loss = kd.distillation_loss(student, teacher, torch.tensor([9, 8, 7, 6]), 1, 0.5)
    loss.backward()
    assert loss.isfinite() and loss > 100 and student.grad.isfinite().all()


# --- early stopping and training ------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, stops_at",
    [
        ([2.0, 1.5, 1.49, 1.48, 1.47], 5),  # three small changes in a row
        ([2.0, 1.5, 1.51, 1.50, 1.51], 5),  # small rises count, too
        ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18], None),  # a large one starts the count anew
        ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18, 1.17], 8),
        ([1.0, 1.0, 1.0, 1.0], 4),
        ([0.0], None),
    ],
)
def test_early_stopping(losses, stops_at):
    def first_stop(settings):
        for epoch in range(1, len(losses) + 1):
            if kd.is_finished(losses[:epoch], settings):
                return epoch
        return None

    assert first_stop(kd.Settings(patience=3)) == stops_at
    assert first_stop(kd.Settings(patience=3, min_delta=0)) is None
    assert first_stop(kd.Settings(epochs=1)) == 1


def test_learning_rate_rises_and_falls():
    settings = kd.Settings(lr=0.4, warmup=0.2, min_delta=0)
    for progress, part in ((0, 0), (0.1, 0.5), (0.2, 1), (0.6, 0.5), (0.8, 0.25), (1, 0)):
        assert kd.learning_rate(settings, progress) == pytest.approx(0.4 * part)
    assert kd.learning_rate(kd.Settings(lr=0.4), 0.99) == 0.4


def start_second_stage(finished, folder):
    """A folder with teacher and student alone."""
    folder.mkdir()
    for name in ("teacher", "student"):
        shutil.copy(finished / f"{name}.pt", folder)
    return folder


@pytest.mark.parametrize("clip", [0, 0.1])
def test_distillation_is_what_a_plain_loop_computes(finished, data_dir, data, tmp_path, clip):
    """One step: the same images for both, the teacher in eval mode and left as it is, the loss by
    hand, SGD and gradient clipping written out."""
    folder = start_second_stage(finished, tmp_path / "run")
    options = ["--epochs", 1, "--batch-size", 1000, "--lr", 0.003, "--grad-clip", clip]
    run(data_dir, folder, "dist_student", *options)
    settings = kd.Settings(batch_size=1000)
    inputs, labels = next(kd.training_batches(data[0], data[1], settings, 0, 1))
    with torch.no_grad():
        soft = read_network(folder, "teacher").eval()(inputs)
    student = read_network(folder, "student").train()
    logits = student(inputs)
    expected = by_hand(logits.double(), soft.double(), labels, 5, 0.5)
    row = read_pt(folder, "dist_student")["log"][0]
    assert row["train_loss"] == pytest.approx(expected, rel=1e-4)
    ce = F.cross_entropy(logits, labels)
    kl = F.kl_div((logits / 5).log_softmax(1), (soft / 5).softmax(1), reduction="sum") / len(labels)
    (0.5 * ce + 0.5 * 25 * kl).backward()
    length = math.sqrt(sum((weight.grad**2).sum().item() for weight in student.parameters()))
    scale = 1
    if clip:
        assert length > 2 * clip
        scale = clip / length
    trained = dict(read_network(folder, "dist_student").named_parameters())
    for key, weight in student.named_parameters():
        step = weight.detach() - 0.003 * (scale * weight.grad + 5e-4 * weight.detach())
        torch.testing.assert_close(trained[key].detach(), step, atol=2e-5, rtol=1e-3)
    assert same_weights(folder, finished, "teacher")


def test_dist_student_and_control_see_the_same_images(finished, data_dir, tmp_path, monkeypatch):
    folder = start_second_stage(finished, tmp_path / "run")
    seen = []
    normalise = kd.normalise

    def spy(images):
        seen.append(images.clone())
        return normalise(images)

    monkeypatch.setattr(kd, "normalise", spy)
    options = ["--epochs", 1, "--batch-size", 80, "--lr", 0.003]
    run(data_dir, folder, "dist_student", *options)
    distilled = list(seen)
    seen.clear()
    run(data_dir, folder, "control", *options)
    assert len(seen) == len(distilled) == 3  # two batches, one test
    assert all(torch.equal(a, b) for a, b in zip(seen, distilled, strict=True))


def test_a_step_on_cuda_neither_copies_nor_waits_and_convolves_in_bf16(monkeypatch):
    """With fake CUDA tensors, which know device, shape and type, but hold no numbers."""
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    from torch.utils._python_dispatch import TorchDispatchMode

    copies = []
    convolutions = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "_local_scalar_dense" in name:
                copies.append(name)
                return 0.0
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and "copy" in name:
                devices = {a.device for a in args if isinstance(a, torch.Tensor)}
                if devices and devices != {result.device}:
                    copies.append(name)
            if "aten.convolution" in name or "cudnn_convolution" in name:
                convolutions.append(result.dtype)
            return result

    monkeypatch.setattr(kd, "bf16_is_faster", lambda device: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    counts = []
    for n in (40, 80):  # two steps, four steps
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), Watch():
            try:
                with torch.device("cuda"):
                    teacher = kd.TeacherModel()
                    student = kd.StudentModel()
            except (AssertionError, RuntimeError) as error:
                pytest.skip(f"this version of PyTorch builds no fake CUDA networks: {error}")
            images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device="cuda")
            labels = torch.zeros(n, dtype=torch.int64, device="cuda")
            data = kd.Data(images, labels, images, labels)
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
            copies.clear()
            settings = kd.Settings(batch_size=20, cutout=8, grad_clip=1)
            kd.train_epoch(student, settings, data, teacher, optimizer, 0, 1)
        counts.append(len(copies))
    assert convolutions and set(convolutions) == {torch.bfloat16}
    assert counts[0] == counts[1], copies  # those of an epoch, none of a step


# --- the whole run --------------------------------------------------------------------------------


def test_all_leaves_every_file(finished):
    expected = {"summary.json", "summary.md", "accuracy.png", "soft_targets.png"}
    expected |= {"predictions.png", "misclassified.png"}
    for name in NAMES:
        expected |= {f"{name}.pt", f"{name}_train_logs.csv", f"{name}_train_logs.png"}
    assert {path.name for path in finished.iterdir()} == expected
    for path in finished.glob("*.png"):
        assert min(Image.open(path).size) >= 300


def test_all_learns_and_its_figures_are_right(finished, data):
    summary = json.loads((finished / "summary.json").read_text())
    table = (finished / "summary.md").read_text(encoding="utf-8")
    assert list(summary["rows"]) == NAMES and "limit" not in summary
    answers = {}
    for name, row in summary["rows"].items():
        log = np.genfromtxt(finished / f"{name}_train_logs.csv", delimiter=",", names=True)
        assert row["test_acc"] > 60, (name, row)  # chance: 10
        assert row["epochs"] == len(log) == EPOCHS
        assert row["train_acc"] == pytest.approx(log["train_acc"][-1], abs=0.01)
        assert row["test_acc_last5"] == pytest.approx(log["test_acc"][-5:].mean(), abs=0.01)
        assert row["parameters"] == (722_752 if name == "teacher" else 223_232)
        with torch.no_grad():
            logits = read_network(finished, name).eval()(kd.normalise(data[2]))
        answers[name] = logits.argmax(1).numpy()
        assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, data[3]).item(), rel=1e-3)
        assert row["test_acc"] == pytest.approx(100 * np.mean(answers[name] == data[3].numpy()))
        assert row["test_acc"] == pytest.approx(log["test_acc"][-1], abs=0.01)
        agreement = 100 * np.mean(answers[name] == answers["teacher"])
        assert row["agreement"] == pytest.approx(agreement, abs=0.01)
        assert f" {row['test_acc']:.2f} | {row['test_acc_last5']:.2f} |" in table
    rights = {name: (answer == data[3].numpy()) * 100.0 for name, answer in answers.items()}
    gain = rights["dist_student"] - rights["control"]
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    words = f"{gain.mean():+.2f} ± {error:.2f}"
    if abs(gain.mean()) < 1.96 * error:
        words = f"no difference seen ({words})"
    assert f"dist_student - control: {words} after" in table


def test_each_file_says_how_it_was_made(finished):
    made = {name: read_pt(finished, name)["made_with"] for name in NAMES}
    assert made == json.loads((finished / "summary.json").read_text())["made_with"]
    for name in ("teacher", "student"):
        assert made[name]["lr"] == 0.003 and made[name]["weight_decay"] == 0
        assert "alpha" not in made[name]
    distilled, control = made["dist_student"], made["control"]
    assert (distilled["alpha"], distilled["temperature"]) == (0.5, 5)
    same = ("lr", "momentum", "weight_decay", "batch_size", "seed", "images", "student")
    assert all(distilled[key] == control[key] for key in same)
    assert control["epochs"] == EPOCHS and "alpha" not in control
    assert not read_pt(finished, "control").get("optimizer")


@pytest.mark.usefixtures("quick_pictures")
def test_evaluate_names_limit_and_holdout_and_needs_no_other_option(data_dir, tmp_path):
    options = ["--limit", 3, "--holdout", 100]
    for stage in NAMES:
        run(data_dir, tmp_path, stage, "--epochs", 1, "--seed", 3, "--recipe", "strong", *options)
    run(data_dir, tmp_path, "evaluate", *options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["limit"], summary["holdout"]) == (3, 100)
    assert summary["made_with"]["control"]["seed"] == 3
    table = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "--limit 3" in table and "--holdout 100" in table


# --- files: resume, kills, refusals ---------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def refused(data_dir, folder, stage, *options):
    """The line that a refused command shows. It has changed no byte of the folder."""
    before = contents(folder)
    with pytest.raises(SystemExit) as error:
        run(data_dir, folder, stage, *options)
    assert contents(folder) == before
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


@pytest.mark.usefixtures("quick_pictures")
def test_a_second_all_is_refused_and_resume_trains_nothing(copy, data_dir, capsys, monkeypatch):
    assert "--resume" in refused(data_dir, copy, "all", *OPTIONS)
    before = contents(copy)
    monkeypatch.setattr(kd, "train_epoch", None)
    run(data_dir, copy, "all", "--resume", *OPTIONS)
    out = capsys.readouterr().out
    for name in NAMES:
        assert re.search(rf"{name}: finished on \d{{4}}-\d\d-\d\d, kept; .*{name}\.pt", out)
        assert contents(copy)[f"{name}.pt"] == before[f"{name}.pt"]


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.usefixtures("quick_pictures")
def test_after_a_kill_between_any_two_writes_resume_ends_the_same(data_dir, tmp_path, monkeypatch):
    options = ["--limit", 20, "--epochs", 4, "--patience", 2, "--min-delta", 1e9]  # stops after 3
    whole = tmp_path / "whole"
    run(data_dir, whole, "student", *options)
    assert len(read_pt(whole, "student")["log"]) == 3
    owners = {"save": torch, "replace": Path, "savetxt": np, "savefig": Figure}
    writes = []

    def before_each_write(owner, name):
        write = getattr(owner, name)

        def counted(*args, **kwargs):
            writes.append(name)
            if len(writes) == deadly:
                raise Killed
            return write(*args, **kwargs)

        return counted

    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, before_each_write(owner, name))
    deadly = None
    run(data_dir, tmp_path / "counted", "student", *options)
    total = len(writes)
    assert set(writes) == set(owners) and total == 8
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        writes.clear()
        deadly = number
        with pytest.raises(Killed):
            run(data_dir, folder, "student", *options)
        deadly = None
        run(data_dir, folder, "student", "--resume", *options)
        assert same_weights(folder, whole, "student")
        assert (folder / "student_train_logs.png").exists()
        losses = [row["train_loss"] for row in read_pt(folder, "student")["log"]]
        assert losses == [row["train_loss"] for row in read_pt(whole, "student")["log"]]


def test_ctrl_c_is_one_line_and_unfinished_files_are_guarded(data_dir, copy, monkeypatch, capsys):
    test, calls = kd.test, []

    def stop_in_second_epoch(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return test(*args)

    for name in ("dist_student", "control"):
        (copy / f"{name}.pt").unlink()
    monkeypatch.setattr(kd, "test", stop_in_second_epoch)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(data_dir, copy, "dist_student", *OPTIONS)
    assert error.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--resume" in lines[0]
    assert "--resume" in refused(data_dir, copy, "dist_student", *OPTIONS)
    assert "not finished" in refused(data_dir, copy, "control", *OPTIONS)
    wrong = [*OPTIONS, "--temperature", 3]
    message = refused(data_dir, copy, "dist_student", "--resume", *wrong)
    assert "temperature 5.0, not 3.0" in message


def resave(path, **changes):
    run = torch.load(path, weights_only=True)
    run["made_with"].update(changes)
    torch.save(run, path)


def nudge(path):
    run = torch.load(path, weights_only=True)
    run["model"]["skip.bias"] += 1e-6
    torch.save(run, path)


DAMAGE = {  # what is wrong with the folder f: how it comes about, words of the line
    "no teacher": (lambda f: (f / "teacher.pt").unlink(), "--stage teacher"),
    "half a file": (lambda f: (f / "student.pt").write_bytes(b"PK"), "student.pt is damaged"),
    "empty": (lambda f: (f / "student.pt").write_bytes(b""), "student.pt is damaged"),
    "code": (lambda f: (f / "student.pt").write_bytes(pickle.dumps(print, 2)), "student.pt"),
    "foreign": (lambda f: torch.save([1], f / "control.pt"), "control.pt is damaged"),
    "other shape": (lambda f: shutil.copy(f / "teacher.pt", f / "student.pt"), "student.pt"),
    "other name": (lambda f: shutil.copy(f / "control.pt", f / "student.pt"), "network control"),
    "other images": (lambda f: resave(f / "control.pt", images="0"), "--data-dir, --limit"),
    "other weights": (lambda f: nudge(f / "teacher.pt"), "dist_student.pt builds on another"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage", ["evaluate", "all"])
def test_what_does_not_belong_together_is_refused(damage, stage, copy, data_dir):
    break_it, words = DAMAGE[damage]
    break_it(copy)
    if stage == "all" and damage == "no teacher":
        words = "dist_student.pt builds on teacher, which is to be trained: delete "
    assert words in refused(data_dir, copy, stage, "--resume", *OPTIONS)


@pytest.mark.parametrize(
    "option, words",
    [
        ("--lr=0.1", "teacher.pt was made with lr 0.003, not 0.1"),
        ("--seed=3", "teacher.pt was made with seed 0, not 3"),
        ("--temperature=3", "dist_student.pt was made with temperature 5.0, not 3.0"),
        ("--limit=100", "--limit"),
        ("--holdout=160", "160 training images"),
    ],
)
def test_other_options_are_refused_before_anything_is_trained(option, words, copy, data_dir):
    (copy / "control.pt").unlink()
    assert words in refused(data_dir, copy, "all", "--resume", *OPTIONS, option)


def test_what_a_new_training_would_outdate_is_refused_first(copy, data_dir):
    (copy / "dist_student.pt").unlink()
    words = "control.pt builds on dist_student, which is to be trained: delete "
    for stage in ("all", "dist_student"):
        assert words in refused(data_dir, copy, stage, "--resume", *OPTIONS)


IMPOSSIBLE = """temperature=0 temperature=nan temperature=inf alpha=-0.1 alpha=1.1 alpha=nan
epochs=0 epochs=1.5 batch-size=0 lr=0 lr=inf lr=two momentum=1 momentum=nan weight-decay=-1 warmup=1
rotation=inf shear=nan shift=-1 flip=2 cutout=-1 patience=0 min-delta=-1 seed=-1 holdout=0 limit=0
limit=-1 device=tpu recipe=x unknown=1 stage=x recipe=strong,min-delta=5 warmup=0.2"""


@pytest.mark.parametrize("options", IMPOSSIBLE.split())
def test_impossible_options_are_usage_errors(options, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [f"--{option}" for option in options.split(",")]
    with pytest.raises(SystemExit) as error:
        kd.main(["--stage", "all", *options])
    assert error.value.code == 2
    name = options[-1][2:].partition("=")[0]
    assert re.search(f"error: .*{name.replace('-', '.')}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


IMAGES = {  # what is wrong with the data d: how it comes about, words of the line
    "a class less": (lambda d: shutil.rmtree(d / "test" / "bird"), "and no others"),
    "a class more": (lambda d: shutil.copytree(d / "test/cat", d / "test/lion"), "and no others"),
    "no test images": (lambda d: shutil.rmtree(d / "test"), "no CIFAR-10 test images"),
    "a large image": (lambda d: Image.new("RGB", (64, 48)).save(d / "train/cat/0.png"), "64×48"),
    "half an image": (lambda d: (d / "train/cat/3.png").write_bytes(b"\x89PNG"), "cat/3.png"),
}


@pytest.mark.parametrize("damage", IMAGES)
def test_bad_images_are_named(damage, data_dir, tmp_path):
    root = shutil.copytree(data_dir, tmp_path / "data")
    break_it, words = IMAGES[damage]
    break_it(root)
    assert words in refused(root, tmp_path / "results", "student")


def test_missing_data_diverging_loss_and_bad_folder(data_dir, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    assert "no network" in refused(tmp_path / "none", tmp_path / "a", "student")
    assert "smaller --lr" in refused(data_dir, tmp_path / "b", "student", "--lr", 1e9)
    (tmp_path / "file").touch()
    assert "--results-dir" in refused(data_dir, tmp_path / "file", "student")
    assert "--results-dir" in refused(data_dir, tmp_path / "file" / "c", "student")
