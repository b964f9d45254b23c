"""Losses of labels of single elements, modes "binary" and "multilabel", against what is made by
hand in float64: the maps element by element, the network by `saved.Walk`, PyTorch's binary
cross-entropy."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import ATOL, NARROW, error
from saved import Walk, left_by, terms
from torch import Tensor

from gpl_fast import SegmentationLoss, TargetFeatures, TopK

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"float32": FLOAT, "bfloat16": BF16, "float16": HALF}
CHANNELS = {"binary": 1, "multilabel": 5}
# What the perceptual term compares with; each but the labels is a teacher.
TARGETS = ("labels", "dense", "resized", "topk", "features")
# As in tests/cpu/test_fast.py: the gradient by the routes that were saved, how far these are off.
ROUTED = {FLOAT: ATOL[FLOAT], BF16: 0.06, HALF: 0.01}
SLACK = {FLOAT: 1e-5, BF16: 0.02, HALF: 0.002}
IGNORED = (255, -7)


@dataclass
class Drawn:
    """A loss' options and inputs."""

    options: dict[str, Any]
    logits: Tensor  # (N, C, H, W)
    labels: Tensor  # as given
    teacher: Any
    mask: Tensor | None
    counted: Tensor  # (N, C, H, W) bool: elements that the cross-entropy counts
    leaves: bool  # the others leave the perceptual term

    @property
    def ones(self) -> Tensor:
        return self.labels.view(self.counted.shape) == 1


def drawn(mode: str, kind: str, dtype: torch.dtype, seed: int, size=(2, 17, 14)) -> Drawn:
    pick, c = random.Random(f"{mode} {kind} {dtype} {seed}"), CHANNELS[mode]
    torch.manual_seed(seed)
    n, h, w = size
    # Single elements of a class leave dense maps alone; of one class they are pixels.
    may_leave = kind in ("labels", "dense", "resized") or mode == "binary"
    gpl_ignore = pick.choice(["auto", True, False] if may_leave else ["auto", False])
    options = {
        "mode": mode,
        "gpl_weight": 0.7,
        "gpl_ignore": gpl_ignore,
        "ignore_index": IGNORED,
        "class_weight": pick.choice([None, torch.rand(c) + 0.1]),
        "pos_weight": pick.choice([None, 4 * torch.rand(c)]),
        "label_smoothing": pick.choice([0.0, 0.2]),
        "temperature": pick.choice([1.0, 2.5]),
        "reduction": pick.choice(["mean", "sum", "none"]),
        "net": "1,1",
        "widths": NARROW,
    }
    labels = torch.randint(2, (n, c, h, w))
    labels[:, 0, 3:9, 2:8] = IGNORED[0]
    labels[torch.rand(labels.shape) < 0.1] = IGNORED[1]
    some = torch.rand(n, h, w) < 0.8
    mask = pick.choice([None, some, some * torch.rand(n, h, w) * 1.5])
    counted = labels >= 0
    counted[:, 0, 3:9, 2:8] = False
    if mask is not None:
        counted &= mask.unsqueeze(1) > 0
    leaves = gpl_ignore is True or (gpl_ignore == "auto" and kind == "labels")
    logits = 2 * torch.randn(n, c, h, w)
    if leaves and pick.random() < 0.5:  # nobody looks at those
        logits = logits.where(counted, torch.tensor(float("nan")))
    layout = pick.choice([torch.contiguous_format, torch.channels_last])
    logits = logits.to(dtype).contiguous(memory_format=layout)
    if mode == "binary" and pick.random() < 0.5:
        labels = labels[:, 0]
    teacher = _teacher(kind, (n, c, h, w), options, counted, mask, leaves)
    return Drawn(options, logits, labels, teacher, mask, counted, leaves)


def _teacher(kind, shape, options, counted, mask, leaves):
    n, c, h, w = shape
    if kind == "labels":
        return None
    if kind == "topk":
        k = min(2, c)
        return TopK(torch.rand(n, k, h, w) / k, torch.rand(shape).topk(k, dim=1).indices, "drop")
    if kind == "resized":
        return torch.randn(n, c, h + 5, w - 3)
    dense = torch.randn(shape)
    if kind == "features":
        loss = SegmentationLoss(c, backend="reference", **options)
        if not leaves or mask is None or mask.dtype == torch.bool:
            return loss.encode(dense, counted[:, 0] if leaves else mask)
        return loss.encode(dense, mask * counted[:, 0])
    return dense


