"""Tests of kd.py, offline: against torchvision, float64 arithmetic and hand-made cases."""
import argparse
import copy
import csv
import hashlib
import io
import json
import math
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import timeit
import urllib.request

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

CPUINFO, kd.CPUINFO = kd.CPUINFO, ""  # float32 on every CPU, to compare results closely
CPU = torch.device("cpu")
PER_CLASS, EPOCHS = {"train": 16, "test": 8}, 8


def shape_image(rng, label):
    """A square in its class's colour, somewhere on dark noise: uint8 (32, 32, 3)."""
    image = rng.integers(0, 60, (32, 32, 3))
    x, y = rng.integers(3, 13, 2)
    colour = np.array([label % 3, label // 3 % 3, label // 9 * 2]) * 90 + 60
    image[y:y + 16, x:x + 16] = colour + rng.integers(-15, 15, (16, 16, 3))
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A learnable image-folder set in CIFAR-10's ten classes."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in PER_CLASS.items():
        for label, name in enumerate(kd.CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(shape_image(rng, label)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch, request):
    """Drawing takes longer than training here: only `finished` and tests of evaluate draw."""
    if "evaluate" not in request.node.name:
        monkeypatch.setattr(kd.Figure, "savefig", lambda self, file: file.write(b"a picture"))


@pytest.fixture(scope="module")
def data(data_dir):
    return kd.load_cifar10(data_dir)


def settings(**changed):
    defaults = {key: default for key, (default, *_) in kd.SETTINGS.items()}
    return argparse.Namespace(**{**defaults, **changed})


def run(*options):
    return kd.main([str(option) for option in options])


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The results folder of `--stage all` on the small set."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    assert run("--stage", "all", "--data-dir", data_dir, "--results-dir", folder, "--device", "cpu",
               "--epochs", EPOCHS, "--batch-size", 32, "--lr", 0.003) == 0
    return folder


def read_csv(folder, name):
    with open(folder / f"{name}_train_logs.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# --- the networks ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, distinct, reported", [
    (kd.TeacherModel, 722_752, 729_712), (kd.StudentModel, 223_232, 230_192)])
def test_parameter_counts(kind, distinct, reported, capsys):
    assert sum(p.numel() for p in kind().parameters()) == distinct
    torchsummary.summary(kind(), (3, 32, 32), device="cpu")
    assert f"Total params: {reported:,}\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind, c2, c3", [(kd.TeacherModel, 64, 128), (kd.StudentModel, 32, 64)])
def test_every_layer_in_order_with_its_output_shape(kind, c2, c3):
    def block(c, size):
        return [("Conv2d", c, size), ("ReLU", c, size), ("BatchNorm2d", c, size)] * 4 + [
            ("MaxPool2d", c, size // 2), ("Conv2d", c, size // 2)]

    def separable(c_in, c_out):
        return [("Conv2d", c_in, 4), ("ReLU", c_in, 4), ("Conv2d", c_out, 4), ("ReLU", c_out, 4),
                ("BatchNorm2d", c_out, 4)]

    skip = [("Conv2d", 16, size) for size in (28, 24, 20, 16)]
    expected = (block(16, 32) + skip + block(c2, 16) + block(c3, 8)
                + separable(c3, 128) + separable(128, 256)
                + [("AvgPool2d", 256, 1), ("Conv2d", 10, 1), ("Flatten", 10, None)])
    network, seen = kind().eval(), []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, _, out: seen.append(
                (type(m).__name__, out.shape[1], out.shape[2] if out.ndim == 4 else None)))
    logits = network(torch.zeros(5, 3, 32, 32))
    assert seen == expected
    leaves = [type(m).__name__ for m in network.modules() if not list(m.children())]
    assert leaves == [layer[0] for layer in expected[:14] + expected[17:]]  # as registered
    assert logits.shape == (5, 10) and logits.dtype == torch.float32


def test_convolutions_are_the_assignment_s():
    network = kd.TeacherModel()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c for c in convolutions if c.bias is not None] == [network.skip]
    assert network.skip.dilation == (2, 2) and network.skip.padding == (0, 0)
    assert [c.in_channels for c in convolutions if c.groups > 1] == [128, 128]
    assert all(c.groups in (1, c.in_channels) for c in convolutions)


def test_skip_path_is_added_to_block_1():
    network, images = kd.StudentModel().eval(), torch.randn(2, 3, 32, 32)
    first = network.block1[0](images)
    skip = network.skip(network.skip(network.skip(network.skip(first))))
    with_skip = network.head(network.block3(network.block2(network.block1(images) + skip)))
    assert torch.equal(network(images), with_skip)
    assert not torch.allclose(network(images), network.head(network.block3(network.block2(
        network.block1(images)))))


def test_initial_weights_follow_from_seed_and_network_alone():
    first = kd.new_network(kd.StudentModel, 3).state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = kd.new_network(kd.StudentModel, 3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = kd.new_network(kd.StudentModel, 4).state_dict()
    assert not torch.equal(first["skip.weight"], other["skip.weight"])
    teacher = kd.new_network(kd.TeacherModel, 3).state_dict()
    assert not torch.equal(first["skip.weight"], teacher["skip.weight"])


# --- the data -------------------------------------------------------------------------------------
def test_each_loaded_image_equals_its_file(data_dir, data):
    for split, images, labels in (("train", *data[:2]), ("test", *data[2:])):
        assert images.dtype == torch.uint8 and images.shape == (10 * PER_CLASS[split], 3, 32, 32)
        assert labels.dtype == torch.int64 and labels.shape == (len(images),)
        loaded = sorted((int(y), image.numpy().tobytes()) for image, y in zip(images, labels))
        files = sorted((label, np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes())
                       for label, name in enumerate(kd.CLASSES)
                       for path in (data_dir / split / name).iterdir())
        assert loaded == files


def test_torchvision_s_layout_gives_the_same_tensors(data, tmp_path, monkeypatch):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()

    def batch(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))
    cifar = torchvision.datasets.CIFAR10
    for attribute, name, images, labels in (
            ("train_list", "data_batch_1", data[0][order], data[1][order]),
            ("test_list", "test_batch", data[2].flip(0), data[3].flip(0))):
        monkeypatch.setattr(cifar, attribute, [batch(name, {
            "data": images.numpy().reshape(len(images), -1), "labels": labels.tolist()})])
    name, md5 = batch("batches.meta", {"label_names": list(kd.CLASSES)})
    monkeypatch.setattr(cifar, "meta", {"filename": name, "key": "label_names", "md5": md5})
    assert all(torch.equal(a, b) for a, b in zip(kd.load_cifar10(tmp_path), data))


def test_affine_equals_torchvision_pixel_for_pixel():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (520, 3, 32, 32), dtype=torch.uint8, generator=generator)
    angles, shears, *_ = kd.draw_affine(520, 10, 10, generator)
    extremes = [(a, s) for a in (-10.0, 0.0, 10.0) for s in (-10.0, 0.0, 10.0)] + [
        (90.0, 0.0), (-90.0, 0.0), (180.0, 0.0), (45.0, 0.0), (30.0, 40.0), (170.0, -60.0)]
    angles[:len(extremes)], shears[:len(extremes)] = torch.tensor(extremes).T
    ours = kd.affine(images, angles, shears)
    theirs = torch.stack([TVF.affine(image, angle.item(), [0, 0], 1.0, [shear.item(), 0.0],
                                     InterpolationMode.NEAREST, fill=0)
                          for image, angle, shear in zip(images, angles, shears)])
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())
    assert torch.equal(ours, kd.affine(images.float(), angles, shears))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, kd.affine(images, angles, shears))


