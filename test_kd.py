"""Tests of kd.py, offline: against torchvision, float64 arithmetic and hand-made cases."""

import csv
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
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TVF

import kd

NAMES = ["teacher", "student", "dist_student", "control"]
PER_CLASS = {"train": 16, "test": 8}
EPOCHS = 8
OPTIONS = ["--epochs", EPOCHS, "--batch-size", 32, "--lr", 0.003]


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """On every CPU, to compare results closely."""
    monkeypatch.setattr(kd, "bf16_is_faster", lambda device: False)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def data(data_dir):
    return kd.load_cifar10(data_dir)


def run(data_dir, folder, stage, *options):
    options = ["--stage", stage, "--data-dir", data_dir, "--results-dir", folder, *options]
    return kd.main([str(option) for option in options] + ["--device", "cpu"])


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The results of `--stage all` on the small set."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    patch = pytest.MonkeyPatch()
    patch.setattr(kd, "bf16_is_faster", lambda device: False)
    assert run(data_dir, folder, "all", *OPTIONS) == 0
    patch.undo()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def read_csv(folder, name):
    with open(folder / f"{name}_train_logs.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def refused(capsys, code):
    """The one line on stderr."""
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kd.py: "), lines
    return lines[0]


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, distinct, reported",
    [(kd.TeacherModel, 722_752, 729_712), (kd.StudentModel, 223_232, 230_192)],
)
def test_parameter_counts(kind, distinct, reported, capsys):
    assert sum(p.numel() for p in kind().parameters()) == distinct
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    assert f"Total params: {reported:,}\n" in capsys.readouterr().out


def test_output_is_ten_logits_and_the_skip_path_counts():
    network = kd.StudentModel().eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = network(images)
        network.skip.weight.zero_()
        network.skip.bias.zero_()
        assert logits.shape == (2, 10)
        assert not torch.allclose(logits, network(images))


# --- the data -------------------------------------------------------------------------------------


def test_each_loaded_image_equals_its_file(data_dir, data):
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:])):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        pairs = zip(labels.tolist(), images, strict=True)
        loaded = sorted((label, image.contiguous().numpy().tobytes()) for label, image in pairs)
        files = []
        for label, name in enumerate(kd.CLASSES):
            for path in (data_dir / split / name).iterdir():
                files.append((label, np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()))
        assert loaded == sorted(files)


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
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=generator)
    angles = torch.rand(500, generator=generator) * 20 - 10
    shears = torch.rand(500, generator=generator) * 20 - 10
    extremes = [(0, 0), (10, 10), (-10, 10), (90, 0), (-90, 0), (180, 0), (30, 40), (170, -60)]
    for i, (angle, shear) in enumerate(extremes):
        angles[i] = angle
        shears[i] = shear
    theirs = []
    for image, angle, shear in zip(images, angles.tolist(), shears.tolist(), strict=True):
        nearest = InterpolationMode.NEAREST
        theirs.append(TVF.affine(image, angle, [0, 0], 1.0, [shear, 0.0], nearest, fill=0))
    ours = kd.affine(images, angles, shears)
    assert ours.dtype == torch.float32 and torch.equal(ours, torch.stack(theirs).float())


def test_moves_and_mirrors_equal_torchvision_s():
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    dx = torch.randint(-5, 6, (200,))
    dy = torch.randint(-5, 6, (200,))
    angles = torch.tensor([0.0, 90.0]).repeat(100)
    mirror = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(50)
    theirs = []
    for i, image in enumerate(images):
        image = TVF.hflip(image) if mirror[i] < 0 else image
        move = [int(dx[i]), int(dy[i])]
        theirs.append(TVF.affine(image, angles[i].item(), move, 1.0, [0.0, 0.0]))
    ours = kd.affine(images, angles, torch.zeros(200), dx, dy, mirror)
    assert torch.equal(ours, torch.stack(theirs).float())