def target_map(d: Drawn) -> Tensor:
    """y in float64, before what does not count is taken out."""
    if d.teacher is None:
        return (d.ones & d.counted).double()
    if isinstance(d.teacher, TopK):
        t = d.teacher
        y = torch.zeros(d.counted.shape, dtype=torch.float64)
        return y.scatter_add(1, t.indices.long(), t.values.double())
    t = F.interpolate(d.teacher.double(), d.counted.shape[2:], mode="bilinear")
    return (t / d.options["temperature"]).sigmoid()


def hand_made(d: Drawn, x: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """Both weighted terms of x (N, C, H, W) float64, reduced."""
    o, zero = d.options, torch.zeros((), dtype=torch.float64)
    m = torch.ones_like(x[:, :1]) if d.mask is None else d.mask.double().unsqueeze(1)
    keep = d.counted if d.leaves else (m > 0).expand_as(d.counted)
    y = torch.where(keep, (torch.where(keep, x, zero) / o["temperature"]).sigmoid(), zero)
    e_pred = walk(m * y)
    if isinstance(d.teacher, TargetFeatures):
        e_target = {tap: e.double() for tap, e in d.teacher.features.items()}
    else:
        target = torch.where(keep, target_map(d), zero)
        e_target = Walk(walk.plan, walk.net)(m * target)
    gpl = terms(walk.plan, e_pred, e_target)
    smooth = o["label_smoothing"]
    weights = [None if w is None else w.double().view(-1, 1, 1)
               for w in (o["class_weight"], o["pos_weight"])]  # fmt: skip
    each = F.binary_cross_entropy_with_logits(
        torch.where(d.counted, x, zero), d.ones.double() * (1 - smooth) + smooth / 2,
        weight=weights[0], pos_weight=weights[1], reduction="none",
    )  # fmt: skip
    total, count = (m * t * d.counted for t in (each, torch.ones_like(each)))
    total, count = total.sum(dim=(1, 2, 3)), count.sum(dim=(1, 2, 3))
    if o["reduction"] == "mean":
        return total.sum() / count.sum(), 0.7 * gpl.mean()
    ce, gpl = total / count, 0.7 * gpl
    return (ce.sum(), gpl.sum()) if o["reduction"] == "sum" else (ce, gpl)


def against_float64(mode: str, kind: str, dtype: torch.dtype, seed: int = 0, **size: Any) -> None:
    """The fast path as it is in force: value and gradient by hand, the reference in the same dtype
    and in float64, zeros where an element left."""
    d, c = drawn(mode, kind, dtype, seed, **size), CHANNELS[mode]
    exact = SegmentationLoss(c, backend="reference", compute_dtype=torch.float64, **d.options)
    plain = SegmentationLoss(c, backend="reference", **d.options)
    plain = plain(d.logits, d.labels, d.teacher, d.mask)
    loss, leaf = SegmentationLoss(c, backend="fast", **d.options), d.logits.detach()
    leaf = leaf.requires_grad_()
    value = loss(leaf, d.labels, d.teacher, d.mask)
    plan, saved = left_by(value)
    walk, x = Walk(plan, loss.net, saved), d.logits.double().requires_grad_()
    truth = sum(hand_made(d, x, walk))
    teacher = d.teacher
    if isinstance(teacher, TopK):
        teacher = TopK(teacher.values.double(), teacher.indices, teacher.rest)
    elif isinstance(teacher, Tensor):
        teacher = teacher.double()
    by_reference = exact(d.logits.double(), d.labels, teacher, d.mask)
    assert error(by_reference, truth.detach()) < (1e-6 if kind == "features" else 1e-9)

    # Float16 logits have float16 gradients: as in training, scaled to a good range.
    scale = float(x.numel())
    (grad,) = torch.autograd.grad(value.sum() * scale, leaf)
    (routed,) = torch.autograd.grad(truth.sum() * scale, x)
    stored = isinstance(d.teacher, TargetFeatures)  # in float32, and so is the network then
    floor = torch.finfo(FLOAT if stored else dtype).eps
    assert (value.shape, value.dtype, grad.dtype) == (truth.shape, FLOAT, dtype)
    assert error(value, truth) <= 2 * max(error(plain, truth), floor) + ATOL[dtype]
    assert walk.slack <= SLACK[FLOAT if stored else dtype]
    assert error(grad, routed) <= ROUTED[dtype]
    if d.leaves:
        assert not grad[~d.counted].any()
    if d.mask is not None:
        assert not grad.masked_select(d.mask.unsqueeze(1) == 0).any()
