"""Variants of the second training, to ask what the teacher's part is. The results folder must hold
a trained teacher.pt and student.pt, and neither dist_student.pt nor control.pt. Options after the
variant are kd.py's. Run it from the repository's root:

python results/study/fair.py own_teacher --recipe strong --results-dir runs/own
python results/study/fair.py smoothing --recipe strong --holdout 5000 --results-dir runs/soft
python results/study/fair.py control --recipe strong --holdout 5000 --lr 0.1 --results-dir runs/lr

(The published rows were made without gradient clipping, now --grad-clip 0.)

own_teacher: dist_student learns from the trained student instead of the teacher.
control: a control without a dist_student, for all of the recipe's epochs; --lr is for it alone.
smoothing: the same, with labels smoothed by 0.1: do softer targets help without a teacher?
"""

import dataclasses
import sys

import torch.nn.functional as F

sys.path.append(".")
import kd


def distill_from_itself(args, data):
    student, _ = kd.load_trained("student", args)
    frozen_student, _ = kd.load_trained("student", args)
    kd.train("dist_student", student, args, data, frozen_student)


def settings_of_control(name, args):
    return dataclasses.replace(args.from_student, min_delta=0.0)


cross_entropy = F.cross_entropy


def smoothed_cross_entropy(logits, labels):
    """In training only: test logits need no gradient."""
    if logits.requires_grad:
        return cross_entropy(logits, labels, label_smoothing=0.1)
    return cross_entropy(logits, labels)


variant = sys.argv[1]
stage = "control"
if variant == "own_teacher":
    stage = "dist_student"
    kd.STAGES[stage] = distill_from_itself
else:
    kd.BUILDS_ON["control"] = ["student"]
    kd.settings_of = settings_of_control
if variant == "smoothing":
    F.cross_entropy = smoothed_cross_entropy
kd.main(["--stage", stage, *sys.argv[2:]])
