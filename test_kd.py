"""Tests of kd.py, offline: against torchvision, float64 arithmetic and hand-made cases. First the
experiment: networks, data, loss, training. Then files: resuming, interruptions, refusals."""

import dataclasses
import json
import math
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TVF

import kd

NAMES = ["teacher", "student", "dist_student", "control"]
EPOCHS = 6
OPTIONS = ["--epochs", EPOCHS, "--batch-size", 16, "--lr", 0.003]
kd.bf16_is_faster = lambda device: False  # float32 on every CPU, to compare results closely


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
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: path.touch())


def read_pt(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def read_network(folder, name):
    network = kd.StudentModel()
    if name == "teacher":
        network = kd.TeacherModel()
    network.load_state_dict(read_pt(folder, name)["model"])
    return network


@torch.no_grad()
def logits_of(folder, name, data):
    return read_network(folder, name).eval()(kd.normalise(data[2]))


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, reported", [(kd.TeacherModel, 729_712), (kd.StudentModel, 230_192)])
def test_layers_and_parameters_are_the_assignment_s(kind, reported, capsys):
    network = kd.new_network(kind, kd.parse_args(["--stage", "all", "--device", "cpu"]))
    out = capsys.readouterr().out  # torchsummary's table
    assert f"Total params: {reported:,}\n" in out
    convolution = ["Conv2d", "ReLU", "BatchNorm2d"]
    pooling = ["MaxPool2d", "Conv2d"]
    expected = convolution + 4 * ["Conv2d"]  # the stem, then four times `skip`
    for depth in (3, 4, 4):
        expected += depth * convolution + pooling
    expected += 2 * ["Conv2d", "ReLU", "Conv2d", "ReLU", "BatchNorm2d"]
    expected += ["AvgPool2d", "Conv2d", "Flatten"]
    assert re.findall(r"(\w+)-\d+ ", out) == expected
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(weight.grad.any() for weight in network.parameters())  # each has an effect


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
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [("train", None)])  # None: no checksum
    monkeypatch.setattr(cifar, "test_list", [("test", None)])
    monkeypatch.setattr(cifar, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    order = torch.randperm(160)
    train_images = data[0][order].reshape(160, 3072).numpy()
    test_images = data[2].reshape(80, 3072).numpy()
    files = {
        "train": {"data": train_images, "labels": data[1][order].tolist()},
        "test": {"data": test_images, "labels": data[3].tolist()},
        "meta": {"label_names": kd.CLASSES},
    }
    (tmp_path / cifar.base_folder).mkdir()
    for name, content in files.items():
        (tmp_path / cifar.base_folder / name).write_bytes(pickle.dumps(content))
    for ours, theirs in zip(kd.load_cifar10(tmp_path), data, strict=True):
        assert torch.equal(ours, theirs)


def test_affine_equals_torchvision_pixel_for_pixel():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8, generator=generator)
    changes = torch.zeros(5, 600)  # angle, shear, shifts in x and y, mirror
    changes[4] = 1
    changes[:2, :400] = torch.rand(2, 400, generator=generator) * 20 - 10
    extremes = [(10, 10), (-10, 10), (90, 0), (-90, 0), (180, 0), (30, 40), (170, -60), (0, 0)]
    changes[:2, :8] = torch.tensor(extremes).T
    changes[2:4, 400:] = torch.randint(-5, 6, (2, 200), generator=generator)
    changes[4, ::2] = -1
    theirs = []
    for image, (angle, shear, dx, dy, mirror) in zip(images, changes.T.tolist(), strict=True):
        if mirror < 0:
            image = TVF.hflip(image)
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
    """60 images without black pixels, in the order of the batch, and the inputs made from them."""
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
    images, inputs = augmented(flip=0.5)
    kept = (inputs == kd.normalise(images)).flatten(1).all(dim=1)
    mirrored = (inputs == kd.normalise(images.flip(-1))).flatten(1).all(dim=1)
    assert (kept ^ mirrored).all() and 10 < mirrored.sum() < 50
    images, inputs = augmented(shift=1)
    padded = F.pad(images, (1, 1, 1, 1))
    places = []
    for i in range(60):
        for top in range(3):
            for left in range(3):
                crop = padded[i : i + 1, :, top : top + 32, left : left + 32]
                if torch.equal(inputs[i : i + 1], kd.normalise(crop)):
                    places.append((top, left))
    assert len(places) == 60 and len(set(places)) == 9


