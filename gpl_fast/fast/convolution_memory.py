"""What a convolution holds beside its maps: its weight as it is read, and ATen's own work."""

from __future__ import annotations

import math

import torch

from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.policy import Way
from gpl_fast.fast.strip import Shape
from gpl_fast.net.weights import padded_channels

# Elements of a map up to which ATen convolves float32 by a matrix of every pixel's window.
WINDOWS = 20480


def weight_bytes(plan: Segments, j: int, ways: set[Way], transposed: bool) -> int:
    """Of step j's weight, one for each way it is read."""
    k = plan.steps[j].kernel_size
    c_in, c_out = padded_channels(plan.steps[j].in_channels), plan.steps[j].out_channels
    if transposed:
        c_in, c_out = c_out, c_in
    if all(way.tile == 0 for way in ways):  # oneDNN's copy, in blocks
        c_in, c_out = _blocks(c_in), _blocks(c_out)
    return sum(way.dtype.itemsize * way.weight_elements(k, c_in, c_out) for way in ways)


def windows(plan: Segments, j: int, way: Way, taken: Shape, made: Shape) -> Shape:
    """What ATen's convolution of maps makes beside its result on a CPU, of the weight's dtype."""
    k = plan.steps[j].kernel_size
    if way.tile or not plan.policy.on_cpu or k == 1 or not _small(k, way, taken):
        return (0,)
    return k * k, *made[:-1], taken[-1]


def transposed_windows(plan: Segments, j: int, way: Way, dz: Shape, dx: Shape) -> Shape:
    """The same of its data gradient."""
    k = plan.steps[j].kernel_size
    if way.tile or not plan.policy.on_cpu:
        return (0,)
    if k == 1:
        return dx
    if _small(k, way, dz):
        return k * k, *dz[:-1], dx[-1]
    if plan.steps[j].stride == 1:
        return (0,)
    n, rows, width, c = dz  # oneDNN's copy, with a border
    return n, rows + 4, width + 4, _blocks(c)


def _small(kernel_size: int, way: Way, taken: Shape) -> bool:
    exact = way.dtype == torch.float32
    return exact and kernel_size == 3 and math.prod(taken) <= WINDOWS


def _blocks(channels: int) -> int:
    """Channels in oneDNN's order."""
    return -(-channels // 32) * 32
