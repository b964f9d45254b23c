"""The memory of a step, measured or modelled, and the largest batch that fits."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

import gpl_fast
from gpl_fast.net.lossnet import LossNet
from gpl_fast.tools import measure
from gpl_fast.tools.workload import TOP, Shape, make_inputs, make_loss

HELD = 16 * 2**20  # bytes that allocators and libraries hold on to besides a step's own
# Bytes of (N, C, H, W) maps for each class and pixel of a step in plain PyTorch, as measured.
NAIVE = {"labels": 17, "dense": 21, "topk": 17}
GIB = 2**30


@dataclass(frozen=True)
class Used:
    """Of one step: bytes of its inputs, of what it adds at its peak, of what autograd keeps."""

    inputs: int
    peak: int | None
    saved: int


def used_by(
    name: str, shape: Shape, kind: str, device: str, workspace_mb: float | str = "auto"
) -> Used:
    """A step's memory; on the CPU to be called in a process of its own."""
    loss = make_loss(name, shape[1], workspace_mb)
    # Libraries, threads and cached weights are up before the baseline.
    measure.step(loss, *make_inputs((1, shape[1], 32, 32), kind, device))
    logits, target = make_inputs(shape, kind, device)
    peak, saved = measure.memory(loss, logits, target, loss.net.cached_tensors)
    tensors = (logits, *measure.target_tensors(target))
    inputs = sum(t.untyped_storage().nbytes() for t in tensors)
    return Used(inputs, None if peak is None else int(peak * 2**20), saved)


def memory_of(
    row: dict[str, Any],
    loss: gpl_fast.GenericPerceptualLoss,
    shape: Shape,
    kind: str,
    device: str,
    free: int | None,
) -> str | None:
    """Memory and the largest batch into `row`; why the step cannot be run, or None.

    The batch: with two batches of N/2 and N images (1 and 2 for N = 1) measured, memory grows by
    their difference for each image more. Where they do not fit: by `needed_bytes`.
    """
    n, c, h, w = shape
    small, large = (max(n // 2, 1), n) if n > 1 else (1, 2)
    needed = {m: needed_bytes(loss, (m, c, h, w), kind, device) for m in (1, n, large)}
    if free is not None and needed[n] > free:
        row["largest_batch"], row["batch_rule"] = free // needed[1], "modelled"
        return f"about {needed[n] / GIB:.3g} GiB needed, {free / GIB:.3g} GiB are there"
    measured = (small, large) if free is None or needed[large] <= free else (n,)
    try:
        workspace = loss.options.workspace_mb
        used = {
            m: _measured(row["provider"], (m, c, h, w), kind, device, workspace) for m in measured
        }
    except RuntimeError as error:  # out of memory, on a GPU
        return str(error).splitlines()[0]
    peak, row["saved_bytes"] = used[n].peak, used[n].saved
    row["peak_mib"] = None if peak is None else peak / 2**20
    if free is None or peak is None:
        return None
    if len(used) == 1:
        row["largest_batch"], row["batch_rule"] = max(free // needed[1], n), "modelled"
        return None
    all_of = {m: u.inputs + (u.peak or 0) for m, u in used.items()}
    # Logits, their gradient and the target grow, whatever the resident set's pages say.
    least = (used[n].inputs + 4 * n * c * h * w) / n
    growth = max((all_of[large] - all_of[small]) / (large - small), least)
    row["largest_batch"] = int(n + (free - all_of[n]) // growth)
    row["batch_rule"] = "measured"
    return None


def _measured(name: str, shape: Shape, kind: str, device: str, workspace_mb: float | str) -> Used:
    if device != "cpu":
        return used_by(name, shape, kind, device, workspace_mb)
    used: Used = measure.in_fresh_process(used_by, name, shape, kind, device, workspace_mb)
    return used


def needed_bytes(loss: gpl_fast.GenericPerceptualLoss, shape: Shape, kind: str, device: str) -> int:
    """What a step needs at most, inputs included: without running it."""
    n, c, h, w = shape
    if loss.options.backend == "reference":
        return naive_bytes(loss.net, shape, NAIVE[kind])
    # Of one element each: `explain` looks at shapes and at the labels' values, and would look for
    # probabilities all over a dense target.
    loss = copy.copy(loss)
    loss.options = replace(loss.options, target_activation="same")
    logits = torch.zeros((), device=device).expand(shape)
    labels = torch.zeros((), dtype=torch.long, device=device).expand(n, h, w)
    explained = loss.explain(logits, logits if kind == "dense" else labels)
    # Labels and lists are checked into a copy, a list's values divided by their sum.
    listed = {"labels": 2 * 8, "dense": 4 * c, "topk": (2 * 12 + 4) * TOP}[kind]
    transient = explained.workspace_bytes or 0
    return n * h * w * (2 * 4 * c + listed) + explained.bytes_saved + transient + HELD


def naive_bytes(net: LossNet, shape: Shape, per_class: int) -> int:
    """About what plain PyTorch in float32 needs for a step, inputs included: the maps of all
    classes, and the network's activations: four times its convolutions' outputs, as measured."""
    n, c, h, w = shape
    sizes = net.shapes(h, w)
    outputs = sum(torch.Size(sizes[x.name]).numel() for x in net.layers if x.kind == "conv")
    return n * (per_class * c * h * w + 16 * outputs) + HELD