def test_normalise_equals_torchvision(data):
    theirs = TVF.normalize(
        data[0][:7].float() / 255, (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    )
    torch.testing.assert_close(kd.normalise(data[0][:7]), theirs)


STILL = kd.Settings(batch_size=50, degrees=0.0, shear=0.0)


def test_an_epoch_shows_every_image_once_with_its_label(data):
    inputs = []
    labels = []
    for batch_inputs, batch_labels in kd.training_batches(data[0], data[1], STILL, 0, 1):
        inputs += [image.contiguous().numpy().tobytes() for image in batch_inputs]
        labels += batch_labels.tolist()
    everything = [image.contiguous().numpy().tobytes() for image in kd.normalise(data[0])]
    shown = sorted(zip(inputs, labels, strict=True))
    assert shown == sorted(zip(everything, data[1].tolist(), strict=True))
    assert labels != data[1].tolist()


def test_augmentation_follows_the_settings():
    images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8)  # 0 comes from outside
    numbers = torch.arange(60)
    settings = dataclasses.replace(STILL, batch_size=60, flip=1.0)
    ((inputs, order),) = kd.training_batches(images, numbers, settings, 0, 1)
    assert torch.equal(inputs, kd.normalise(images.flip(-1)[order].float()))
    settings = dataclasses.replace(STILL, batch_size=60, shift=1)
    ((inputs, order),) = kd.training_batches(images, numbers, settings, 0, 1)
    padded = F.pad(images[order], (1, 1, 1, 1))
    places = set()
    for i in range(60):
        for place in range(9):
            top, left = divmod(place, 3)
            crop = padded[i : i + 1, :, top : top + 32, left : left + 32]
            if torch.equal(inputs[i : i + 1], kd.normalise(crop.float())):
                places.add(place)
    assert len(places) == 9
    settings = dataclasses.replace(STILL, degrees=10.0)
    first, _ = next(kd.training_batches(images, numbers, settings, 0, 1))
    plain, _ = next(kd.training_batches(images, numbers, STILL, 0, 1))
    assert not torch.equal(first, plain)


def test_an_epoch_s_chance_follows_from_seed_and_epoch_alone(data):
    def first(seed, epoch):
        return next(kd.training_batches(data[0], data[1], kd.Settings(), seed, epoch))[0]

    reference = first(0, 3)
    torch.rand(1000)
    assert torch.equal(reference, first(0, 3))
    assert not torch.equal(reference, first(0, 4)) and not torch.equal(reference, first(1, 3))


def test_holdout_and_limit_take_training_images_once(data):
    def keys(images):
        return {image.contiguous().numpy().tobytes() for image in images}

    held = kd.choose_images(data, holdout=40, limit=0)
    assert (len(held[0]), len(held[2])) == (120, 40)
    assert keys(held[0]) | keys(held[2]) == keys(data[0])
    limited = kd.choose_images(data, holdout=0, limit=50)
    assert (len(limited[1]), len(limited[3])) == (50, 50)
    assert keys(limited[0]) <= keys(data[0]) and keys(limited[2]) <= keys(data[2])
    assert len(limited[1].unique()) == len(limited[3].unique()) == 10  # the classes are mixed


# --- the loss -------------------------------------------------------------------------------------


def random_logits(n=6):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, n, 10, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(0, 10, (n,), generator=generator)


def softmax(logits, t):
    powers = [math.exp(logit / t) for logit in logits]
    return [power / sum(powers) for power in powers]


def by_hand(student, teacher, targets, t, alpha):
    """The formula in Python floats, image by image and class by class."""
    total = 0.0
    for z, v, target in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        hard = -math.log(softmax(z, 1)[target])
        soft = 0.0
        for p, q in zip(softmax(v, t), softmax(z, t), strict=True):
            soft += p * (math.log(p) - math.log(q))
        total += alpha * hard + (1 - alpha) * t * t * soft
    return total / len(student)


@pytest.mark.parametrize("t", [1, 2.5, 5, 20])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_equals_float64_arithmetic(t, alpha, dtype):
    student, teacher, targets = random_logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss = kd.distillation_loss(student, teacher, targets, t, alpha)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(student, teacher, targets, t, alpha), rel=2e-5)


@pytest.mark.parametrize("t", [1.0, 5.0])
def test_soft_loss_s_gradient(t):
    student, teacher, targets = random_logits()
    z, v = student.float().requires_grad_(), teacher.float().requires_grad_()
    kd.distillation_loss(z, v, targets, t, 0).backward()
    expected = t * ((student / t).softmax(1) - (teacher / t).softmax(1)) / len(student)
    torch.testing.assert_close(z.grad, expected.float(), atol=1e-6, rtol=1e-4)
    assert v.grad is None


