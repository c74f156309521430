"""Where a training step's time goes on a GPU, and whether a line or two would shorten it. Prints
milliseconds per step (inputs already on the device), then the kernels that take most of the time,
then forward and backward of each part of the teacher. Run it from the repository's root:

python results/study/step_profile.py

step_profile_h200.txt is what an earlier form of it, with other titles, printed on an NVIDIA H200
(of kernel tables, the longest rows).
"""

import sys
import time

import torch
import torch.nn.functional as F

sys.path.append(".")
import kd

DEVICE = torch.device("cuda")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
VARIANTS = {  # layout, type, cudnn.benchmark, fused SGD
    "now": ("channels_last", torch.bfloat16, False, None),
    "bench": ("channels_last", torch.bfloat16, True, None),
    "contig": ("contiguous", torch.bfloat16, False, None),
    "bench+contig": ("contiguous", torch.bfloat16, True, None),
    "fp16": ("channels_last", torch.float16, False, None),
    "bench+fp16": ("channels_last", torch.float16, True, None),
    "tf32": ("channels_last", torch.float32, False, None),
    "bench+fused": ("channels_last", torch.bfloat16, True, True),
}


def milliseconds(step, repeats=15):
    for _ in range(4):  # warm-up
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / repeats


def training_step(kind, batch_size, distil, variant):
    layout, dtype, benchmark, fused = VARIANTS[variant]
    layout = LAYOUTS[layout]
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = True
    model = kind().to(DEVICE, memory_format=layout)
    teacher = kd.TeacherModel().to(DEVICE, memory_format=layout).eval()
    inputs = torch.randn(batch_size, 3, 32, 32, device=DEVICE).contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch_size,), device=DEVICE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused
    )

    def compute_logits(network):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not torch.float32):
            return network(inputs).float()

    def step():
        logits = compute_logits(model)
        if distil:
            with torch.no_grad():
                teacher_logits = compute_logits(teacher)
            loss = kd.distillation_loss(logits, teacher_logits, labels, 4.0, 0.1)
        else:
            loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def print_kernels(step, rows):
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.key_averages() if event.device_type == cuda]
    busy = sum(event.self_device_time_total for event in events) / 3000
    print(f"  GPU busy {busy:.2f} ms per step, {sum(event.count for event in events) // 3} kernels")
    events.sort(key=lambda event: event.self_device_time_total, reverse=True)
    for event in events[:rows]:
        time_per_step = event.self_device_time_total / 3000
        print(f"  {time_per_step:7.3f} ms {event.count // 3:4d}x {event.key[:150]}")


def part_milliseconds(part, shape, layout):
    inputs = torch.randn(2048, *shape, device=DEVICE).to(torch.bfloat16)
    inputs = inputs.contiguous(memory_format=layout).requires_grad_()

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            outputs = part(inputs)
        outputs.backward(torch.ones_like(outputs))
        inputs.grad = None

    return milliseconds(step, 10)


print(torch.cuda.get_device_name(), torch.__version__, torch.backends.cudnn.version())
cases = {
    "teacher": (kd.TeacherModel, False),
    "student": (kd.StudentModel, False),
    "distil": (kd.StudentModel, True),
}
for batch_size in (2048, 512):
    for name, (kind, distil) in cases.items():
        line = f"{batch_size} {name}"
        for variant in VARIANTS:
            if distil and variant not in ("now", "bench", "bench+contig"):
                continue
            step = training_step(kind, batch_size, distil, variant)
            line += f"  {variant} {milliseconds(step):.2f}"
        print(line, flush=True)
for name, batch_size, variant, rows in (
    ("teacher", 2048, "now", 22),
    ("teacher", 2048, "bench", 22),
    ("teacher", 2048, "bench+contig", 16),
    ("student", 512, "bench", 14),
):
    print(name, batch_size, variant)
    print_kernels(training_step(cases[name][0], batch_size, False, variant), rows)
for layout in LAYOUTS.values():
    for benchmark in (False, True):
        torch.backends.cudnn.benchmark = benchmark
        teacher = kd.TeacherModel().to(DEVICE, memory_format=layout)
        parts = {
            "stem": (teacher.stem, (3, 32, 32)),
            "block1": (teacher.block1, (16, 32, 32)),
            "skip1": (teacher.skip, (16, 32, 32)),
            "block2": (teacher.block2, (16, 16, 16)),
            "block3": (teacher.block3, (64, 8, 8)),
            "head": (teacher.head, (128, 4, 4)),
            "conv16": (teacher.block1[1][0], (16, 32, 32)),
            "bn16": (teacher.stem[2], (16, 32, 32)),
            "pool16": (torch.nn.MaxPool2d(2), (16, 32, 32)),
        }
        line = f"{layout} bench {benchmark}"
        for name, (part, shape) in parts.items():
            line += f"  {name} {part_milliseconds(part, shape, layout):.2f}"
        print(line, flush=True)
images = torch.randint(0, 256, (50000, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
labels = torch.zeros(50000, dtype=torch.int64, device=DEVICE)
for batch_size in (2048, 512):
    settings = kd.Settings(batch_size=batch_size, shift=4, flip=0.5)

    def augment_epoch(settings=settings):
        for _ in kd.training_batches(images, labels, settings, 0, 1):
            pass

    print("augmentation, whole epoch", batch_size, f"{milliseconds(augment_epoch, 3):.0f} ms")
