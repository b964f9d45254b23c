"""Training, evaluation and what is measured on the way.

The step is cut at the logits (forward, loss with its gradient by the logits, backward from there):
the same gradient as one ``backward()``, and the loss can be timed apart from the network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gpl_fast.demo.models import UNet
from gpl_fast.demo.scenes import NUM_CLASSES, Scenes
from gpl_fast.experiments.frame import OnStep

# (logits (B, C, S, S), labels (B, S, S), index of the scenes (B,)) -> 0-dim loss
Criterion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_WARM_UP = 3  # steps left out of the timings


@dataclass(frozen=True)
class Schedule:
    """One training: AdamW, one-cycle learning rate, ``points`` evaluations, the last at the end."""

    steps: int
    batch: int
    lr: float
    seed: int
    points: int = 10


@dataclass
class Trace:
    """What one training left behind; steps count from 1."""

    losses: list[float] = field(default_factory=list)  # one a step
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, mIoU)
    miou: float = float("nan")
    accuracy: float = float("nan")
    step_seconds: float = float("nan")  # median of a whole step
    loss_seconds: float = float("nan")  # median of the loss's forward and backward


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The baseline's criterion."""
    return F.cross_entropy(logits, labels)


def confusion(net: nn.Module, scenes: Scenes, device: torch.device) -> torch.Tensor:
    """Counts (C, C) int64: row = true class, column = predicted class, over all pixels."""
    was_training = net.training
    net.eval()
    counts = torch.zeros(NUM_CLASSES**2, dtype=torch.int64, device=device)
    with torch.no_grad():
        for index in torch.split(torch.arange(len(scenes)), 64):
            images, labels = scenes.batch(index, device)
            cells = labels * NUM_CLASSES + net(images).argmax(1)
            counts += torch.bincount(cells.flatten(), minlength=NUM_CLASSES**2)
    net.train(was_training)
    return counts.view(NUM_CLASSES, NUM_CLASSES).cpu()


def mean_iou(counts: torch.Tensor) -> float:
    """Mean over classes of intersection / union; a class neither there nor predicted is left out.

    Args:
        counts: (C, C), row = true class, column = predicted class.
    """
    both = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - both
    there = union > 0
    return float((both[there] / union[there]).mean()) if there.any() else float("nan")


def pixel_accuracy(counts: torch.Tensor) -> float:
    """Share of pixels, (C, C) as above, whose class is right."""
    return float(counts.diagonal().sum() / counts.sum())


def train(
    width: int,
    train_scenes: Scenes,
    test_scenes: Scenes,
    schedule: Schedule,
    device: torch.device,
    criterion: Criterion = cross_entropy,
    on_step: OnStep | None = None,
) -> tuple[UNet, Trace]:
    """A U-Net of ``width`` and its trace. The seed fixes initialisation and the order of scenes."""
    torch.manual_seed(schedule.seed)
    net = UNet(NUM_CLASSES, width).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = torch.Generator().manual_seed(schedule.seed + 10_000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=schedule.lr)
    # Below ten steps its rise would be empty: a division by zero in PyTorch.
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.lr, total_steps=max(schedule.steps, 10), pct_start=0.2
    )
    trace, last = Trace(), None
    step_times: list[float] = []
    loss_times: list[float] = []
    for step in range(1, schedule.steps + 1):
        start = _now(device)
        index = torch.randint(len(train_scenes), (schedule.batch,), generator=order)
        images, labels = train_scenes.batch(index, device)
        logits: torch.Tensor = net(images)
        leaf = logits.detach().requires_grad_()

        loss_start = _now(device)
        loss = criterion(leaf, labels, index)
        (gradient,) = torch.autograd.grad(loss, leaf)
        loss_times.append(_now(device) - loss_start)

        optimizer.zero_grad()
        logits.backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
        step_times.append(_now(device) - start)

        trace.losses.append(float(loss.detach()))
        if (
            step * schedule.points // schedule.steps
            > (step - 1) * schedule.points // schedule.steps
        ):
            last = mean_iou(confusion(net, test_scenes, device))
            trace.curve.append((step, last))
        if on_step is not None:
            on_step(trace.losses[-1], last)
    counts = confusion(net, test_scenes, device)
    trace.miou, trace.accuracy = mean_iou(counts), pixel_accuracy(counts)
    trace.step_seconds, trace.loss_seconds = _median(step_times), _median(loss_times)
    return net.eval(), trace


def all_logits(net: nn.Module, scenes: Scenes, device: torch.device) -> torch.Tensor:
    """The teacher's opinion on every scene, (N, C, S, S) float16 on the CPU."""
    with torch.no_grad():
        parts = [
            net(scenes.batch(index, device)[0]).to("cpu", torch.float16)
            for index in torch.split(torch.arange(len(scenes)), 64)
        ]
    return torch.cat(parts).contiguous()


def predict(net: nn.Module, scenes: Scenes, count: int, device: torch.device) -> torch.Tensor:
    """Classes (count, S, S) int64 for the first scenes."""
    with torch.no_grad():
        images, _ = scenes.batch(torch.arange(count), device)
        logits: torch.Tensor = net(images)
    return logits.argmax(1).cpu()


def bytes_saved(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps alive for the backward of one ``call(*inputs)``.

    Every storage counts once and whole. Left out: the inputs' own storages (the caller holds them
    anyway) and what two calls that are alive at the same time share (the frozen network's weights).
    """
    alive: list[Any] = []  # keeps addresses unique while they are compared
    saved: list[dict[int, int]] = []
    for _ in range(2):
        own = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        excluded = {t.untyped_storage().data_ptr() for t in own}
        sizes: dict[int, int] = {}

        def keep(
            tensor: torch.Tensor, excluded: set[int] = excluded, sizes: dict[int, int] = sizes
        ) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in excluded:
                sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive.append((own, call(*own)))
        saved.append(sizes)
    return sum(size for at, size in saved[1].items() if at not in saved[0])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _median(values: Sequence[float]) -> float:
    return statistics.median(values[_WARM_UP:] or values)
