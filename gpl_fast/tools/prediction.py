"""How long a step's kernels will take on a GPU that is not here: a model to argue with.

Its input are the walks' launches (`launches`). A function a kind of kernel makes seconds of tensor
cores, L2, shared memory, memory and instructions; what the kernels are like is data (`columns`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpl_fast.net.weights import padded_channels
from gpl_fast.tools.columns import BEFORE, BEFORE_TILE, NEXT, Kernels
from gpl_fast.tools.gpus import CHIPS, Chip
from gpl_fast.tools.launches import WORKSPACE_MB, launches
from gpl_fast.tools.recorder import GRADIENT, SMALL, Launch
from gpl_fast.tools.workload import Workload

GAPS = {GRADIENT: 4e-6}  # seconds between two kernels of a stream
GAP = 3e-6
HOST_SMALL = 5e-6  # of the host, for a small operator


@dataclass(frozen=True)
class Prediction:
    """Seconds of the kernels of a stage, their launches, and seconds of the host for these."""

    half: str
    stage: str
    launches: int
    seconds: float
    host: float


def launches_on(
    chip: Chip, work: Workload, workspace_mb: float | None
) -> tuple[list[Launch], list[Launch]]:
    """`launches`; None = "auto" of that much memory."""
    if workspace_mb is None:
        return launches(work, chip.auto_mb, chip.architecture, grows=True)
    return launches(work, workspace_mb, chip.architecture)


def predict(
    work: Workload, gpu: str, kernels: Kernels, workspace_mb: float | None = WORKSPACE_MB
) -> list[Prediction]:
    """Every stage of a step, in the order of the walks; None = "auto"."""
    chip, found = CHIPS[gpu], []
    halves = launches_on(chip, work, workspace_mb)
    if kernels.workspace_mb is not None:
        halves = launches(work, kernels.workspace_mb, chip.architecture, grows=True)
    chunk = _images(work)
    for half, made in zip(("forward", "backward"), halves, strict=True):
        for name in dict.fromkeys(launch.name for launch in made):
            some = [part for v in made if v.name == name for part in _parts(v, kernels, chunk)]
            seconds = sum(seconds_of(v, chip, kernels) for v in some)
            host = len(some) * (HOST_SMALL if name == SMALL else kernels.host)
            found.append(Prediction(half, name, len(some), seconds, host))
    return found


def step_seconds(stages: list[Prediction]) -> float:
    """Of a step: the device's, or the host's where it is the slower."""
    return max(sum(s.seconds for s in stages), sum(s.host for s in stages))


def seconds_of(launch: Launch, chip: Chip, kernels: Kernels) -> float:
    """One launch, with what passes before the next one begins."""
    made = {
        "conv_block_fwd": _convolution,
        "convolution (ATen)": _product,
        GRADIENT: _product,
        "conv_block_bwd": _product,
        "conv_block_logits_bwd": _product,
        "softmax_pack_fwd": _softmax,
        "softmax_bwd": _softmax,
    }.get(launch.name, _stream)(launch, chip, kernels)
    return made + GAPS.get(launch.name, GAP)


def _images(work: Workload) -> int:
    """How many went through all layers together: what the first one's maps and gradients take."""
    _, c, h, w = work.shape
    c_in, c_out, maps = padded_channels(c), 64, 2 if work.kind == "dense" else 1
    channels = max(c_in + c_out + c_out // 4, maps * c_in + c_out // 2)
    return max(1, int(2**20 * (BEFORE.workspace_mb or 0) / (2 * h * w * channels)))


def _parts(launch: Launch, kernels: Kernels, chunk: int) -> Iterator[Launch]:
    """The launch, or each `chunk` images of it; none that a fused kernel does beside its own."""
    if kernels.fused and launch.name == "relu_pool_bwd":
        return
    parts = math.ceil(launch.images / chunk) if kernels.serial else 1
    for i in range(parts):
        n = min(launch.images - i * chunk, chunk) if kernels.serial else launch.images
        share = n / launch.images
        yield replace(launch, images=n, flops=share * launch.flops, bytes=share * launch.bytes)


# ---------------------------------------------------------------------------- convolutions


def _convolution(launch: Launch, chip: Chip, kernels: Kernels) -> float:
    """A program's loop is as long as what it waits for most; programs come in waves."""
    hopper = chip.architecture == "sm_90"
    if hopper and kernels.serial:
        clocks = _serial(launch, chip)
    elif hopper and kernels.halo and launch.maps == 2:
        clocks = _halo(launch, chip)
    else:
        clocks = _tap_by_tap(launch, chip)
    return max(clocks / chip.hz, launch.flops / chip.flops, launch.bytes / chip.memory)


def _serial(launch: Launch, chip: Chip) -> float:
    """Every product from registers, and a wait behind each; see `BEFORE_TILE`."""
    maps, part = launch.maps, min(64, 1 << (launch.c_in - 1).bit_length()) / 64
    chain = (4 if maps == 1 else 8) * part * 88 + (200 if maps == 1 else 270)
    moved = (16384 * maps + 8192) * part
    turn = max(chain, 750 + moved / 64, moved / chip.l2)
    if maps == 1:
        turn *= 1.3  # two programs a SM
    turns = 9 * math.ceil(launch.c_in / (64 * part))
    programs = _programs(launch, BEFORE_TILE.block_h, BEFORE_TILE.block_w, 64)
    return _waves(programs, chip.sms * (2 if maps == 1 else 1)) * (turns * turn + 7000)


def _tap_by_tap(launch: Launch, chip: Chip) -> float:
    """Channels by pixels, both from shared memory; each tap loads its pixels anew."""
    tile = launch.tile
    assert tile is not None
    pixels, channels, k = tile.block_h * tile.block_w * launch.maps, tile.block_n, tile.block_k
    moved = 2.0 * k * (pixels + channels)
    turn = max(
        2 * channels * pixels * k / chip.tensor / 0.93,
        moved / chip.l2,
        (moved + _operands(pixels, channels, k, chip)) / chip.shared / 0.95,
        (750 + moved / 64) / (0.75 * max(tile.stages - 1, 1)),  # latency, by tiles on their way
    )
    if tile.stages == 1:
        turn += 750 + moved / 64
    turns = 9 * math.ceil(launch.c_in / k)
    programs = _programs(launch, tile.block_h, tile.block_w, channels)
    return _waves(programs, chip.sms) * (turns * turn + 6500)


def _halo(launch: Launch, chip: Chip) -> float:
    """Boxes of 32 or 16 rows, and two more, by 8 columns, shifted by a column three times."""
    rows, channels = (32, 64) if launch.c_out <= 64 else (16, 128)
    k = min(64, 1 << (launch.c_in - 1).bit_length())
    pixels = rows * 8 * launch.maps
    moved = 2.0 * k * (launch.maps * (rows + 2) * 8 + 3 * channels)
    turn = max(
        3 * 2 * channels * pixels * k / chip.tensor / 0.93,
        moved / chip.l2,
        (moved + 3 * _operands(pixels, channels, k, chip)) / chip.shared / 0.95,
    )
    turns = 3 * math.ceil(launch.c_in / k)
    return _waves(_programs(launch, rows, 8, channels), chip.sms) * (turns * turn + 800)


def _operands(pixels: int, channels: int, k: int, chip: Chip) -> float:
    """Bytes that the products of a tile read from shared memory: m64n128k16 reads 6 KiB; before
    sm_90 each of 2 x 4 warps reads its own rows."""
    if chip.architecture == "sm_90":
        return channels / 64 * pixels / 128 * k / 16 * 6144
    return 2.0 * k * (4 * channels + 2 * pixels)


def _programs(launch: Launch, rows: int, columns: int, channels: int) -> int:
    tiles = math.ceil(launch.rows / rows) * math.ceil(launch.columns / columns)
    return launch.images * tiles * math.ceil(launch.c_out / channels)


def _waves(programs: int, slots: int) -> float:
    """Programs of many waves begin at different times: no last wave that waits."""
    waves = programs / slots
    return waves if waves > 6 else math.ceil(waves - 1e-9)


def _product(launch: Launch, chip: Chip, kernels: Kernels) -> float:
    """ATen's, or a fused kernel's: few channels and few pixels fill an implicit GEMM badly."""
    pixels = launch.images * launch.rows * launch.columns
    share = min(1.0, pixels / 128 * max(1.0, launch.c_in / 128) / chip.sms)
    if launch.c_out <= 64:  # the first layer
        share = 0.5 if launch.c_in <= 64 else 0.8
    ours = launch.name.startswith("conv_block")
    rate = (NEXT.gradient if ours else kernels.gradient) * chip.flops * share
    seconds = max(launch.flops / rate, launch.bytes / (0.8 * chip.memory))
    if launch.name == "conv_block_logits_bwd":
        seconds += _softmax(replace(launch, name="softmax_bwd"), chip, kernels)
    return seconds


# ------------------------------------------------------------------------------ elementwise


def _softmax(launch: Launch, chip: Chip, kernels: Kernels) -> float:
    """Instructions of a class and pixel, or bytes; a pack is so of both maps."""
    c, pack = launch.c_in, launch.name == "softmax_pack_fwd"
    pixels = launch.images * launch.rows * launch.columns
    channels = c
    if pack and kernels.serial:
        channels = math.ceil(c / kernels.channels) * kernels.channels if c > 32 else 32
    aligned = launch.columns % 4 == 0
    count = next(
        row
        for row in kernels.counts
        if (row.kernel, row.aligned in (None, aligned)) == (launch.name, True) and c >= row.classes
    )
    instructions = count.instructions
    if pack and launch.maps == 1:
        instructions /= 2
    busy, share = (0.75, 0.85) if pack else (0.75, 0.75)
    if kernels.serial:
        busy, share = (0.75, 0.8) if pack else (0.65, 0.75)
        if pack:  # one program a row, two a SM
            waves = launch.rows / (2 * chip.sms)
            busy *= min(1.0, waves) if waves < 1 else waves / math.ceil(waves)
    issue = pixels * channels * instructions / chip.issue / busy
    # Of a backward dy comes again too.
    again = pixels * (4 * c * launch.maps if pack else 6 * c)
    return max(issue, (launch.bytes + (count.reads - 1) * again) / (share * chip.memory))


def _stream(launch: Launch, chip: Chip, kernels: Kernels) -> float:
    del kernels
    return launch.bytes / (0.75 * chip.memory)