def test_soft_loss_vanishes_for_equal_logits_only():
    student, teacher, targets = random_logits()
    assert abs(kd.distillation_loss(teacher, teacher, targets, 5, 0).item()) < 1e-5
    assert kd.distillation_loss(student, teacher, targets, 5, 0).item() > 0.1


def test_loss_is_finite_at_extreme_logits():
    student = torch.full((4, 10), -200.0).fill_diagonal_(200).requires_grad_()
    teacher = student.detach().flip(1)
    loss = kd.distillation_loss(student, teacher, torch.tensor([9, 8, 7, 6]), 1, 0.5)
    loss.backward()
    assert loss.isfinite() and loss > 100 and student.grad.isfinite().all()


def test_worked_example_in_the_loss_s_docstring():
    for t in (1, 5):
        pattern = rf"T = {t} +cat ([\d.]+) +dog ([\d.]+) +truck ([\d.]+)"
        row = re.search(pattern, kd.distillation_loss.__doc__).groups()
        assert [float(p) for p in row] == pytest.approx(softmax((8, 5, 0), t), abs=0.0006)


# --- early stopping and training ------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses, stops_at",
    [
        ([2.0, 1.5, 1.49, 1.48, 1.47], 5),  # three small changes in a row
        ([2.0, 1.5, 1.51, 1.50, 1.51], 5),  # small rises count, too
        ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18], None),  # a large one starts the count anew
        ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18, 1.17], 8),
        ([0.0], None),
    ],
)
def test_early_stopping(losses, stops_at):
    stopping = kd.EarlyStopping(patience=3, min_delta=0.02)
    stopped = [epoch for epoch, loss in enumerate(losses, start=1) if stopping(loss)]
    assert stopped[:1] == [stops_at][: len(stopped)] and bool(stopped) == bool(stops_at)
    never = kd.EarlyStopping(patience=None, min_delta=0.02)
    assert not any(never(loss) for loss in losses)


def test_learning_rate_rises_and_falls():
    settings = kd.Settings(lr=0.4, warmup=0.2, decay=0.4)
    for progress, part in ((0, 0), (0.1, 0.5), (0.2, 1), (0.6, 1), (0.8, 0.5), (1, 0)):
        assert kd.learning_rate(settings, progress) == pytest.approx(0.4 * part)
    assert kd.learning_rate(kd.Settings(lr=0.4), 0.99) == 0.4


def load(folder, name):
    model = kd.TeacherModel() if name == "teacher" else kd.StudentModel()
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return model


def test_distillation_is_what_a_plain_loop_computes(copy, data_dir, data):
    """One step: the same images for both, the teacher in eval mode and left as it is, the loss by
    hand, SGD written out."""
    before = {name: load(copy, name) for name in ("teacher", "student")}
    options = ["--epochs", 1, "--batch-size", 1000, "--lr", 0.003]
    assert run(data_dir, copy, "distill", *options) == 0
    chosen = kd.choose_images(data, 0, 0)
    settings = kd.Settings(batch_size=1000)
    inputs, labels = next(kd.training_batches(chosen[0], chosen[1], settings, 0, 1))
    with torch.no_grad():
        soft = before["teacher"].eval()(inputs)
    student = before["student"].train()
    logits = student(inputs)
    expected = by_hand(logits.double(), soft.double(), labels, 5, 0.5)
    assert read_csv(copy, "dist_student")[0]["train_loss"] == pytest.approx(expected, rel=1e-4)
    ce = F.cross_entropy(logits, labels)
    kl = F.kl_div((logits / 5).log_softmax(1), (soft / 5).softmax(1), reduction="sum") / len(labels)
    (0.5 * ce + 0.5 * 25 * kl).backward()
    trained = dict(load(copy, "dist_student").named_parameters())
    for key, weight in student.named_parameters():
        step = weight.detach() - 0.003 * (weight.grad + 5e-4 * weight.detach())
        torch.testing.assert_close(trained[key].detach(), step, atol=2e-5, rtol=1e-3)
    for key, value in load(copy, "teacher").state_dict().items():
        assert torch.equal(value, before["teacher"].state_dict()[key])