EVERYWHERE = {-3, -2, -1, 0, 1, 2, 3}


@pytest.mark.parametrize("name, vertical", [("rotation", EVERYWHERE), ("shear", {0})])
def test_rotation_and_shear_go_as_far_as_the_settings_say(name, vertical):
    """10 degrees, either way, move the middle of an edge by up to 15.5 · tan 10° = 2.7 pixels."""
    columns = torch.arange(32).expand(32, 32)
    # Red tells from which column a pixel comes, green from which row.
    image = torch.stack([columns, columns.T, columns]).to(torch.uint8) + 100
    settings = dataclasses.replace(STILL, batch_size=1000, **{name: 10.0})
    images = image.expand(1000, 3, 32, 32)
    inputs, _ = next(kd.training_batches(images, torch.zeros(1000), settings, 0, 1))
    upper_edge = (inputs[:, 0, 0, 16] * 0.2470 + 0.4914) * 255 - 116  # 0: from its own column
    left_edge = (inputs[:, 1, 16, 0] * 0.2435 + 0.4822) * 255 - 116  # 0: from its own row
    assert set(upper_edge.round().tolist()) == EVERYWHERE
    assert set(left_edge.round().tolist()) == vertical


def test_cutout_removes_one_square_from_each_image():
    images, inputs = augmented(cutout=12)
    lost = inputs != kd.normalise(images)
    assert (inputs[lost] == 0).all()
    sizes = set()
    for mask in lost.any(dim=1):
        rows = mask.any(dim=1).sum().item()
        columns = mask.any(dim=0).sum().item()
        assert mask.sum() == rows * columns
        assert 6 <= rows <= 12 and 6 <= columns <= 12
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
    images = torch.cat([held[0], held[2]])
    labels = torch.cat([held[1], held[3]])
    assert by_label(images, labels) == by_label(data[0], data[1])
    assert len(data[1][:60].unique()) == len(data[3][:60].unique()) == 10
    with pytest.raises(SystemExit, match="160 training images"):
        kd.hold_out(data, 160)


# --- the loss -------------------------------------------------------------------------------------


def softmax(logits, t):
    powers = (logits.double() / t).exp()
    return powers / powers.sum(dim=1, keepdim=True)


def by_hand(student, teacher, labels, t, alpha):
    """The formula, written out in float64."""
    hard = -softmax(student, 1)[range(len(labels)), labels].log()
    p = softmax(teacher, t)
    q = softmax(student, t)
    soft = (p * (p.log() - q.log())).sum(dim=1)
    return (alpha * hard + (1 - alpha) * t * t * soft).mean()


@pytest.mark.parametrize("t", [1, 2.5, 5, 20])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_equals_float64_arithmetic(t, alpha, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(2, 6, 10, generator=generator)).to(dtype)
    labels = torch.randint(0, 10, (6,), generator=generator)
    loss = kd.distillation_loss(student, teacher, labels, t, alpha)
    expected = by_hand(student, teacher, labels, t, alpha)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-5)


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
        ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18, 1.17], 8),  # a large one starts the count anew
        ([1.0, 1.0, 1.0, 1.0], 4),
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