def test_random_affine_draws_for_each_image_within_the_range():
    angles, shears, *still = kd.draw_affine(20_000, 10, 7, torch.Generator().manual_seed(0))
    assert [set(draw.tolist()) for draw in still] == [{0}, {0}, {1}]
    for draws, limit in ((angles, 10), (shears, 7)):
        assert draws.abs().max() <= limit
        assert draws.min() < -0.99 * limit and draws.max() > 0.99 * limit
        assert abs(draws.mean()) < 0.05 * limit
        assert draws.std() == pytest.approx(2 * limit / math.sqrt(12), rel=0.02)  # uniform
    image = torch.arange(3072, dtype=torch.float32).view(1, 3, 32, 32).expand(50, -1, -1, -1)
    out = kd.random_affine(image, 10, 10, torch.Generator().manual_seed(5))
    assert len({o.numpy().tobytes() for o in out}) == 50
    assert torch.equal(out, kd.random_affine(image, 10, 10, torch.Generator().manual_seed(5)))


def test_moves_and_mirrors_equal_torchvision_s():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=generator)
    draws = kd.draw_affine(500, 0, 0, generator, shift=5, flip=0.3)
    for values, allowed in zip(draws, ({0}, {0}, {*range(-5, 6)}, {*range(-5, 6)}, {-1, 1})):
        assert {*values.tolist()} == allowed and values.shape == (500,)
    assert (draws[4] < 0).double().mean() == pytest.approx(0.3, abs=0.07)
    assert not torch.equal(draws[2], draws[3])
    theirs = [TVF.affine(TVF.hflip(image) if mirror < 0 else image, 0.0, [int(dx), int(dy)], 1.0,
                         [0.0, 0.0], InterpolationMode.NEAREST, fill=0)
              for image, _, _, dx, dy, mirror in zip(images, *draws)]
    assert torch.equal(kd.affine(images, *draws), torch.stack(theirs).float())
    turned = kd.affine(images, torch.full((500,), 90.0), draws[1], 3, -2, -1)  # in this order
    theirs = [TVF.affine(TVF.hflip(i), 90.0, [3, -2], 1.0, [0.0, 0.0]) for i in images]
    assert torch.equal(turned, torch.stack(theirs).float())


def test_normalise_equals_torchvision(data):
    images = data[0][:7]
    expected = torchvision.transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))(
        images.float() / 255)
    out = kd.normalise(images)
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == torch.float32


def test_an_epoch_shows_every_image_once_with_its_label(data):
    images, labels = data[:2]
    still = settings(batch_size=50, degrees=0.0, shear=0.0)
    batches = list(kd.training_batches(images, labels, still, 1))
    assert [len(inputs) for inputs, _ in batches] == [50, 50, 50, 10]

    def pairs(inputs, targets):
        return sorted((int(t), i.contiguous().numpy().tobytes()) for i, t in zip(inputs, targets))

    inputs, targets = (torch.cat(part) for part in zip(*batches))
    assert pairs(inputs, targets) == pairs(kd.normalise(images), labels)
    assert not torch.equal(targets, labels)


def test_an_epoch_s_randomness_follows_from_seed_and_epoch_alone(data):
    def first(seed, epoch):
        chosen = settings(batch_size=32, seed=seed)
        return next(iter(kd.training_batches(*data[:2], chosen, epoch)))[0]

    reference = first(0, 3)
    torch.rand(1000)
    assert torch.equal(reference, first(0, 3))
    assert not torch.equal(reference, first(0, 4)) and not torch.equal(reference, first(1, 3))
    assert not torch.equal(first(1, 0), first(0, 1))


# --- the loss -------------------------------------------------------------------------------------
def random_logits(n=6, scale=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, n, 10, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(0, 10, (n,), generator=generator)


def by_hand(student, teacher, targets, t, alpha):
    """The formula in Python floats, image by image and class by class."""
    total = 0.0
    for z, v, target in zip(student.tolist(), teacher.tolist(), targets.tolist()):
        def softmax(x, t):
            e = [math.exp((xi - max(x)) / t) for xi in x]
            return [ei / sum(e) for ei in e]
        hard = -math.log(softmax(z, 1)[target])
        soft = sum(p * (math.log(p) - math.log(q)) for p, q in zip(softmax(v, t), softmax(z, t)))
        total += alpha * hard + (1 - alpha) * t * t * soft
    return total / len(student)


@pytest.mark.parametrize("t", [1, 2.5, 5, 20])
@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_loss_equals_float64_arithmetic(t, alpha):
    student, teacher, targets = random_logits()
    loss = kd.distillation_loss(student, teacher, targets, t, alpha)
    assert loss.shape == () and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(student, teacher, targets, t, alpha), rel=2e-5)


def test_loss_is_computed_in_float32_whatever_the_logits_are():
    student, teacher, targets = random_logits()
    for dtype in (torch.bfloat16, torch.float16):
        low = student.to(dtype), teacher.to(dtype)
        loss = kd.distillation_loss(*low, targets, 5, 0.5)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(by_hand(*low, targets, 5, 0.5), rel=2e-5)


def test_soft_loss_vanishes_for_equal_logits_and_only_for_them():
    student, teacher, targets = random_logits()
    assert abs(kd.distillation_loss(teacher, teacher, targets, 5, 0).item()) < 1e-5
    assert kd.distillation_loss(student, teacher, targets, 5, 0).item() > 0.1


