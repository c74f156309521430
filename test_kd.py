"""Tests of kd.py, offline: against torchvision, float64 arithmetic and cases made by hand. First
the experiment: data, networks, loss, training. Then files: resuming, interruptions, refusals."""

import dataclasses
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TVF

import kd

OPTIONS = ["--epochs", 4, "--batch-size", 16, "--lr", 0.003]
kd.DEVICE = torch.device("cpu")
kd.bf16_is_faster = lambda: False  # float32 on every CPU, to compare results closely


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """An easy set: 16 training and 8 test images per class, of its colour, with noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, n in (("train", 16), ("test", 8)):
        for label, name in enumerate(kd.CLASSES):
            (root / split / name).mkdir(parents=True)
            colour = np.array([label % 3, label // 3, 0]) * 60 + 30
            for i in range(n):
                image = colour + rng.integers(-29, 30, (32, 32, 3))
                Image.fromarray(image.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(data_dir):
    return {split: kd.load_split(data_dir, split) for split in ("train", "test")}


def run(data_dir, folder, stage, *options):
    options = ["--stage", stage, "--data-dir", data_dir, "--results-dir", folder, *options]
    kd.main([str(option) for option in options])


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The results of `--stage all` on the small set."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    run(data_dir, folder, "all", *OPTIONS)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Except in `finished`: drawing takes most of a small run's time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: None)


def run_of(folder, name):
    return kd.load(name, folder)[1]


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def saved_weights(folder, name):
    return weights(kd.load(name, folder)[0])


def labelled(images, labels):
    """To compare two sets of labelled images in any order."""
    pixels = [image.contiguous().numpy().tobytes() for image in images]
    return sorted(zip(labels.tolist(), pixels, strict=True))


def test_both_layouts_give_the_same_images_with_their_labels(data_dir, data, tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    (folder / "meta").write_bytes(pickle.dumps({"label_names": kd.CLASSES}))
    for split, (images, labels) in data.items():
        files = []
        for label, name in enumerate(kd.CLASSES):
            for path in (data_dir / split / name).iterdir():
                files.append((label, np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes()))
        assert labelled(images, labels) == sorted(files)
        assert len(labels[:60].unique()) == 10  # mixed
        rows = [np.frombuffer(pixels, np.uint8) for _, pixels in files]
        content = {"data": rows, "labels": [label for label, _ in files]}
        (folder / split).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(CIFAR10, f"{split}_list", [(split, None)])  # None: no checksum
    for split in data:
        for ours, theirs in zip(kd.load_split(tmp_path, split), data[split], strict=True):
            assert torch.equal(ours, theirs)


def test_affine_and_normalise_equal_torchvision():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8, generator=generator)
    changes = torch.rand(5, 400, generator=generator) * 20 - 10  # angle, shear, shifts, mirror
    changes[2:4].round_()
    changes[4].sign_()
    theirs = []
    for image, (angle, shear, dx, dy, mirror) in zip(images, changes.T.tolist(), strict=True):
        if mirror < 0:
            image = TVF.hflip(image)
        theirs.append(TVF.affine(image, angle, [int(dx), int(dy)], 1.0, [shear, 0.0]))
    ours = kd.affine(images, changes)
    assert ours.dtype == torch.float32
    assert (ours != torch.stack(theirs)).any(dim=1).sum() <= 5  # of 409,600 pixels: rounding
    theirs = TVF.normalize(ours / 255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    torch.testing.assert_close(kd.normalise(ours), theirs)


def test_augmentation_goes_as_far_as_the_settings_say(monkeypatch):
    recorded = []
    monkeypatch.setattr(kd, "affine", lambda images, changes: recorded.append(changes) or images)
    settings = kd.Settings(batch_size=1000, shear=5.0, shift=2, flip=0.25, cutout=12)
    white = torch.full((1000, 3, 32, 32), 255)
    inputs, _ = next(kd.training_batches(white, torch.zeros(1000), settings, 1))
    angle, shear, dx, dy, mirror = recorded[0]
    assert (angle.min(), angle.max()) == pytest.approx((-10, 10), abs=0.1)
    assert (shear.min(), shear.max()) == pytest.approx((-5, 5), abs=0.1)
    assert set(dx.tolist()) == set(dy.tolist()) == {-2, -1, 0, 1, 2}
    assert set(mirror.tolist()) == {-1, 1} and 200 < (mirror < 0).sum() < 300
    lost = (inputs == 0).all(dim=1)
    rows = lost.any(dim=2).sum(dim=1)
    columns = lost.any(dim=1).sum(dim=1)
    assert torch.equal(rows * columns, lost.sum(dim=(1, 2)))  # rectangles: squares, …
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(6, 13))  # … some cut off


def test_an_epoch_shows_every_image_once_and_follows_from_seed_and_epoch(data):
    images, labels = data["train"]

    def epoch(number, **changes):
        settings = dataclasses.replace(kd.STRONG, batch_size=60, **changes)
        batches = kd.training_batches(images, labels, settings, number)
        return [torch.cat(parts) for parts in zip(*batches, strict=True)]

    inputs, targets = epoch(1, shift=0, flip=0.0, cutout=0)
    assert labelled(inputs, targets) == labelled(kd.normalise(images), labels)
    assert not torch.equal(targets, labels)
    inputs, _ = epoch(3)
    assert torch.equal(inputs, epoch(3)[0])
    assert not torch.equal(inputs, epoch(4)[0]) and not torch.equal(inputs, epoch(3, seed=1)[0])


@pytest.mark.parametrize("kind, reported", [(kd.TeacherModel, 729_712), (kd.StudentModel, 230_192)])
def test_layers_and_parameters_are_the_original_s(kind, reported, capsys):
    network = kd.new_network(kind, 0)
    out = capsys.readouterr().out  # torchsummary's table
    assert f"Total params: {reported:,}\n" in out
    layers = re.findall(r"(\w+)-\d+ ", out)
    assert layers[:3] == ["Conv2d", "ReLU", "BatchNorm2d"] and layers.count("Conv2d") == 24
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    assert all(weight.grad.any() for weight in network.parameters())  # each has an effect


def by_hand(student, teacher, labels, t, alpha):
    """The formula, written out in float64."""
    log_p = (teacher.double() / t).log_softmax(dim=1)
    log_q = (student.double() / t).log_softmax(dim=1)
    soft = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    hard = -student.double().log_softmax(dim=1)[range(len(labels)), labels]
    return (alpha * hard + (1 - alpha) * t * t * soft).mean()


@pytest.mark.parametrize("t, alpha", [(1, 0), (2.5, 0.3), (20, 0.9), (5, 1)])
@pytest.mark.parametrize("scale", [4, 60])  # 60: in float32, a softmax underflows
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loss_equals_float64_arithmetic(t, alpha, scale, dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(2, 6, 10, generator=generator)).to(dtype)
    labels = torch.randint(0, 10, (6,), generator=generator)
    loss = kd.distillation_loss(student, teacher, labels, t, alpha)
    assert loss.shape == () and loss.dtype == torch.float32
    expected = by_hand(student, teacher, labels, t, alpha).item()
    assert loss.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "losses, stops_at",
    [
        ([2.0, 1.5, 1.49, 1.48, 1.47], 5),  # three small changes in a row
        ([2.0, 1.5, 1.51, 1.50, 1.51], 5),  # small rises count, too
        ([2.0, 1.5, 1.49, 1.48, 1.2, 1.19, 1.18, 1.17], 8),  # a large one starts the count anew
    ],
)
def test_early_stopping(losses, stops_at):
    for epoch in range(1, stops_at + 1):
        assert kd.is_finished(losses[:epoch], kd.Settings(patience=3)) == (epoch == stops_at)
    assert not kd.is_finished(losses, kd.Settings(patience=3, min_delta=0.0))
    assert kd.is_finished([2.0], kd.Settings(epochs=1))


def train_by_hand(student, teacher, alpha, clip, factors, data):
    """Two epochs of two steps; lr is 0.01 times the step's factor. Returns each step's loss."""
    student.train()
    teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), momentum=0.9, weight_decay=0.1)
    batches = []
    for epoch in (1, 2):
        batches += kd.training_batches(*data["train"], kd.Settings(batch_size=80, seed=3), epoch)
    losses = []
    for (inputs, labels), factor in zip(batches, factors, strict=True):
        loss = by_hand(student(inputs), teacher(inputs).detach(), labels, 5, alpha)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    "warm_start, clip, warmup, factors",
    [(1, 1e9, 0, [1, 1, 1, 1]), (0, 0.5, 0.5, [0, 0.5, 1, 0.5])],
)
def test_second_trainings_are_what_a_plain_loop_computes(
    warm_start, clip, warmup, factors, copy, data_dir, data
):
    options = ["--epochs", 2, "--batch-size", 80, "--min-delta=0", "--seed=3", "--weight-decay=0.1"]
    options += ["--grad-clip", clip, "--warmup", warmup, "--warm-start", warm_start]
    teacher, _ = kd.load("teacher", copy)
    for name, alpha in (("dist_student", 0.5), ("control", 1)):
        (copy / f"{name}.pt").unlink()
        run(data_dir, copy, name, *options)
        student, _ = kd.load("student", copy)
        if not warm_start:
            torch.manual_seed(3)
            student = kd.StudentModel()
        start = weights(student)
        losses = train_by_hand(student, teacher, alpha, clip, factors, data)
        log = kd.column(run_of(copy, name)["log"], "train_loss")
        assert log == pytest.approx([np.mean(losses[:2]), np.mean(losses[2:])], rel=0.01)
        distance = saved_weights(copy, name) - weights(student)
        assert distance.norm() < 0.03 * (weights(student) - start).norm()


def test_control_runs_as_many_epochs_as_dist_student(copy, data_dir):
    """Not until the last epoch, nor until its own loss would stop it (here after two epochs)."""
    distilled = run_of(copy, "dist_student")
    del distilled["log"][3:]
    torch.save(distilled, copy / "dist_student.pt")
    (copy / "control.pt").unlink()
    run(data_dir, copy, "control", *OPTIONS, "--patience", 1, "--min-delta", 1e9)
    assert len(run_of(copy, "control")["log"]) == 3


def test_early_stopping_does_not_look_at_the_test_images(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "test", lambda network, data: {"test_loss": 1.0, "test_acc": 50.0})
    options = ["--limit", 20, "--epochs", 4, "--patience", 2, "--min-delta", 1e-6]
    run(data_dir, tmp_path, "student", *options)
    assert len(run_of(tmp_path, "student")["log"]) == 4  # the training loss still changes


def test_strong_with_few_images(data_dir, tmp_path):
    """Only the teacher sees all images, teacher.pt fits any T and N, and control is the student."""
    options = ["--recipe", "strong", "--epochs", 2, "--limit", 30]
    few = tmp_path / "few"
    run(data_dir, few, "all", *options, "--student-images", 12)
    assert "on 30 test images" in (few / "summary.md").read_text("utf-8")
    assert run_of(few, "student")["log"] == run_of(few, "control")["log"]  # not trained twice
    folder = tmp_path / "other"
    run(data_dir, folder, "teacher", *options)
    assert torch.equal(saved_weights(few, "teacher"), saved_weights(folder, "teacher"))
    for stage in ("student", "dist_student"):  # as if there were no other images
        run(data_dir, folder, stage, *options, "--limit", 12)
        assert torch.equal(saved_weights(few, stage), saved_weights(folder, stage))
    run(data_dir, folder, "teacher", "--resume", *options, "--temperature=2", "--student-images=9")


def test_no_step_reads_from_the_device_and_bf16_is_used(monkeypatch, data):
    """Reading a number (`aten::_local_scalar_dense`) would make the CPU wait for a GPU."""
    monkeypatch.setattr(kd, "bf16_is_faster", lambda: True)
    student = kd.StudentModel()
    dtypes = []
    student.register_forward_hook(lambda network, inputs, logits: dtypes.append(logits.dtype))
    teacher = kd.TeacherModel().eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    settings = kd.Settings(batch_size=2, cutout=8, grad_clip=1.0)
    images, labels = [tensor[:8] for tensor in data["train"]]  # four steps
    with torch.profiler.profile() as profile:
        kd.train_epoch(student, teacher, optimizer, images, labels, settings, 1)
    assert dtypes == 4 * [torch.bfloat16]
    operations = [event.name for event in profile.events()]
    assert 0 < operations.count("aten::_local_scalar_dense") < 4  # those at the epoch's end


def test_all_four_learn(data_dir, tmp_path):
    options = ["--batch-size", 32, "--lr", 0.002, "--warmup", 0.2, "--min-delta", 0]
    for name, epochs in zip(kd.NAMES, (10, 10, 2, 2), strict=True):
        run(data_dir, tmp_path, name, "--epochs", epochs, *options)
        assert run_of(tmp_path, name)["log"][-1]["test_acc"] > 60, name  # chance: 10


def test_all_leaves_its_files_and_the_figures_are_right(finished, data):
    files = {"summary.md", "accuracy.png", "soft_targets.png", "misclassified.png"}
    for name in kd.NAMES:
        files |= {f"{name}.pt", f"{name}_train_logs.csv", f"{name}_train_logs.png"}
    assert {path.name for path in finished.iterdir()} == files
    summary = (finished / "summary.md").read_text("utf-8")
    images, labels = data["test"]
    answers = {}
    right = {}
    for name, parameters in zip(kd.NAMES, ["722,752"] + 3 * ["223,232"], strict=True):
        network, _ = kd.load(name, finished)
        logits = network(kd.normalise(images)).detach()
        answers[name] = logits.argmax(1)
        right[name] = 100.0 * (answers[name] == labels)
        agreement = 100 * (answers[name] == answers["teacher"]).float().mean()
        log = np.genfromtxt(finished / f"{name}_train_logs.csv", delimiter=",", names=True)
        row = [name, parameters, "4", f"{log['train_acc'][-1]:.2f}", f"{right[name].mean():.2f}"]
        row += [f"{F.cross_entropy(logits, labels):.3f}", f"{agreement:.2f}"]
        assert " | ".join(row) in summary
        assert log["test_acc"][-1] == pytest.approx(right[name].mean().item(), abs=0.01)
    gain = right["dist_student"].mean() - right["control"].mean()
    assert f"dist_student - control: {gain:+.2f} ±" in summary


def test_a_difference_is_told_from_chance():
    """Of 100 images, 10 are won and 6 or none are lost: by hand, 4 ± 4.00 and 10 ± 3.02."""
    before = torch.arange(100) < 6
    after = torch.arange(100) >= 90
    words = "+4.00 ± 4.00 points on 100 test images, which may be chance"
    assert words in kd.difference(after, before)
    assert "chance" not in kd.difference(after, torch.zeros(100))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def refused(data_dir, folder, stage, *options):
    """The line that a refused command shows. It has changed nothing in the folder."""
    before = contents(folder)
    with pytest.raises(SystemExit) as error:
        run(data_dir, folder, stage, *options)
    assert contents(folder) == before
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def test_resume_trains_nothing_and_other_options_are_refused(copy, data_dir):
    assert "--resume" in refused(data_dir, copy, "all", *OPTIONS)
    before = contents(copy)
    (copy / "student_train_logs.csv").unlink()
    run(data_dir, copy, "all", "--resume", *OPTIONS)
    assert contents(copy) == before
    for option, words in (
        ("--seed=3", "teacher.pt was made with seed 0, not 3"),
        ("--temperature=3", "dist_student.pt was made with temperature 5.0, not 3.0"),
        ("--student-images=9", "student.pt was made with student_images 50000, not 9"),
    ):
        assert words in refused(data_dir, copy, "all", "--resume", *OPTIONS, option)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "disk full")])
def test_after_an_interruption_resume_ends_the_same(error, data_dir, tmp_path, monkeypatch):
    """The second save writes part of a file, then fails."""
    options = ["--limit", 20, "--epochs", 4, "--patience", 2, "--min-delta", 1e9]  # stops after 3
    whole = tmp_path / "whole"
    run(data_dir, whole, "student", *options)
    save = torch.save
    files = []

    def interrupted(content, file):
        files.append(file)
        if len(files) == 2:
            file.write(b"PK")
            raise error
        save(content, file)

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped|full"):
        patch.setattr(torch, "save", interrupted)
        run(data_dir, folder, "student", *options)
    run(data_dir, folder, "student", "--resume", *options)
    assert torch.equal(saved_weights(folder, "student"), saved_weights(whole, "student"))
    assert len(run_of(folder, "student")["log"]) == 3


def test_unfinished_damaged_foreign_and_missing_files_are_refused(copy, data_dir):
    student = run_of(copy, "student")
    path = copy / "student.pt"
    torch.save(student | {"finished": False}, path)
    assert "student.pt is not finished" in refused(data_dir, copy, "evaluate")
    path.write_bytes(b"PK")
    assert "student.pt cannot be used" in refused(data_dir, copy, "evaluate")
    for content in (student | {"more": print}, run_of(copy, "teacher"), student["model"]):
        torch.save(content, path)
        assert "student.pt cannot be used" in refused(data_dir, copy, "evaluate")
    path.unlink()
    assert "student.pt is missing: run --stage student" in refused(data_dir, copy, "evaluate")


@pytest.mark.parametrize(
    "name, part, key, words",
    [
        ("teacher", "model", "skip.bias", "dist_student.pt was made with teacher"),
        ("student", "model", "skip.bias", "dist_student.pt was made with start"),
        ("control", "origin", "epochs", "control.pt was made with epochs 5, not 4"),
    ],
)
def test_evaluate_refuses_files_that_do_not_belong_together(name, part, key, words, copy, data_dir):
    changed = run_of(copy, name)
    changed[part][key] += 1
    torch.save(changed, copy / f"{name}.pt")
    assert words in refused(data_dir, copy, "evaluate")


IMPOSSIBLE = """temperature=0 alpha=1.1 alpha=nan lr=-1 lr=inf epochs=0 batch-size=0 warmup=1
warmup=0.2 flip=2 shift=-1 patience=0 limit=0 student-images=0 warm-start=2"""


@pytest.mark.parametrize("option", IMPOSSIBLE.split())
def test_impossible_options_are_usage_errors(option, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        kd.main(["--stage", "all", f"--{option}"])
    assert option.partition("=")[0].replace("-", "_") in capsys.readouterr().err


def test_bad_images_folders_and_losses_are_one_line(data_dir, tmp_path, monkeypatch):
    root = shutil.copytree(data_dir, tmp_path / "data")
    results = tmp_path / "results"
    shutil.copytree(root / "test/cat", root / "test/lion")
    assert "and no others" in refused(root, results, "student")
    Image.new("RGB", (64, 48)).save(root / "train/cat/0.png")
    assert "64×48" in refused(root, results, "student")
    (root / "train/airplane/3.png").write_bytes(b"\x89PNG")
    assert re.search(r"airplane.3\.png", refused(root, results, "student"))
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere")
    assert "nowhere" in refused(tmp_path / "none", results, "student")
    assert "smaller --lr" in refused(data_dir, results, "student", "--lr", 1e9)
    assert "0.png" in refused(data_dir, data_dir / "test/cat/0.png", "student")