def train_by_hand(student, teacher, alpha, clip, factors, data):
    """Two epochs of two steps: the loss, SGD, weight decay, clipping and the learning rate, 0.01
    times one factor for each step, are written out. Returns each epoch's loss and accuracy."""
    student.train()
    teacher.eval()
    weights = list(student.parameters())
    velocities = [torch.zeros_like(weight) for weight in weights]
    factors = iter(factors)
    log = []
    for epoch in (1, 2):
        losses = []
        correct = 0
        batches = kd.training_batches(data[0], data[1], kd.Settings(batch_size=80), 3, epoch)
        for inputs, labels in batches:
            logits = student(inputs)
            with torch.no_grad():
                soft = teacher(inputs)
            loss = by_hand(logits, soft, labels, 5, alpha)
            losses.append(loss.item())
            correct += (logits.argmax(1) == labels).sum().item()
            gradients = torch.autograd.grad(loss, weights)
            length = math.hypot(*[gradient.norm() for gradient in gradients])
            scale = 1
            if 0 < clip < length:
                scale = clip / length
            lr = 0.01 * next(factors)
            with torch.no_grad():
                for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
                    velocity.copy_(0.9 * velocity + scale * gradient + 5e-4 * weight)
                    weight.sub_(lr * velocity)
        log.append((np.mean(losses), 100 * correct / 160))
    assert next(factors, None) is None
    return log


@pytest.mark.parametrize(
    "clip, warmup, factors", [(0, 0, [1, 1, 1, 1]), (0.1, 0.5, [0, 1 / 2, 1, 1 / 2])]
)
def test_second_trainings_are_what_a_plain_loop_computes(
    clip, warmup, factors, copy, data_dir, data
):
    options = ["--epochs", 2, "--batch-size", 80, "--lr", 0.01, "--min-delta", 0]
    options += ["--grad-clip", clip, "--warmup", warmup, "--seed", 3]
    teacher = read_network(copy, "teacher")
    (copy / "dist_student.pt").unlink()
    (copy / "control.pt").unlink()
    for name, alpha in (("dist_student", 0.5), ("control", 1)):
        run(data_dir, copy, name, *options)
        student = read_network(copy, "student")
        start = parameters_to_vector(student.parameters())
        log = train_by_hand(student, teacher, alpha, clip, factors, data)
        for row, (loss, accuracy) in zip(read_pt(copy, name)["log"], log, strict=True):
            assert row["train_loss"] == pytest.approx(loss, rel=1e-3)
            assert row["train_acc"] == pytest.approx(accuracy, abs=1)
        trained = parameters_to_vector(read_network(copy, name).parameters())
        expected = parameters_to_vector(student.parameters())
        assert (trained - expected).norm() < 0.01 * (expected - start).norm()


@pytest.mark.usefixtures("quick_pictures")
def test_control_runs_as_many_epochs_as_dist_student(copy, data_dir):
    """Not until the last epoch, nor until its own loss would stop it (here after two epochs)."""
    distilled = read_pt(copy, "dist_student")
    distilled["made_with"] |= {"patience": 1, "min_delta": 1e9}
    del distilled["log"][3:]
    torch.save(distilled, copy / "dist_student.pt")
    (copy / "control.pt").unlink()
    run(data_dir, copy, "control", *OPTIONS, "--patience", 1, "--min-delta", 1e9)
    assert len(read_pt(copy, "control")["log"]) == 3


def test_early_stopping_does_not_look_at_the_test_images(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "test", lambda network, data: {"test_loss": 1.0, "test_acc": 50.0})
    options = ["--limit", 20, "--epochs", 4, "--patience", 2, "--min-delta", 1e-6]
    run(data_dir, tmp_path, "student", *options)
    assert len(read_pt(tmp_path, "student")["log"]) == 4  # the training loss still changes