@pytest.mark.parametrize("t", [1.0, 5.0])
def test_soft_loss_s_gradient(t):
    student, teacher, targets = random_logits()
    z, v = student.float().requires_grad_(), teacher.float().requires_grad_()
    kd.distillation_loss(z, v, targets, t, 0).backward()
    expected = t * ((student / t).softmax(1) - (teacher / t).softmax(1)) / len(student)
    torch.testing.assert_close(z.grad, expected.float(), atol=1e-6, rtol=1e-4)
    assert v.grad is None


def test_alpha_1_is_cross_entropy_and_alpha_0_ignores_the_labels():
    student, teacher, targets = random_logits()
    assert kd.distillation_loss(student, teacher, targets, 5, 1).item() == pytest.approx(
        F.cross_entropy(student, targets).item(), rel=1e-6)
    assert torch.equal(kd.distillation_loss(student, teacher, targets, 5, 0),
                       kd.distillation_loss(student, teacher, (targets + 1) % 10, 5, 0))


def test_loss_is_finite_at_extreme_logits():
    student = torch.full((4, 10), -200.0).fill_diagonal_(200).requires_grad_()
    targets = torch.tensor([9, 8, 7, 6])
    loss = kd.distillation_loss(student, student.detach().flip(1), targets, 1, 0.5)
    loss.backward()
    assert loss.isfinite() and loss > 100 and student.grad.isfinite().all()


def test_loss_is_a_mean_over_images_and_tells_teacher_from_student():
    student, teacher, targets = random_logits()
    loss = kd.distillation_loss(student, teacher, targets, 5, 0.5)
    doubled = student.repeat(2, 1), teacher.repeat(2, 1), targets.repeat(2)
    twice = kd.distillation_loss(*doubled, 5, 0.5)
    assert twice.item() == pytest.approx(loss.item(), rel=1e-6)
    swapped = kd.distillation_loss(teacher, student, targets, 5, 0)
    assert abs(swapped - kd.distillation_loss(student, teacher, targets, 5, 0)) > 0.01


def test_worked_example_in_the_loss_s_docstring():
    for t in (1, 5):
        row = re.search(rf"T = {t} +cat ([\d.]+) +dog ([\d.]+) +truck ([\d.]+)",
                        kd.distillation_loss.__doc__).groups()
        exact = [math.exp(z / t) / sum(math.exp(z / t) for z in (8, 5, 0)) for z in (8, 5, 0)]
        assert [float(p) for p in row] == pytest.approx(exact, abs=0.0006)


# --- early stopping -------------------------------------------------------------------------------
@pytest.mark.parametrize("losses, stops_at", [
    ([2.0, 1.5, 1.49, 1.48, 1.47], 5),            # three small changes in a row
    ([2.0, 1.5, 1.51, 1.50, 1.51], 5),            # small rises count, too
    ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18], None),  # a large change starts the count anew
    ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18, 1.17], 8),
    ([2.0, 1.5, 1.49, 1.48, 1.9, 1.89, 1.88, 1.87], 8),
    ([1.0, 1.0, 1.0, 1.0], 4),
    ([2.0, 1.75, 1.5, 1.25, 1.0], None),          # a change of exactly min_delta is not small
    ([0.0], None)])
def test_early_stopping(losses, stops_at):
    stopping = kd.EarlyStopping(patience=3, min_delta=0.25 if 1.75 in losses else 0.02)
    answers = [stopping(loss) for loss in losses]
    assert (answers.index(True) + 1 if True in answers else None) == stops_at


@pytest.mark.parametrize("warmup, cooldown", [(0.0, 0.0), (0.25, 0.75), (0.2, 0.3), (0.0, 1.0)])
def test_learning_rate(warmup, cooldown, data, tmp_path, monkeypatch):
    """Recorded at every step of a training, against a trapezoid written out here."""
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *args: (
        seen.append(self.param_groups[0]["lr"]), step(self, *args))[1])
    kd.fit("x", kd.new_network(kd.StudentModel, 0), [t[::4] for t in data], settings(
        epochs=5, batch_size=10, lr=0.001, warmup=warmup, cooldown=cooldown), tmp_path)
    assert len(seen) == 20
    for i, lr in enumerate(seen):
        part = min([1] + ([i / 20 / warmup] if warmup else [])
                   + ([(1 - i / 20) / cooldown] if cooldown else []))
        assert lr == pytest.approx(0.001 * part, abs=1e-9)


def test_early_stopping_ends_a_training(data, tmp_path):
    log = kd.fit("x", kd.new_network(kd.StudentModel, 0), [t[::8] for t in data],
                 settings(epochs=5, batch_size=16, patience=2, min_delta=1000.0), tmp_path)
    assert log["epochs"] == 3 == len(read_csv(tmp_path, "x"))


# --- training -------------------------------------------------------------------------------------
def seen_inputs(model, into):
    model.register_forward_pre_hook(lambda m, args: into.append(args[0].clone()) if m.training or
                                    not any(p.requires_grad for p in m.parameters()) else None)


def test_distillation_leaves_the_teacher_alone_and_shows_it_the_student_s_images(data, tmp_path):
    teacher, student = (kd.new_network(kind, 0) for kind in (kd.TeacherModel, kd.StudentModel))
    teacher.train()  # however it arrives
    before, by_teacher, by_student = copy.deepcopy(teacher.state_dict()), [], []
    seen_inputs(teacher, by_teacher)
    seen_inputs(student, by_student)
    start = copy.deepcopy(student.state_dict())
    small = [t[::5] for t in data]
    kd.fit("x", student, small, settings(epochs=1, batch_size=15, alpha=0.5), tmp_path, teacher)
    after = teacher.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(start["skip.weight"], student.state_dict()["skip.weight"])
    assert len(by_teacher) == len(by_student) == 3
    assert all(torch.equal(a, b) for a, b in zip(by_teacher, by_student))


def test_distilled_student_and_control_see_the_same_images(data, tmp_path):
    small, seen = [t[::5] for t in data], {"distilled": [], "control": []}
    teacher = kd.new_network(kd.TeacherModel, 0)
    for name, inputs in seen.items():
        student = kd.new_network(kd.StudentModel, 0)
        seen_inputs(student, inputs)
        kd.fit(name, student, small, settings(epochs=2, batch_size=15, seed=5), tmp_path,
               teacher if name == "distilled" else None)
    assert len(seen["control"]) == len(seen["distilled"]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*seen.values()))
    assert not torch.equal(seen["control"][0], seen["control"][3])