def test_distilled_student_and_control_see_the_same_images(copy, data_dir, monkeypatch):
    seen = []
    normalise = kd.normalise

    def spy(images):
        seen.append(images.clone())
        return normalise(images)

    monkeypatch.setattr(kd, "normalise", spy)
    options = ["--epochs", 1, "--batch-size", 80, "--lr", 0.003]
    assert run(data_dir, copy, "distill", *options) == 0
    distilled = list(seen)
    seen.clear()
    assert run(data_dir, copy, "control", *options) == 0
    assert len(seen) == len(distilled) == 3  # two batches, one test
    assert all(torch.equal(a, b) for a, b in zip(seen, distilled, strict=True))


# --- the whole run --------------------------------------------------------------------------------


def test_all_leaves_every_file(finished):
    expected = {"summary.json", "summary.md", "accuracy.png", "soft_targets.png"}
    expected |= {"predictions.png", "misclassified.png", "confusion_matrix.png"}
    for name in NAMES:
        endings = (".pt", ".json", "_train_logs.csv", "_train_logs.png")
        expected |= {name + ending for ending in endings}
    assert {path.name for path in finished.iterdir()} == expected
    for path in finished.glob("*.png"):
        assert min(Image.open(path).size) >= 300


def test_all_learns_and_its_figures_are_right(finished, data):
    summary = json.loads((finished / "summary.json").read_text())
    table = (finished / "summary.md").read_text()
    assert list(summary["rows"]) == NAMES
    answers = {}
    for name, row in summary["rows"].items():
        log = read_csv(finished, name)
        assert row["test_acc"] > 60, (name, row)  # chance: 10
        assert row["epochs"] == len(log) == EPOCHS
        assert row["train_acc"] == pytest.approx(log[-1]["train_acc"], abs=0.01)
        last_five = [epoch["test_acc"] for epoch in log[-5:]]
        assert row["test_acc_last5"] == pytest.approx(sum(last_five) / 5, abs=0.01)
        counts = (722_752, 729_712) if name == "teacher" else (223_232, 230_192)
        assert (row["params"], row["params_torchsummary"]) == counts
        assert row["seconds_per_epoch"] > 0 and row["images_per_second"] > 0
        with torch.no_grad():
            probabilities = load(finished, name).eval()(kd.normalise(data[2])).softmax(1).numpy()
        answers[name] = probabilities.argmax(1)
        confidence = probabilities.max(1)
        right = answers[name] == data[3].numpy()
        assert row["test_acc"] == pytest.approx(100 * right.mean(), abs=0.01)
        assert row["test_acc"] == pytest.approx(log[-1]["test_acc"], abs=0.01)
        ece = 0.0
        for k in range(15):
            members = (confidence > k / 15) & (confidence <= (k + 1) / 15)
            if members.any():
                ece += members.mean() * abs(right[members].mean() - confidence[members].mean())
        assert row["ece"] == pytest.approx(ece, abs=0.002)
        agreement = 100 * (answers[name] == answers["teacher"]).mean()
        assert row["agreement"] == pytest.approx(agreement, abs=0.01)
        assert f"| {row['test_acc']:.2f} | {row['test_acc_last5']:.2f} |" in table
    rights = {name: (answer == data[3].numpy()) * 100.0 for name, answer in answers.items()}
    gain = rights["dist_student"] - rights["control"]
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    assert f"distilled student - control = {gain.mean():+.2f} ± {error:.2f} points" in table


def test_records_say_how_each_was_made(finished):
    experiments = {}
    for name in NAMES:
        record = json.loads((finished / f"{name}.json").read_text())
        assert record["command"].startswith("python kd.py --stage all ")
        assert torch.__version__ in record["made_with"][0]
        experiments[name] = record["experiment"]
    for name in ("teacher", "student"):
        assert experiments[name]["lr"] == 0.003 and experiments[name]["weight_decay"] == 0
    distilled, control = experiments["dist_student"], experiments["control"]
    assert (distilled["alpha"], distilled["temperature"]) == (0.5, 5)
    same = ("lr", "momentum", "weight_decay", "batch_size", "seed", "images_digest", "student.pt")
    assert all(distilled[key] == control[key] for key in same)
    assert control["epochs"] == EPOCHS and "alpha" not in control


