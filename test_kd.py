"""Tests of kd.py, offline: against torchvision, float64 arithmetic and hand-made cases. First what
teaches: networks, data, loss, training. Then what protects: files, refusals, kills."""

import dataclasses
import hashlib
import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchsummary
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TVF

import kd

NAMES = ["teacher", "student", "dist_student", "control"]
EPOCHS = 5
OPTIONS = ["--epochs", EPOCHS, "--batch-size", 16, "--lr", 0.003]


@pytest.fixture(autouse=True, scope="module")
def float32():
    """On every CPU, to compare results closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "bf16_is_faster", lambda device: False)
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A learnable set: in each class a square of its colour, somewhere on dark noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, n in (("train", 16), ("test", 8)):
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


@pytest.fixture(scope="module")
def data(data_dir):
    return kd.load_cifar10(data_dir)


def run(data_dir, folder, stage, *options):
    options = ["--stage", stage, "--data-dir", data_dir, "--results-dir", folder, *options]
    kd.main([str(option) for option in options] + ["--device", "cpu"])


@pytest.fixture(scope="module")
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


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, reported", [(kd.TeacherModel, 729_712), (kd.StudentModel, 230_192)])
def test_layers_and_parameters_are_the_assignment_s(kind, reported, capsys):
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    out = capsys.readouterr().out
    assert f"Total params: {reported:,}\n" in out
    convolution = ["Conv2d", "ReLU", "BatchNorm2d"]
    pooling = ["MaxPool2d", "Conv2d"]
    expected = convolution + 4 * ["Conv2d"]  # the stem, then four times `skip`
    for depth in (3, 4, 4):
        expected += depth * convolution + pooling
    expected += 2 * ["Conv2d", "ReLU", "Conv2d", "ReLU", "BatchNorm2d"]
    expected += ["AvgPool2d", "Conv2d", "Flatten"]
    assert re.findall(r"(\w+)-\d+ ", out) == expected


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
    """60 images without black, and what becomes of them. The labels tell the order."""
    images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8)
    settings = dataclasses.replace(STILL, **changes)
    inputs, order = next(kd.training_batches(images, torch.arange(60), settings, 0, 1))
    return images[order], inputs


def test_an_epoch_shows_every_image_once_with_its_label(data):
    batches = list(kd.training_batches(data[0], data[1], STILL, 0, 1))
    inputs = torch.cat([inputs for inputs, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert by_label(inputs, labels) == by_label(kd.normalise(data[0]), data[1])
    assert not torch.equal(labels, data[1])


def test_flip_and_shift_follow_the_settings():
    images, inputs = augmented(flip=1.0)
    assert torch.equal(inputs, kd.normalise(images.flip(-1)))
    images, inputs = augmented(shift=1)
    padded = F.pad(images, (1, 1, 1, 1))
    places = set()
    for i in range(60):
        for top in range(3):
            for left in range(3):
                crop = padded[i : i + 1, :, top : top + 32, left : left + 32]
                if torch.equal(inputs[i : i + 1], kd.normalise(crop)):
                    places.add((top, left))
    assert len(places) == 9


@pytest.mark.parametrize("name", ["rotation", "shear"])
def test_rotation_and_shear_go_as_far_as_the_settings_say(name):
    """10 degrees, either way, move the middle of an edge by up to 15.5 · tan 10° = 2.7 pixels."""
    columns = torch.arange(32).expand(32, 32)
    image = torch.stack([columns, columns.T, columns]).to(torch.uint8) + 100
    settings = dataclasses.replace(STILL, batch_size=1000, **{name: 10.0})
    images = image.expand(1000, 3, 32, 32)
    inputs, _ = next(kd.training_batches(images, torch.zeros(1000), settings, 0, 1))
    upper_edge = (inputs[:, 0, 0, 16] * 0.2470 + 0.4914) * 255 - 116  # from how far right?
    left_edge = (inputs[:, 1, 16, 0] * 0.2435 + 0.4822) * 255 - 116  # from how far below?
    everywhere = {-3, -2, -1, 0, 1, 2, 3}
    assert set(upper_edge.round().tolist()) == everywhere
    assert set(left_edge.round().tolist()) == (everywhere if name == "rotation" else {0})


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
    with pytest.raises(SystemExit, match="160 training images"):
        kd.hold_out(data, 160)


# --- the loss -------------------------------------------------------------------------------------


def random_logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, 6, 10, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(0, 10, (6,), generator=generator)


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


def test_loss_is_finite_at_extreme_logits():
    student = torch.full((4, 10), -200.0).fill_diagonal_(200).requires_grad_()
    teacher = student.detach().flip(1).requires_grad_()
    loss = kd.distillation_loss(student, teacher, torch.tensor([9, 8, 7, 6]), 1, 0.5)
    loss.backward()
    assert loss.isfinite() and loss > 100 and student.grad.isfinite().all()
    assert teacher.grad is None


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


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("clip, warmup", [(0, 0), (0.1, 0.5)])
def test_second_trainings_are_what_a_plain_loop_computes(clip, warmup, copy, data_dir, data):
    """Two epochs of two steps on the same images for both, with the teacher in eval mode; the loss,
    SGD, weight decay, clipping and the learning rate are written out."""
    options = ["--epochs", 2, "--batch-size", 80, "--lr", 0.01, "--min-delta", 0]
    options += ["--grad-clip", clip, "--warmup", warmup]
    teacher = read_network(copy, "teacher").eval()
    start = flat(read_network(copy, "student").parameters())
    (copy / "dist_student.pt").unlink()
    (copy / "control.pt").unlink()
    for name, alpha in (("dist_student", 0.5), ("control", 1)):
        run(data_dir, copy, name, *options)
        student = read_network(copy, "student").train()
        velocities = [0 for _ in student.parameters()]
        factors = iter([0, 1 / 2, 1, 1 / 2] if warmup else [1, 1, 1, 1])
        for epoch, row in enumerate(read_pt(copy, name)["log"], start=1):
            losses = []
            correct = 0
            batches = kd.training_batches(data[0], data[1], kd.Settings(batch_size=80), 0, epoch)
            for inputs, labels in batches:
                logits = student(inputs)
                with torch.no_grad():
                    soft = teacher(inputs)
                losses.append(by_hand(logits.double(), soft.double(), labels, 5, alpha))
                correct += (logits.argmax(1) == labels).sum().item()
                kl = F.kl_div((logits / 5).log_softmax(1), (soft / 5).softmax(1), reduction="sum")
                loss = alpha * F.cross_entropy(logits, labels) + (1 - alpha) * 25 * kl / len(labels)
                weights = list(student.parameters())
                gradients = torch.autograd.grad(loss, weights)
                length = flat(gradients).norm().item()
                scale = min(1, clip / length) if clip else 1
                lr = 0.01 * next(factors)
                with torch.no_grad():
                    for i, weight in enumerate(weights):
                        gradient = scale * gradients[i] + 5e-4 * weight
                        velocities[i] = 0.9 * velocities[i] + gradient
                        weight -= lr * velocities[i]
            assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
            assert row["train_acc"] == pytest.approx(100 * correct / 160, abs=1)
        assert next(factors, None) is None
        trained = flat(read_network(copy, name).parameters())
        expected = flat(student.parameters())
        assert (trained - expected).norm() < 0.01 * (expected - start).norm()


@pytest.mark.usefixtures("quick_pictures")
def test_control_runs_as_many_epochs_as_dist_student(copy, data_dir):
    """Even if its own loss would stop it earlier."""
    options = ["--epochs", 5, "--batch-size", 160]
    options += ["--patience", 1, "--min-delta", 1e9]  # stops after two epochs
    (copy / "dist_student.pt").unlink()
    (copy / "control.pt").unlink()
    run(data_dir, copy, "dist_student", *options)
    distilled = read_pt(copy, "dist_student")
    assert len(distilled["log"]) == 2
    distilled["log"].append(distilled["log"][-1])
    torch.save(distilled, copy / "dist_student.pt")
    run(data_dir, copy, "control", *options)
    assert len(read_pt(copy, "control")["log"]) == 3


def test_no_step_reads_from_the_device_and_bf16_is_used(monkeypatch, data):
    """Reading a number (`aten::_local_scalar_dense`) would make the CPU wait for a GPU."""
    reads = []
    dtypes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "_local_scalar_dense" in str(function):
                reads.append(function)
            if "aten.convolution." in str(function):
                dtypes.add(result.dtype)
            return result

    monkeypatch.setattr(kd, "bf16_is_faster", lambda device: True)
    settings = kd.Settings(batch_size=5, cutout=8, grad_clip=1)
    counts = []
    for n in (10, 20):  # two steps, four steps
        student = kd.StudentModel()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        small = kd.Data(*[tensor[:n] for tensor in data])
        reads.clear()
        with Watch():
            kd.train_epoch(student, settings, small, kd.TeacherModel(), optimizer, 0, 1)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0  # those at the end of the epoch
    assert dtypes == {torch.bfloat16}


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
        decay = 5e-4 if name in ("dist_student", "control") else 0
        assert summary["made_with"][name]["weight_decay"] == decay
    rights = {name: (answer == data[3].numpy()) * 100.0 for name, answer in answers.items()}
    gain = rights["dist_student"] - rights["control"]
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    verdict = summary["verdict"][0]
    assert "dist_student - control: " in verdict and verdict in table
    assert f"{gain.mean():+.2f} ± {error:.2f}" in verdict
    assert ("no difference seen" in verdict) == (abs(gain.mean()) <= 1.96 * error)


@pytest.mark.usefixtures("quick_pictures")
def test_evaluate_names_limit_and_holdout_and_needs_no_other_option(data_dir, tmp_path):
    options = ["--limit", 3, "--holdout", 100]
    for stage in NAMES:
        run(data_dir, tmp_path, stage, "--epochs", 1, "--seed", 3, "--recipe", "strong", *options)
    (tmp_path / "student_train_logs.csv").unlink()
    run(data_dir, tmp_path, "evaluate", *options)
    assert (tmp_path / "student_train_logs.csv").exists()  # made from student.pt
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
def test_a_second_all_is_refused_and_resume_trains_nothing(copy, data_dir, capsys):
    assert "--resume" in refused(data_dir, copy, "all", *OPTIONS)
    before = contents(copy)
    run(data_dir, copy, "all", "--resume", *OPTIONS)
    out = capsys.readouterr().out
    for name in NAMES:
        assert re.search(rf"{name}: finished on \d{{4}}-\d\d-\d\d, kept; .*{name}\.pt", out)
        assert contents(copy)[f"{name}.pt"] == before[f"{name}.pt"]


def interrupt_save(monkeypatch, number, error):
    """The torch.save of this number writes half a file and raises `error`."""
    save = torch.save
    paths = []

    def interrupted(content, path):
        save(content, path)
        paths.append(path)
        if len(paths) == number:
            path.write_bytes(path.read_bytes()[:100_000])
            raise error

    monkeypatch.setattr(torch, "save", interrupted)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("killed_in", [1, 2, 3, "savefig"])
def test_after_a_kill_resume_ends_the_same(killed_in, data_dir, tmp_path):
    def savefig(figure, path):
        raise Killed

    options = ["--limit", 20, "--epochs", 4, "--patience", 2, "--min-delta", 1e9]  # stops after 3
    folder = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        if killed_in == "savefig":
            patch.setattr(Figure, "savefig", savefig)
        else:
            interrupt_save(patch, killed_in, Killed)
        with pytest.raises(Killed):
            run(data_dir, folder, "student", *options)
    run(data_dir, folder, "student", "--resume", *options)
    whole = tmp_path / "whole"
    run(data_dir, whole, "student", *options)
    ours, theirs = read_pt(folder, "student"), read_pt(whole, "student")
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    losses = [row["train_loss"] for row in ours["log"]]
    assert len(losses) == 3 and losses == [row["train_loss"] for row in theirs["log"]]
    assert (folder / "student_train_logs.png").exists()


def test_ctrl_c_is_one_line_and_unfinished_files_are_guarded(data_dir, copy, monkeypatch, capsys):
    for name in ("dist_student", "control"):
        (copy / f"{name}.pt").unlink()
    interrupt_save(monkeypatch, 2, KeyboardInterrupt)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(data_dir, copy, "dist_student", *OPTIONS)
    assert error.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--resume" in lines[0]
    assert "not finished" in refused(data_dir, copy, "control", *OPTIONS)
    message = refused(data_dir, copy, "dist_student", "--resume", *OPTIONS, "--temperature", 3)
    assert "temperature 5.0, not 3.0" in message


class Code:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_damaged_and_foreign_files_are_refused(copy, data_dir):
    path = copy / "student.pt"
    path.write_bytes(b"PK")
    assert "student.pt is damaged" in refused(data_dir, copy, "evaluate")
    torch.save(Code(copy / "created"), path)
    assert "student.pt is damaged" in refused(data_dir, copy, "evaluate")
    shutil.copy(copy / "teacher.pt", path)  # other shapes
    assert "student.pt" in refused(data_dir, copy, "evaluate")
    shutil.copy(copy / "control.pt", path)
    assert "student.pt was made with network control" in refused(data_dir, copy, "evaluate")


def test_files_that_do_not_belong_together_are_refused(copy, data_dir):
    control = read_pt(copy, "control")
    control["made_with"]["images"] = "0"
    torch.save(control, copy / "control.pt")
    assert "--data-dir, --limit" in refused(data_dir, copy, "evaluate")
    teacher = read_pt(copy, "teacher")
    teacher["model"]["skip.bias"] += 1e-6
    torch.save(teacher, copy / "teacher.pt")
    words = "dist_student.pt builds on another teacher.pt: delete "
    assert words in refused(data_dir, copy, "evaluate")
    (copy / "teacher.pt").unlink()
    message = refused(data_dir, copy, "evaluate")
    assert "--stage teacher" in message and "delete" not in message


@pytest.mark.parametrize(
    "option, words",
    [
        ("--seed=3", "teacher.pt was made with seed 0, not 3"),
        ("--temperature=3", "dist_student.pt was made with temperature 5.0, not 3.0"),
        ("--limit=100", "--limit"),
        ("--holdout=40", "--holdout"),
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


IMPOSSIBLE = """temperature=0 alpha=1.1 alpha=nan lr=0 lr=inf epochs=0 batch-size=0 momentum=1
warmup=1 flip=2 shift=-1 patience=0 limit=0 recipe=strong,min-delta=5 warmup=0.2"""


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


def test_bad_images_are_named(data_dir, tmp_path):
    root = shutil.copytree(data_dir, tmp_path / "data")

    def message():
        return refused(root, tmp_path / "results", "student")

    shutil.copytree(root / "test/cat", root / "test/lion")
    assert "and no others" in message()
    shutil.rmtree(root / "test")
    assert "no CIFAR-10 test images" in message()
    Image.new("RGB", (64, 48)).save(root / "train/cat/0.png")
    assert "64×48" in message()
    (root / "train/airplane/3.png").write_bytes(b"\x89PNG")
    assert re.search(r"airplane.3\.png", message())


def test_missing_data_diverging_loss_and_bad_folder(data_dir, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    assert "no network" in refused(tmp_path / "none", tmp_path / "a", "student")
    assert "smaller --lr" in refused(data_dir, tmp_path / "b", "student", "--lr", 1e9)
    (tmp_path / "file").touch()
    assert "--results-dir" in refused(data_dir, tmp_path / "file", "student")
    assert "--results-dir" in refused(data_dir, tmp_path / "file" / "c", "student")