def test_same_seed_same_weights_to_the_bit(data, tmp_path):
    small = [t[::8] for t in data]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) + ord(name))
        kd.fit(name, kd.new_network(kd.StudentModel, seed), small,
               settings(epochs=2, batch_size=16, seed=seed), tmp_path)
    a, b, c = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["skip.weight"], c["skip.weight"])


def test_log_is_what_an_independent_loop_measures(data, tmp_path):
    small, chosen = [t[::4] for t in data], settings(epochs=1, batch_size=25, lr=1e-9, momentum=0.0)
    model = kd.new_network(kd.StudentModel, 0)
    twin = copy.deepcopy(model).train()
    kd.fit("x", model, small, chosen, tmp_path)
    row = read_csv(tmp_path, "x")[0]
    losses, right = [], 0
    for inputs, labels in kd.training_batches(*small[:2], chosen, 1):  # lr ~ 0: nothing changes
        logits = twin(inputs)
        losses += F.cross_entropy(logits, labels, reduction="none").tolist()
        right += (logits.argmax(1) == labels).sum().item()
    assert row["train_loss"] == pytest.approx(np.mean(losses), abs=1e-3)
    assert row["train_acc"] == pytest.approx(100 * right / len(losses), abs=2.6)
    logits = model.eval()(kd.normalise(small[2]))
    assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, small[3]).item(), abs=1e-4)
    assert row["test_acc"] == pytest.approx(
        100 * (logits.argmax(1) == small[3]).float().mean().item(), abs=1e-3)


def test_write_file_keeps_the_old_file_if_the_new_one_fails(tmp_path):
    path = tmp_path / "file"
    kd.write_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kd.write_file(path, fail)
    assert path.read_bytes() == b"old"


# --- the whole run --------------------------------------------------------------------------------
NAMES = ("teacher", "student", "dist_student", "control")


def test_all_leaves_every_file(finished):
    expected = {"run.json", "summary.json", "summary.md", "predictions.png", "misclassified.png",
                "confusion_matrix.png"} | {f"{name}{ending}" for name in NAMES for ending in (
                    ".pt", "_train_logs.csv", "_train_logs.png")}
    assert {path.name for path in finished.iterdir()} == expected
    for path in finished.glob("*.png"):
        assert min(Image.open(path).size) >= 300
    for name in NAMES:
        state = torch.load(finished / f"{name}.pt", weights_only=True)
        assert all(type(t) is torch.Tensor and t.is_contiguous() and t.device == CPU
                   for t in state.values())
        (kd.TeacherModel if name == "teacher" else kd.StudentModel)().load_state_dict(state)


def test_all_learns_and_its_files_agree(finished, data):
    summary = json.loads((finished / "summary.json").read_text())
    table = (finished / "summary.md").read_text()
    assert list(summary["rows"]) == list(NAMES)
    answers = {}
    for name, row in summary["rows"].items():
        log = read_csv(finished, name)
        assert row["test_acc"] > 60, (name, row)  # chance: 10
        assert row["train_acc"] == pytest.approx(log[-1]["train_acc"], abs=0.01)
        assert row["test_acc"] == pytest.approx(log[-1]["test_acc"], abs=0.01)
        assert row["test_loss"] == pytest.approx(log[-1]["test_loss"], abs=0.001)
        assert row["epochs"] == len(log) == EPOCHS == log[-1]["epoch"]
        assert row["file_bytes"] == (finished / f"{name}.pt").stat().st_size
        assert (row["params"], row["params_torchsummary"]) == (
            (722_752, 729_712) if name == "teacher" else (223_232, 230_192))
        assert row["seconds_per_epoch"] > 0 and row["images_per_second"] > 0
        # By another way: plain float32 inference, numpy's histogram of confidences.
        model = kd.TeacherModel() if name == "teacher" else kd.StudentModel()
        model.load_state_dict(torch.load(finished / f"{name}.pt", weights_only=True))
        with torch.no_grad():
            probs = model.eval()(kd.normalise(data[2])).softmax(1).numpy()
        answers[name], sure = probs.argmax(1), probs.max(1)
        right = answers[name] == data[3].numpy()
        assert row["test_acc"] == pytest.approx(100 * right.mean(), abs=0.01)
        assert row["sampling_error"] == pytest.approx(
            100 * math.sqrt(right.mean() * (1 - right.mean()) / len(right)), abs=0.01)
        ece, edges = 0.0, np.linspace(0, 1, 16)
        for low, high in zip(edges, edges[1:]):
            members = (sure > low) & (sure <= high)
            if members.any():
                ece += members.mean() * abs(right[members].mean() - sure[members].mean())
        assert row["ece"] == pytest.approx(ece, abs=0.002)
        agreement = (answers[name] == answers["teacher"]).mean()
        assert row["agreement"] == pytest.approx(agreement, abs=1e-3)
        assert f"| {name} |" in table and f"| {round(row['test_acc'], 4):,} |" in table
    rows = summary["rows"]
    difference = rows["dist_student"]["test_acc"] - rows["control"]["test_acc"]
    assert f"from the teacher = distilled − control = {difference:+.2f}" in table
    difference = rows["control"]["test_acc"] - rows["student"]["test_acc"]
    assert f"from longer training = control − student = {difference:+.2f}" in table


def test_run_json_says_how_each_was_made(finished):
    run = json.loads((finished / "run.json").read_text())
    assert list(run) == list(NAMES)
    for training in run.values():
        assert training["command"].startswith("python kd.py --stage all --data-dir ")
        assert training["device"] == "cpu" and training["torch"] == torch.__version__
        assert training["torchvision"] == torchvision.__version__
        assert training["python"] and training["hardware"] and training["recipe"] == "reference"
    keys = ("starts_from", *kd.SETTINGS)
    made = {name: {key: run[name][key] for key in keys} for name in NAMES}
    plain = vars(settings(starts_from=None, epochs=EPOCHS, batch_size=32, lr=0.003))
    assert made["teacher"] == plain == made["student"]
    distilled, control = made["dist_student"], made["control"]
    assert distilled == {**plain, "starts_from": "student", "alpha": 0.5, "weight_decay": 5e-4}
    assert {key for key in distilled if distilled[key] != control[key]} == {"alpha", "patience"}
    assert control["alpha"] == 1