def test_no_step_reads_from_the_device_and_bf16_is_used(monkeypatch, data):
    """Reading a number (`aten::_local_scalar_dense`) would make the CPU wait for a GPU."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(kd, "bf16_is_faster", lambda device: True)
    student = kd.StudentModel()
    teacher = kd.TeacherModel()
    dtypes = set()
    for network in (student, teacher):
        network.register_forward_hook(lambda network, inputs, logits: dtypes.add(logits.dtype))
    settings = kd.Settings(batch_size=2, cutout=8, grad_clip=1)
    small = kd.Data(*[tensor[:8] for tensor in data])  # four steps
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with Record():
        kd.train_epoch(student, settings, small, teacher, optimizer, 0, 1)
    reads = calls.count("aten._local_scalar_dense.default")
    assert 0 < reads < 4  # those at the end of the epoch
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
        logits = logits_of(finished, name, data)
        answers[name] = logits.argmax(1).numpy()
        assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, data[3]).item(), rel=1e-3)
        assert row["test_acc"] == pytest.approx(100 * np.mean(answers[name] == data[3].numpy()))
        assert row["test_acc"] == pytest.approx(log["test_acc"][-1], abs=0.01)
        agreement = 100 * np.mean(answers[name] == answers["teacher"])
        assert row["agreement"] == pytest.approx(agreement, abs=0.01)
        assert f" {row['test_acc']:.2f} | {row['test_acc_last5']:.2f} |" in table
    parameters = {name: row["parameters"] for name, row in summary["rows"].items()}
    assert parameters.pop("teacher") == 722_752 and set(parameters.values()) == {223_232}
    decays = [summary["made_with"][name]["weight_decay"] for name in NAMES]
    assert decays == [0, 0, 5e-4, 5e-4]
    rights = {name: (answer == data[3].numpy()) * 100.0 for name, answer in answers.items()}
    gain = rights["dist_student"] - rights["control"]
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    rows = summary["rows"]
    five = rows["dist_student"]["test_acc_last5"] - rows["control"]["test_acc_last5"]
    verdict = summary["verdict"][0]
    assert "dist_student - control: " in verdict and verdict in table
    assert f"{gain.mean():+.2f} ± {error:.2f}" in verdict
    assert f"{five:+.2f} over the last five" in verdict
    assert "control - student: " in summary["verdict"][1]
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
    teacher = summary["rows"]["teacher"]
    assert teacher["agreement"] == 100 > teacher["test_acc"]  # with itself, not with the labels
    table = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert "--limit 3" in table and "--holdout 100" in table
    torch.manual_seed(3)
    initial = kd.StudentModel().skip.weight  # unchanged: its only step has learning rate 0
    assert torch.equal(read_network(tmp_path, "student").skip.weight, initial)


def test_a_clear_difference_is_called_one_and_changed_answers_are_counted(
    copy, data_dir, data, monkeypatch
):
    control = read_pt(copy, "control")
    for tensor in control["model"].values():
        tensor.zero_()  # gives every image the same answer
    torch.save(control, copy / "control.pt")
    titles = {}

    def read_title(figure, path):
        titles[path.name] = figure.get_suptitle()

    monkeypatch.setattr(Figure, "savefig", read_title)
    run(data_dir, copy, "evaluate")
    assert "no difference seen" not in (copy / "summary.md").read_text(encoding="utf-8")
    before = logits_of(copy, "student", data).argmax(1) == data[3]
    after = logits_of(copy, "dist_student", data).argmax(1) == data[3]
    corrected = (after & ~before).sum()
    lost = (before & ~after).sum()
    assert corrected != lost
    assert f"{corrected} corrected, {lost} lost" in titles["misclassified.png"]


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


def interrupt(patch, owner, name, number):
    """The call of this number writes half a file, then Ctrl-C is pressed."""
    function = getattr(owner, name)
    paths = []

    def interrupted(content, path):
        function(content, path)
        paths.append(path)
        if len(paths) == number:
            path.write_bytes(path.read_bytes()[:100_000])
            raise KeyboardInterrupt

    patch.setattr(owner, name, interrupted)


PLACES = [(torch, "save", 1), (torch, "save", 2), (torch, "save", 3), (Figure, "savefig", 1)]


@pytest.mark.usefixtures("quick_pictures")
@pytest.mark.parametrize("place", PLACES)
def test_after_ctrl_c_resume_ends_the_same(place, data_dir, tmp_path, capsys):
    options = ["--limit", 20, "--epochs", 4, "--patience", 2, "--min-delta", 1e9]  # stops after 3
    folder = tmp_path / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, *place)
        with pytest.raises(SystemExit, match="130"):
            run(data_dir, folder, "student", *options)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--resume" in lines[0]
    run(data_dir, folder, "student", "--resume", *options)
    whole = tmp_path / "whole"
    run(data_dir, whole, "student", *options)
    ours = read_pt(folder, "student")
    theirs = read_pt(whole, "student")
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    losses = [row["train_loss"] for row in ours["log"]]
    assert len(losses) == 3 and losses == [row["train_loss"] for row in theirs["log"]]
    assert (folder / "student_train_logs.png").exists()


def test_an_unfinished_training_is_guarded(copy, data_dir):
    (copy / "control.pt").unlink()
    torch.save(read_pt(copy, "dist_student") | {"finished": False}, copy / "dist_student.pt")
    assert "not finished" in refused(data_dir, copy, "control", *OPTIONS)
    message = refused(data_dir, copy, "dist_student", "--resume", *OPTIONS, "--temperature", 3)
    assert "temperature 5.0, not 3.0" in message


def test_damaged_and_foreign_files_are_refused(copy, data_dir):
    path = copy / "student.pt"
    torch.save(read_pt(copy, "student") | {"more": print}, path)  # a function: code, not data
    assert "student.pt is damaged" in refused(data_dir, copy, "evaluate")
    path.write_bytes(b"PK")
    assert "student.pt is damaged" in refused(data_dir, copy, "evaluate")
    shutil.copy(copy / "teacher.pt", path)  # its layers are wider
    assert "belongs to another network" in refused(data_dir, copy, "evaluate")
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


def test_no_training_while_a_file_builds_on_the_old_network(copy, data_dir):
    (copy / "dist_student.pt").unlink()
    words = "control.pt builds on dist_student, which is to be trained: delete "
    for stage in ("all", "dist_student"):
        assert words in refused(data_dir, copy, stage, "--resume", *OPTIONS)


IMPOSSIBLE = """temperature=0 alpha=1.1 alpha=nan lr=0 lr=inf epochs=0 batch-size=0 momentum=1
warmup=1 warmup=0.2 flip=2 shift=-1 patience=0 limit=0"""


@pytest.mark.parametrize("option", IMPOSSIBLE.split())
def test_impossible_options_are_usage_errors(option, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^2$"):
        kd.main(["--stage", "all", f"--{option}"])
    name = option.partition("=")[0].replace("-", ".")
    assert re.search(f"error: .*{name}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_bad_images_are_named(data_dir, tmp_path):
    root = shutil.copytree(data_dir, tmp_path / "data")
    results = tmp_path / "results"
    shutil.copytree(root / "test/cat", root / "test/lion")
    assert "and no others" in refused(root, results, "student")
    shutil.rmtree(root / "test")
    assert "no CIFAR-10 test images" in refused(root, results, "student")
    Image.new("RGB", (64, 48)).save(root / "train/cat/0.png")
    assert "64×48" in refused(root, results, "student")
    (root / "train/airplane/3.png").write_bytes(b"\x89PNG")
    assert re.search(r"airplane.3\.png", refused(root, results, "student"))


def test_missing_data_a_diverging_loss_and_a_bad_folder_are_one_line(
    data_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///nowhere")
    assert "nowhere" in refused(tmp_path / "none", tmp_path / "a", "student")
    assert "smaller --lr" in refused(data_dir, tmp_path / "b", "student", "--lr", 1e9)
    (tmp_path / "file").touch()
    assert "--results-dir" in refused(data_dir, tmp_path / "file", "student")
    assert "--results-dir" in refused(data_dir, tmp_path / "file" / "c", "student")