def test_a_stopped_training_goes_on_to_the_same_bytes(data_dir, tmp_path, monkeypatch, capsys):
    options = ["--epochs", 9, "--patience", 2, "--min-delta", 1e9]  # early stopping after the third
    options += ["--batch-size", 40, "--lr", 0.003]
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert run(data_dir, whole, "student", *options) == 0
    test, calls = kd.test, []

    def stop_in_third_epoch(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return test(*args)

    monkeypatch.setattr(kd, "test", stop_in_third_epoch)
    capsys.readouterr()
    assert run(data_dir, folder, "student", *options) == 130
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["student_checkpoint.pt"]
    message = refused(capsys, run(data_dir, folder, "student", *options))
    assert "--resume" in message and "delete" in message
    message = refused(capsys, run(data_dir, folder, "student", "--resume", *options, "--lr", 0.1))
    assert "lr 0.003, not 0.1" in message
    assert run(data_dir, folder, "student", "--resume", *options) == 0 and len(calls) == 4
    assert (folder / "student.pt").read_bytes() == (whole / "student.pt").read_bytes()
    assert not (folder / "student_checkpoint.pt").exists()
    assert run(data_dir, folder, "student", "--resume", *options) == 0 and len(calls) == 4
    assert "student is finished" in capsys.readouterr().out


OUT_OF_DATE = {  # what of the folder f is out of date: how it comes about
    "built on other weights": lambda f: rewrite(
        f / "control.json", epochs=3, **{"dist_student.pt": "0"}
    ),
    "without weights": lambda f: (f / "control.pt").unlink(),
}


@pytest.mark.parametrize("damage", OUT_OF_DATE)
def test_resume_trains_anew_what_is_out_of_date(damage, finished, copy, data_dir, capsys):
    OUT_OF_DATE[damage](copy)
    assert run(data_dir, copy, "control", "--resume", *OPTIONS) == 0
    assert "is finished" not in capsys.readouterr().out
    assert (copy / "control.pt").read_bytes() == (finished / "control.pt").read_bytes()
    assert run(data_dir, copy, "control", "--resume", *OPTIONS) == 0
    assert "control is finished" in capsys.readouterr().out


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option",
    [
        "temperature=0",
        "temperature=nan",
        "temperature=inf",
        "alpha=-0.1",
        "alpha=1.1",
        "alpha=nan",
        "epochs=0",
        "epochs=1.5",
        "batch-size=0",
        "lr=0",
        "lr=inf",
        "lr=two",
        "patience=0",
        "min-delta=-1",
        "min-delta=nan",
        "seed=-1",
        "holdout=-1",
        "limit=-1",
        "device=tpu",
        "recipe=x",
        "unknown=1",
        "stage=x",
    ],
)
def test_impossible_options_are_usage_errors(option, capsys):
    with pytest.raises(SystemExit) as error:
        kd.main(["--stage", "all", f"--{option}"])
    assert error.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--patience", "--min-delta"])
def test_early_stopping_in_mid_decay_is_a_usage_error(option, capsys):
    with pytest.raises(SystemExit) as error:
        kd.main(["--stage", "all", "--recipe", "strong", option, "5"])
    assert error.value.code == 2
    assert option[2:5] in capsys.readouterr().err


def rewrite(path, **changes):
    record = json.loads(path.read_text())
    record["experiment"].update(changes)
    path.write_text(json.dumps(record))