def test_training_batches_are_moved_and_mirrored_as_the_settings_say():
    images = torch.randint(1, 256, (60, 3, 32, 32), dtype=torch.uint8)  # 0 comes from outside
    plain = dict(degrees=0.0, shear=0.0, batch_size=60)
    (x, order), = kd.training_batches(images, torch.arange(60), settings(**plain, flip=1.0), 1)
    assert torch.equal(x, kd.normalise(images.flip(-1)[order].float()))
    (x, order), = kd.training_batches(images, torch.arange(60), settings(**plain, shift=1), 1)
    padded, found = torch.nn.functional.pad(images[order], (1, 1, 1, 1)), set()
    for i in range(60):
        crops = {(r, c): padded[i:i + 1, :, r:r + 32, c:c + 32] for r in range(3) for c in range(3)}
        where = [place for place, crop in crops.items()
                 if torch.equal(x[i:i + 1], kd.normalise(crop.float()))]
        assert len(where) == 1
        found.update(where)
    assert len(found) == 9  # all places


def test_strong_recipe_s_student_is_the_control(data_dir, tmp_path, capsys, monkeypatch):
    """Same initial weights, same images, same epochs: student and distilled differ in the loss."""
    where = ["--recipe", "strong", "--data-dir", data_dir, "--results-dir", tmp_path / "results",
             "--device", "cpu", "--epochs", 2, "--batch-size", 40, "--limit", 80]
    assert "the student is the control" in refused(capsys, 2, "--stage", "control", *where)
    started, seen, fit, batches = {}, {}, kd.fit, kd.training_batches

    def spy_fit(name, model, *args):
        started[name] = copy.deepcopy(model.state_dict())
        seen[name] = []
        return fit(name, model, *args)

    def spy_batches(*args):
        for inputs, labels in batches(*args):
            seen[[*seen][-1]].append((inputs.clone(), labels))
            yield inputs, labels

    monkeypatch.setattr(kd, "fit", spy_fit)
    monkeypatch.setattr(kd, "training_batches", spy_batches)
    assert run("--stage", "all", *where) == 0
    assert list(seen) == ["teacher", "student", "dist_student"]
    student, distilled = (started[name] for name in ("student", "dist_student"))
    assert all(torch.equal(student[key], distilled[key]) for key in student)
    assert len(seen["student"]) == len(seen["dist_student"]) == 4
    for a, b in zip(seen["student"], seen["dist_student"]):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    rows = json.loads((tmp_path / "results" / "summary.json").read_text())["rows"]
    assert list(rows) == ["teacher", "student", "dist_student"]
    gain = rows["dist_student"]["test_acc"] - rows["student"]["test_acc"]
    table = (tmp_path / "results" / "summary.md").read_text()
    assert f"from the teacher = distilled − control = {gain:+.2f}" in table
    assert "longer training" not in table  # nobody trained for longer
    assert run("--stage", "student", *where) == 0  # on which the distilled student does not build
    assert "dist_student" in json.loads((tmp_path / "results" / "run.json").read_text())


def test_control_takes_the_distilled_student_s_settings_and_epochs(finished, data_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    where = ["--data-dir", data_dir, "--results-dir", folder, "--device", "cpu"]
    assert run("--stage", "distill", *where, "--batch-size", 60, "--epochs", 4, "--lr", 0.003,
               "--patience", 1, "--min-delta", 1000) == 0
    assert len(read_csv(folder, "dist_student")) == 2
    assert run("--stage", "control", *where) == 0
    assert len(read_csv(folder, "control")) == 2
    control = json.loads((folder / "run.json").read_text())["control"]
    assert (control["batch_size"], control["lr"], control["epochs"]) == (60, 0.003, 2)


def test_evaluate_trains_nothing(finished, data_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()
            if path.suffix in (".pt", ".csv") or path.name == "run.json"}
    (folder / "summary.json").unlink()
    assert run("--stage", "evaluate", "--data-dir", data_dir, "--results-dir", folder,
               "--device", "cpu") == 0
    assert all((folder / name).read_bytes() == content for name, content in kept.items())
    old, new = (json.loads((f / "summary.json").read_text())["rows"] for f in (finished, folder))
    for row in (*old.values(), *new.values()):
        del row["images_per_second"]
    assert old == new


@pytest.fixture
def student(data_dir, tmp_path):
    """The options of a training of three epochs."""
    return ["--stage", "student", "--data-dir", data_dir, "--results-dir", tmp_path / "results",
            "--device", "cpu", "--epochs", 3, "--batch-size", 40, "--lr", 0.003]


def figures(folder):
    """What two runs have in common if they are the same: all but times."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            found[path.name] = path.read_bytes()
        elif path.suffix == ".csv":
            found[path.name] = [{**row, "seconds": 0} for row in csv.DictReader(open(path))]
        elif path.name == "summary.json":
            found[path.name] = [{**row, "seconds_per_epoch": 0, "images_per_second": 0}
                                for row in json.loads(path.read_text())["rows"].values()]
        else:
            found[path.name] = None
    return found


def stop_in_epoch(monkeypatch, epoch, error):
    predict, calls = kd.predict, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == epoch:
            raise error
        return predict(*args)

    monkeypatch.setattr(kd, "predict", stopped)
    return calls


def test_a_stopped_training_goes_on_to_the_same_bytes(student, tmp_path, monkeypatch, capsys):
    folder, whole = tmp_path / "results", tmp_path / "whole"
    monkeypatch.setattr(timeit, "default_timer", iter(range(0, 10**6, 11)).__next__)  # draws always
    calls = stop_in_epoch(monkeypatch, 3, KeyboardInterrupt())
    assert run(*student) == 130
    out, err = capsys.readouterr()
    assert err == ("kd.py: student was stopped in epoch 3; to go on: python kd.py "
                   + " ".join(map(str, student)) + " --resume\n")
    assert {path.name for path in folder.iterdir()} == {
        f"unfinished.student.{ending}" for ending in ("pt", "csv", "png", "part")}
    state = torch.load(folder / "unfinished.student.pt", weights_only=True)
    assert [row["epoch"] for row in state["log"]] == [1, 2]
    assert run(*student, "--resume") == 0 and len(calls) == 4
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert run(*student[:5], whole, *student[6:], "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert figures(folder) == figures(whole) and len(read_csv(whole, "student")) == 3
    assert run(*student, "--resume") == 0 and len(calls) == 7  # finished: not trained again
    assert "student is finished" in capsys.readouterr().out


def test_resume_keeps_what_is_finished_and_makes_what_is_missing(student, tmp_path, capsys):
    options = [*student, "--limit", 60, "--epochs", 5, "--resume",
               "--patience", 1, "--min-delta", 1000]  # stops after the second
    path = tmp_path / "results" / "student.pt"
    assert run(*options) == 0 and len(read_csv(path.parent, "student")) == 2
    made = path.read_bytes()
    assert run(*options) == 0 and "student is finished" in capsys.readouterr().out
    path.unlink()
    assert run(*options) == 0 and path.read_bytes() == made


def test_a_new_run_leaves_finished_results_until_its_own_are_finished(student, tmp_path,
                                                                     monkeypatch, capsys):
    folder, student = tmp_path / "results", [*student, "--limit", 60, "--epochs", 2]
    assert run(*student) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    stop_in_epoch(monkeypatch, 2, KeyboardInterrupt(15))
    assert run(*student, "--seed", 1) == 143
    assert "starts anew" not in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run(*student, "--seed", 1) == 0
    assert "unfinished.student.pt" in capsys.readouterr().out  # says that there was one
    assert set(before) == set(folder.iterdir())
    assert before[folder / "student.pt"] != (folder / "student.pt").read_bytes()


@pytest.fixture(scope="module")
def one_epoch(data_dir, tmp_path_factory):
    """The options of a training, and two results folders: of one that was stopped after an epoch,
    of one that is finished."""
    options = ["--stage", "student", "--data-dir", data_dir, "--device", "cpu", "--epochs", 2,
               "--batch-size", 60, "--limit", 120]
    stopped, ended = (tmp_path_factory.mktemp(name) for name in ("stopped", "ended"))
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(patch, 2, KeyboardInterrupt())
        assert run(*options, "--results-dir", stopped) == 130
    assert run(*options, "--results-dir", ended) == 0
    return options, {"stopped": stopped, "ended": ended}


@pytest.mark.parametrize("which", ["stopped", "ended"])
@pytest.mark.parametrize("key, value", [
    ("lr", "0.004"), ("seed", "1"), ("epochs", "4"), ("limit", "50"), ("alpha", "0.5"),
    ("images", None), ("torch", "0.1")])
def test_resume_refuses_and_names_any_difference(key, value, which, one_epoch, data_dir, tmp_path,
                                                 monkeypatch, capsys):
    options, folder = one_epoch[0], one_epoch[1][which]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = [*options, "--results-dir", folder, "--resume"]
    if key == "images":
        shutil.copytree(data_dir, tmp_path / "data")
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / "train" / "cat" / "0.png")
        other[3] = tmp_path / "data"
    elif key == "torch":
        monkeypatch.setattr(torch, "__version__", value)
    else:
        other += [f"--{key}", value]
    assert run(*other) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f" {key} " in err and str(folder) in err
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_a_loss_that_is_not_finite_ends_a_training_and_spares_the_epochs_before(
        student, tmp_path, monkeypatch, capsys):
    batches = kd.training_batches

    def poisoned(images, labels, settings, epoch):
        for inputs, targets in batches(images, labels, settings, epoch):
            yield (inputs * math.nan if epoch == 2 else inputs), targets

    with monkeypatch.context() as patch:
        patch.setattr(kd, "training_batches", poisoned)
        assert run(*student) == 1
    err = capsys.readouterr().err
    assert "epoch 2" in err and "--lr" in err and err.count("\n") == 1
    folder = tmp_path / "results"
    assert torch.load(folder / "unfinished.student.pt", weights_only=True)["log"][-1]["epoch"] == 1
    assert run(*student, "--resume") == 0 and len(read_csv(folder, "student")) == 3


def test_real_divergence_is_noticed(student, capsys):
    assert run(*student, "--lr", 100) == 1
    assert "not finite" in capsys.readouterr().err


def test_signals_at_any_moment_cost_at_most_the_epoch_in_progress(data_dir, tmp_path, monkeypatch,
                                                                  capsys):
    """kd.py as a process, killed again and again (and at times asked to stop), then resumed."""
    def options(folder):
        return ["--stage", "all", "--resume", "--data-dir", data_dir, "--device", "cpu", "--epochs",
                "3", "--batch-size", "40", "--limit", "80", "--results-dir", tmp_path / folder]

    def start():
        return subprocess.Popen([sys.executable, kd.__file__, *options("cut")], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def epochs(out):
        return re.findall(r"^(\w+) +epoch (\d+)", out, re.M)

    monkeypatch.setattr(kd, "CPUINFO", CPUINFO)  # here, too, in bf16 if the CPU can
    began = time.monotonic()
    assert run(*options("whole")) == 0
    span, expected = time.monotonic() - began, epochs(capsys.readouterr().out)
    assert len(expected) == 12
    rng, seen, kills, end = random.Random(0), [], 0, time.monotonic() + 10
    while kills < 2 or time.monotonic() < end:
        process = start()
        kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.stdout.readline()  # it has begun
        time.sleep(rng.uniform(0, span / 3))
        process.send_signal(kind)
        out, err = process.communicate()
        seen += epochs(out)
        if "from the teacher" in out:
            break  # it had come to its end
        kills += 1
        assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}.get(kind, -kind)
        if kind != signal.SIGKILL:
            assert err.startswith("kd.py: ") and err.count("\n") == 1
    last = start()
    seen += epochs(last.communicate()[0])
    assert last.returncode == 0 and kills > 0
    assert sorted(set(seen)) == sorted(expected) and len(seen) <= len(expected) + kills
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_holdout_and_limit(data_dir, data):
    def prepared(*options):
        return kd.prepare(kd.parse(["--stage", "all", "--device", "cpu",
                                    "--data-dir", str(data_dir), *options]))

    def pairs(images, labels):
        return {(int(label), image.numpy().tobytes()) for image, label in zip(images, labels)}

    assert all(torch.equal(a, b) for a, b in zip(prepared(), data))
    held = prepared("--holdout", "40")
    assert (len(held[0]), len(held[2])) == (120, 40)
    assert pairs(*held[:2]) | pairs(*held[2:]) == pairs(*data[:2])
    assert not pairs(*held[:2]) & pairs(*held[2:])
    limited = prepared("--limit", "50")
    assert (len(limited[0]), len(limited[2])) == (50, 50)
    assert pairs(*limited[:2]) <= pairs(*data[:2]) and pairs(*limited[2:]) <= pairs(*data[2:])
    assert len(limited[1].unique()) > 5
    both = prepared("--holdout", "40", "--limit", "30")
    assert (len(both[0]), len(both[2])) == (30, 30)
    assert pairs(*both[2:]) <= pairs(*held[2:]) and pairs(*both[:2]) <= pairs(*held[:2])
    again, other = prepared("--holdout", "40"), prepared("--holdout", "40", "--seed", "1")
    assert torch.equal(held[2], again[2]) and not torch.equal(held[2], other[2])


# --- refusals -------------------------------------------------------------------------------------
USAGE = [
    "--temperature 0", "--temperature -1", "--temperature nan", "--temperature inf", "--alpha -0.1",
    "--alpha 1.1", "--alpha nan", "--epochs 0", "--epochs 1.5", "--epochs -3", "--batch-size 0",
    "--batch-size 99999999999", "--lr 0", "--lr -1", "--lr inf", "--lr two", "--patience 0",
    "--min-delta -1", "--min-delta nan", "--momentum 1", "--weight-decay -1", "--degrees 181",
    "--shear 90", "--lr nan", "--seed -1", "--holdout -1", "--holdout 50000", "--limit -1",
    "--device tpu",
    "--recipe unknown", "--unknown 1", "--epoch 1", "--stage nothing"]


def refused(capsys, code, *options):
    assert run(*options) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kd.py: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize("options", USAGE)
def test_impossible_options_are_refused_before_any_work(options, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "load_cifar10", lambda _: pytest.fail("work has begun"))
    folder = tmp_path / "results"
    message = refused(capsys, 2, "--stage", "all", "--results-dir", folder, *options.split())
    assert options.split()[0].lstrip("-") in message and not folder.exists()


def test_stage_is_required_and_help_lists_every_option(capsys):
    assert "--stage" in refused(capsys, 2)
    with pytest.raises(SystemExit) as leave:
        run("--help")
    text = capsys.readouterr().out
    assert leave.value.code == 0
    for option in ("stage", "recipe", "data-dir", "results-dir", "device"):
        assert re.search(rf"\n  --{option} .*\n? .*[a-z]", text)
    for option, (default, low, high, meaning) in kd.SETTINGS.items():
        words = f"--{option.replace('_', '-')} N {meaning}; {low:,} to {high:,}, else {default:,}"
        assert words in " ".join(text.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(capsys):
    assert "cuda" in refused(capsys, 2, "--stage", "all", "--device", "cuda")


@pytest.mark.parametrize("stage, missing, maker", [
    ("distill", "student", "student"), ("distill", "teacher", "teacher"),
    ("control", "dist_student", "distill"), ("evaluate", "control", "control")])
def test_missing_checkpoint_names_the_command_that_makes_it(stage, missing, maker, finished,
                                                           data_dir, tmp_path, capsys):
    folder = tmp_path / stage  # the hint must not change this word
    shutil.copytree(finished, folder)
    (folder / f"{missing}.pt").unlink()
    message = refused(capsys, 1, "--results-dir", folder, "--stage", stage, "--data-dir", data_dir)
    assert f"{missing}.pt" in message
    assert f"python kd.py --results-dir {folder} --stage {maker} --data-dir {data_dir}" in message


def test_new_weights_outdate_what_was_built_on_the_old_ones(finished, data_dir, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    where = ["--data-dir", data_dir, "--results-dir", folder, "--device", "cpu"]
    for name in NAMES[2:]:
        (folder / f"unfinished.{name}.pt").touch()
    (folder / "unfinished.teacher.pt").touch()
    assert run("--stage", "student", *where, "--epochs", 1, "--batch-size", 120) == 0
    assert [path.name for path in folder.glob("unfinished.*")] == ["unfinished.teacher.pt"]
    capsys.readouterr()
    assert "--stage distill" in refused(capsys, 1, "--stage", "control", *where)


def test_evaluate_survives_perfect_and_diverged_students(data, tmp_path, monkeypatch, data_dir):
    """No mistake to show; and logits that are all nan."""
    for value in (None, float("nan")):
        answers = torch.where(F.one_hot(data[3], 10) > 0, 9.0, 0.0)
        runs = {name: {"result": {"train_acc": 1.0, "epochs": 1, "seconds_per_epoch": 1.0}}
                for name in NAMES}
        monkeypatch.setattr(kd, "read_runs", lambda _: runs)
        monkeypatch.setattr(kd, "load_trained", lambda *_: kd.StudentModel())
        monkeypatch.setattr(kd, "predict", lambda model, images: (
            answers[:len(images)] if value is None else answers[:len(images)] * value))
        for name in NAMES:
            (tmp_path / f"{name}.pt").touch()
        kd.evaluate(argparse.Namespace(results_dir=tmp_path, trainings=NAMES), lambda: data)
        row = json.loads((tmp_path / "summary.json").read_text())["rows"]["dist_student"]
        assert row["test_acc"] == (100 if value is None else 10)


def test_one_results_folder_holds_one_run(finished, data_dir, capsys):
    message = refused(capsys, 1, "--stage", "evaluate", "--data-dir", data_dir,
                      "--results-dir", finished, "--seed", 1)
    assert "made with seed 0, not 1" in message
    message = refused(capsys, 1, "--stage", "evaluate", "--data-dir", data_dir,
                      "--results-dir", finished, "--holdout", 40)
    assert "made with holdout 0, not 40" in message


def test_holdout_that_leaves_nothing(data_dir, capsys):
    assert "160" in refused(capsys, 2, "--stage", "all", "--data-dir", data_dir, "--holdout", 160)


def test_missing_data_says_both_ways_to_provide_it(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    message = refused(capsys, 1, "--stage", "teacher", "--data-dir", tmp_path / "none")
    assert "train/<class>" in message and "download" in message and "no network" in message


class Evil:
    """Unpickling it would run code: it would make a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def weights(change=lambda w: w, kind=kd.StudentModel):
    return saved(change(kind().state_dict()))


def no_number(state, key="head.0.0.weight"):
    state[key][0] = math.nan
    return state


CHECKPOINTS = {
    "empty": b"", "text": b"no checkpoint", "a pickle": pickle.dumps(print),
    "random bytes": random.Random(0).randbytes(900_000), "a zip": b"PK\3\4" + bytes(9000),
    "truncated": weights()[:-5000], "of the teacher": weights(kind=kd.TeacherModel),
    "nan": weights(no_number), "inf": weights(lambda w: {**w, "skip.bias": w["skip.bias"] / 0}),
    "a number": saved(3), "a list": saved([torch.zeros(3)]), "nothing": saved({}),
    "a layer less": weights(lambda w: dict(list(w.items())[:-1])),
    "numbers for tensors": weights(lambda w: {key: 3.0 for key in w}),
    "code": None, "code in an old file": None, "a folder": None}


@pytest.mark.parametrize("file", ["student.pt", "unfinished.student.pt"])
@pytest.mark.parametrize("content", CHECKPOINTS)
def test_bad_checkpoint_is_named_and_nothing_in_it_is_run(content, file, finished, data_dir,
                                                         tmp_path, capsys, recwarn):
    folder, mark = tmp_path / "results", tmp_path / "mark"
    shutil.copytree(finished, folder)
    path = folder / file
    path.unlink(missing_ok=True)
    if content == "a folder":
        path.mkdir()
    elif content == "code":
        path.write_bytes(saved({"skip.bias": Evil(mark)}))
    elif content == "code in an old file":
        torch.save(Evil(mark), path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(CHECKPOINTS[content])
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    options = ["--stage", "distill"] if file == "student.pt" else ["--stage", "student", "--resume"]
    assert run(*options, "--data-dir", data_dir, "--results-dir", folder, "--device", "cpu") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"kd.py: {path} does not hold this network's weights: ")
    assert err.count("\n") == 1 and len(err) < 400 + len(str(path)) and "Traceback" not in err
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert not mark.exists() and not recwarn.list  # a warning would be a second line


def cut_short(path, share=0.5):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def make_file(path, content=b"some bytes"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


DATA = {  # what is wrong: how it comes about in the data folder d, what the line must say
    "a class less": (lambda d: shutil.rmtree(d / "test" / "bird"), "test"),
    "an empty class": (lambda d: [p.unlink() for p in (d / "test" / "bird").iterdir()], "bird"),
    "a class more": (lambda d: shutil.copytree(d / "train/bird", d / "train/dragon"), "train"),
    "a class misspelt": (lambda d: (d / "train" / "bird").rename(d / "train" / "Bird"), "train"),
    "no test images": (lambda d: shutil.rmtree(d / "test"), "test"),
    "no training images": (lambda d: shutil.rmtree(d / "train"), "train"),
    "a file for a split": (lambda d: (shutil.rmtree(d / "train"), make_file(d / "train")), "train"),
    "a large image": (lambda d: Image.new("RGB", (64, 48)).save(d / "train/cat/0.png"),
                      "train/cat/0.png is no readable image of 32×32 pixels: it has 64×48"),
    "half an image": (lambda d: cut_short(d / "train/cat/3.png"), "train/cat/3.png"),
    "an image's header": (lambda d: cut_short(d / "test/cat/3.png", 0.01), "test/cat/3.png"),
    "an empty file": (lambda d: make_file(d / "test/dog/1.png", b""), "test/dog/1.png"),
    "text as an image": (lambda d: make_file(d / "train/dog/x.jpg"), "train/dog/x.jpg"),
    "a folder as an image": (lambda d: (d / "train/dog/x.png").mkdir(), None),
    "a dead link": (lambda d: (d / "train/dog/x.png").symlink_to(d / "nowhere"), "train/dog/x.png"),
    "half an archive": (lambda d: (shutil.rmtree(d / "train"), shutil.rmtree(d / "test"), make_file(
        d / "cifar-10-python.tar.gz")), "no network"),
    "half-unpacked": (lambda d: (shutil.rmtree(d / "train"), shutil.rmtree(d / "test"), make_file(
        d / "cifar-10-batches-py" / "data_batch_1")), "no network")}


@pytest.mark.parametrize("damage", DATA)
def test_bad_data_is_named(damage, finished, data_dir, tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    data, folder = tmp_path / "data", tmp_path / "results"
    shutil.copytree(data_dir, data)
    shutil.copytree(finished, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    break_it, named = DATA[damage]
    break_it(data)
    code = run("--stage", "student", "--data-dir", data, "--results-dir", folder, "--epochs", 1)
    out, err = capsys.readouterr()
    if named is None:  # harmless
        assert code == 0 and err == "" and "160 training images" in out
        return
    assert code == 1 and err.startswith("kd.py: ") and err.count("\n") == 1 and named in err
    assert "Traceback" not in err
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_other_colour_modes_are_converted_and_other_files_skipped(data_dir, data, tmp_path):
    root, expected = tmp_path / "data", []
    shutil.copytree(data_dir, root)
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for mode in ("L", "P", "RGBA", "LA", "1"):
        image = Image.fromarray(colours).convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(0)  # invisible, as a viewer would show it
        image.save(root / "train" / "frog" / f"mode {mode}.png")
        pixels = np.asarray(image) if mode != "P" else np.asarray(image.getpalette()).reshape(
            -1, 3)[np.asarray(image)]
        if mode in ("L", "1"):
            pixels = np.stack([pixels * (255 if mode == "1" else 1)] * 3, axis=2)
        expected.append(pixels[:, :, [0, 0, 0] if mode == "LA" else [0, 1, 2]])
    for name in ("Thumbs.db", ".DS_Store", "notes.txt"):
        make_file(root / "train" / "frog" / name)
    make_file(root / "train" / "README.md")
    images, labels, *_ = kd.load_cifar10(root)
    assert len(images) == len(data[0]) + 5
    frogs = {image.numpy().tobytes() for image in images[labels == kd.CLASSES.index("frog")]}
    for pixels in expected:
        assert pixels.astype(np.uint8).transpose(2, 0, 1).tobytes() in frogs


def full_disk(monkeypatch, folder):
    """Files may grow to 100 kB: like a disk that runs full while a checkpoint is written."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))


def no_memory(monkeypatch, folder):
    monkeypatch.setattr(kd, "training_batches", lambda *_: torch.empty(2**60))


PLACES = {  # what is wrong: how it comes about, the results folder, what the line must say
    "a file": (lambda _, folder: make_file(folder), "", "File exists"),
    "below a file": (lambda _, folder: make_file(folder), "below", "Not a directory"),
    "not to be made": (lambda *_: None, "/proc/results", "/proc/results"),
    "a full disk": (full_disk, "", ""),
    "no memory": (no_memory, "", "--batch-size")}


@pytest.mark.parametrize("what", PLACES)
def test_no_place_to_write_and_no_memory(what, finished, data_dir, tmp_path, capsys, monkeypatch):
    folder, limits = tmp_path / "results", resource.getrlimit(resource.RLIMIT_FSIZE)
    prepare, below, words = PLACES[what]
    if what in ("a full disk", "no memory"):
        shutil.copytree(finished, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}
    prepare(monkeypatch, folder)
    try:
        code = run("--stage", "student", "--data-dir", data_dir, "--device", "cpu", "--epochs", 1,
                   "--results-dir", folder / below)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 1 and err.startswith("kd.py: ") and err.count("\n") == 1 and words in err
    if folder.is_dir():
        assert before == {p.name: p.read_bytes() for p in folder.iterdir()
                          if not p.name.startswith("unfinished.")}
    else:
        assert not folder.exists() or folder.read_bytes() == b"some bytes"