DAMAGE = {  # what is wrong with the folder f: how it comes about, words of the line
    "no teacher": (lambda f: (f / "teacher.json").unlink(), "--stage teacher"),
    "no weights": (lambda f: (f / "control.pt").unlink(), "--stage control"),
    "half the weights": (lambda f: (f / "student.pt").write_bytes(b"PK"), "student.pt"),
    "the other network": (lambda f: shutil.copy(f / "teacher.pt", f / "student.pt"), "student.pt"),
    "another record": (lambda f: shutil.copy(f / "teacher.json", f / "student.json"), "network"),
    "no json": (lambda f: (f / "student.json").write_text("{"), "student.json"),
    "an empty record": (lambda f: (f / "student.json").write_text("{}"), "student.json"),
    "another recipe": (lambda f: rewrite(f / "student.json", recipe="strong"), "recipe strong"),
    "another seed": (lambda f: rewrite(f / "student.json", seed=3), "seed 3"),
    "other images": (lambda f: rewrite(f / "control.json", images_digest="0"), "images_digest"),
    "another teacher": (
        lambda f: rewrite(f / "dist_student.json", **{"teacher.pt": "0"}),
        "teacher.pt 0",
    ),
    "another twin": (
        lambda f: rewrite(f / "control.json", **{"dist_student.pt": "0"}),
        "--stage control",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_belong_together_is_refused(damage, copy, data_dir, capsys):
    break_it, words = DAMAGE[damage]
    break_it(copy)
    assert words in refused(capsys, run(data_dir, copy, "evaluate"))


def test_evaluate_refuses_other_test_images_and_a_new_student(copy, data_dir, capsys, tmp_path):
    other = shutil.copytree(data_dir, tmp_path / "other")
    (other / "test" / "cat" / "0.png").unlink()
    assert "images" in refused(capsys, run(other, copy, "evaluate"))
    assert run(data_dir, copy, "student", "--epochs", 1) == 0
    capsys.readouterr()
    assert "student" in refused(capsys, run(data_dir, copy, "evaluate"))


def test_damaged_checkpoint_is_named(data_dir, tmp_path, capsys):
    for content in (b"", b"text", pickle.dumps(print, 2)):
        (tmp_path / "student_checkpoint.pt").write_bytes(content)
        message = refused(capsys, run(data_dir, tmp_path, "student", "--resume"))
        assert "student_checkpoint.pt is damaged" in message


def sixteen_bits(path):
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(path)


IMAGES = {  # what is wrong with the data d: how it comes about, words of the line
    "a class less": (lambda d: shutil.rmtree(d / "test" / "bird"), "ten folders"),
    "no test images": (lambda d: shutil.rmtree(d / "test"), "test"),
    "a large image": (lambda d: Image.new("RGB", (64, 48)).save(d / "train/cat/0.png"), "64×48"),
    "half an image": (lambda d: (d / "train/cat/3.png").write_bytes(b"\x89PNG"), "cat/3.png"),
    "16 bits": (lambda d: sixteen_bits(d / "test/dog/1.png"), "dog/1.png"),
}


@pytest.mark.parametrize("damage", IMAGES)
def test_bad_images_are_named(damage, data_dir, tmp_path, capsys):
    root = shutil.copytree(data_dir, tmp_path / "data")
    break_it, words = IMAGES[damage]
    break_it(root)
    assert words in refused(capsys, run(root, tmp_path / "results", "student"))


def test_missing_data_diverging_loss_and_bad_folder(data_dir, tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    assert "no network" in refused(capsys, run(tmp_path / "none", tmp_path / "a", "student"))
    assert "--lr" in refused(capsys, run(data_dir, tmp_path / "b", "student", "--lr", 1e9))
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, run(data_dir, tmp_path / "file", "student"))


def test_a_full_disk_is_one_line(data_dir, tmp_path, capsys):
    resource = pytest.importorskip("resource")  # a limit on a file's size is the same to a program
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        code = run(data_dir, tmp_path, "teacher", "--epochs", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(capsys, code)
    assert not list(tmp_path.glob("*.pt"))


def test_a_link_to_a_parent_folder_multiplies_no_images(data_dir, data, tmp_path):
    root = shutil.copytree(data_dir, tmp_path / "data")
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    assert torch.equal(kd.load_cifar10(root)[0], data[0])


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
        copies.clear()
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), Watch():
            images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device="cuda")
            labels = torch.zeros(n, dtype=torch.int64, device="cuda")
            data = kd.Data(images, labels, images, labels)
            with torch.device("cuda"):
                teacher = kd.TeacherModel()
                student = kd.StudentModel()
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
            copies.clear()
            settings = kd.Settings(batch_size=20)
            kd.train_epoch(student, teacher, optimizer, data, settings, 0, 1)
        counts.append(len(copies))
    assert convolutions and set(convolutions) == {torch.bfloat16}
    assert counts[0] == counts[1], copies  # those of an epoch, none of a step
