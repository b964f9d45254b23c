"""What the fast path will do for a loss and an input shape: steps, saved tensors, chunks.

Pure arithmetic on shapes: no tensor is touched, so fakes, `explain` and the kernels' drivers share
it. A *step* is one convolution and what follows it; a *segment* is a run of steps at one resolution
up to and including its down-sampling.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net.lossnet import LossNet
from gpl_fast.net.steps import Chain, Step
from gpl_fast.net.weights import padded_channels

MIB = 2**20
# What workspace_mb="auto" begins with: megabytes on a CPU, at least these and one part of so many
# of the memory on a GPU.
CPU_WORKSPACE_MB = 256
GPU_WORKSPACE_SHARE = 64
# Buffers of about this size stay in the allocator's free lists and close to the last-level cache;
# larger ones are fresh pages from the kernel at every call. Fewer rows than these are mostly halo.
PREFERRED_STRIP_BYTES = 24 * MIB
PREFERRED_ROWS = 8
# A workspace that grows becomes so many times what two rows a strip need.
ENOUGH = 1.25
# Transforming the weight pays from so many tiles of 2 x 2, of 4 x 4 results on.
WINOGRAD_TILES = {2: 128, 4: 128}
# Tiles of 2 x 2 in float32 pay from so many on where the definition in bfloat16 is the alternative.
MIXED_TILES = 4096
# From so many input channels on, pairs of bfloat16 make the first layer's tiles of 2 x 2.
MIXED_CHANNELS = 64
# The weights for tiles of 4 x 4 take at most this part of the workspace.
WINOGRAD_SHARE = 8

# Signs and winners come of the prediction's convolutions; the others decide nothing.
Role = Literal["prediction", "difference", "gradient"]


class Way(NamedTuple):
    """How a CPU computes a convolution."""

    # Results to a side that are computed together: 4 and 2 by Winograd's algorithm
    # (csrc/cpu/winograd.cpp), 1 by the definition in bfloat16 (direct_conv.cpp), 0 by ATen.
    tile: int
    dtype: torch.dtype  # of the weight as it is read, and of what is multiplied by it


@dataclass(frozen=True)
class Spec:
    """Everything static about one call but its shapes; travels through the operators as JSON."""

    in_channels: int
    steps: tuple[Step, ...]
    biases: bool
    adapter: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    feature_weights: Mapping[str, float]
    style_weights: Mapping[str, float]
    kind: str  # of the target: "dense", "labels", "topk", "features", or "encode": there is none
    resized: bool  # a dense target of another size
    activation: str
    target_activation: str
    temperature: float
    label_smoothing: float
    cross_entropy: bool
    device: str
    dtype: str
    arithmetic: str  # of the convolutions: in the maps' "own" dtype, "float32", or "mixed" of both
    workspace_bytes: int
    hard: bool  # whether the workspace is a bound, or grows for an input that cannot do with it


@functools.lru_cache(maxsize=64)
def load_spec(text: str) -> Spec:
    """The Spec that `make_spec` wrote."""
    d = json.loads(text)
    d["steps"] = tuple(Step(**step) for step in d["steps"])
    for name in ("mean", "std"):
        d[name] = None if d[name] is None else tuple(d[name])
    return Spec(**d)


@dataclass(frozen=True)
class Size:
    """Grids of one step: of its input, its convolution's output, and what it puts out."""

    h: int
    w: int
    conv_h: int
    conv_w: int
    out_h: int
    out_w: int


class Plan:
    """`Spec` at a prediction's shape (N, C, H, W)."""

    def __init__(self, spec: Spec, n: int, h: int, w: int) -> None:
        self.spec, self.n, self.h, self.w = spec, n, h, w
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.taps = tuple(dict.fromkeys((*spec.feature_weights, *spec.style_weights)))
        self.steps = self._steps_to_last_tap()
        self.sizes = self._grid_sizes()
        self.front = spec.adapter or spec.mean is not None
        self.segments = self._segments()
        self.large_tiles = True
        self.budget = spec.workspace_bytes
        self.images, self.rows = self._chunks()

    # --------------------------------------------------------------------------------- structure

    def _steps_to_last_tap(self) -> tuple[Step, ...]:
        last = max(
            i
            for i, step in enumerate(self.spec.steps)
            if {step.conv, step.relu, step.pool} & set(self.taps)
        )
        steps = list(self.spec.steps[: last + 1])
        if steps[-1].pool not in self.taps:
            steps[-1] = replace(steps[-1], pool="", pool_kind="")
            if steps[-1].relu not in self.taps:
                steps[-1] = replace(steps[-1], relu="")
        return tuple(steps)

    def _grid_sizes(self) -> tuple[Size, ...]:
        sizes, h, w = [], self.h, self.w
        for step in self.steps:
            conv_h, conv_w = -(-h // step.stride), -(-w // step.stride)
            out_h, out_w = (conv_h // 2, conv_w // 2) if step.pool else (conv_h, conv_w)
            sizes.append(Size(h, w, conv_h, conv_w, out_h, out_w))
            h, w = out_h, out_w
        return tuple(sizes)

    def _segments(self) -> tuple[range, ...]:
        ends = [
            i + 1
            for i, step in enumerate(self.steps)
            if step.pool or step.stride == 2 or i + 1 == len(self.steps)
            or self.steps[i + 1].stride == 2
        ]  # fmt: skip
        return tuple(range(a, b) for a, b in zip([0, *ends], ends, strict=False))

    def halo(self, segment: range) -> int:
        """Rows that a strip needs beyond its own on each side."""
        return sum(self.steps[i].kernel_size // 2 for i in segment)

    # ------------------------------------------------------------------- the saved-tensor contract

    def tap_shape(self, tap: str) -> tuple[int, int, int, int]:
        """(N, H_b, W_b, C_b) of a tapped layer."""
        for step, size in zip(self.steps, self.sizes, strict=True):
            if tap in (step.conv, step.relu):
                return self.n, size.conv_h, size.conv_w, step.out_channels
            if tap == step.pool:
                return self.n, size.out_h, size.out_w, step.out_channels
        raise KeyError(tap)

    def saved(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and dtype of what the forward leaves for the backward, in order.

        The table in docs/math.md, section 4: `lse`, a code for each pool, a mask for each
        ReLU whose full-resolution output is used, `diff` for each tap, and for style taps the
        prediction's features and ``G' - G``.
        """
        spec, n, u8 = self.spec, self.n, torch.uint8
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if spec.kind == "encode":  # no backward: the features themselves
            return {f"diff.{tap}": (self.tap_shape(tap), self.dtype) for tap in self.taps}
        if spec.activation == "softmax":
            out["lse"] = ((n, self.h, self.w), torch.float32)
        if self.own_ce_lse:
            out["ce_lse"] = ((n, self.h, self.w), torch.float32)
        for step, size in zip(self.steps, self.sizes, strict=True):
            c = step.out_channels
            if step.pool_kind == "max":
                out[f"code.{step.pool}"] = ((n, size.out_h, size.out_w, -(-c // 2)), u8)
            if self.needs_mask(step):
                out[f"mask.{step.relu}"] = ((n, size.conv_h, size.conv_w, -(-c // 8)), u8)
        for tap in spec.feature_weights:
            out[f"diff.{tap}"] = (self.tap_shape(tap), self.dtype)
        for tap in spec.style_weights:
            shape = self.tap_shape(tap)
            out[f"phi.{tap}"] = (shape, self.dtype)
            out[f"gram.{tap}"] = ((n, shape[3], shape[3]), torch.float32)
        return out

    def needs_mask(self, step: Step) -> bool:
        """Whether the ReLU's full-resolution sign is needed: 1 bit an element."""
        return bool(step.relu) and (step.pool_kind != "max" or step.relu in self.taps)

    @property
    def own_ce_lse(self) -> bool:
        """Whether the cross-entropy's log-sum-exp is another one than the activation's."""
        spec = self.spec
        return spec.cross_entropy and (spec.activation != "softmax" or spec.temperature != 1.0)

    def bytes_saved(self) -> int:
        """Of all of `saved`."""
        return sum(_bytes(shape, dtype) for shape, dtype in self.saved().values())

    def bytes_saved_by_layer(self) -> dict[str, int]:
        """Of codes, masks, differences by the layer that they belong to."""
        out: dict[str, int] = {}
        for name, (shape, dtype) in self.saved().items():
            layer = name.partition(".")[2]
            out[layer] = out.get(layer, 0) + _bytes(shape, dtype)
        return out

    def bytes_transient(self) -> int:
        """Of the chunk that the walks allocate besides `saved`: at most the workspace."""
        return self._bytes(self.images, self.rows)

    def way(self, i: int, role: Role) -> Way:
        """Of step i's convolution, or of its data gradient: docs/cpu.md."""
        step, arithmetic = self.steps[i], self.spec.arithmetic
        dtype = torch.float32 if arithmetic == "float32" else self.dtype
        if self.spec.device != "cpu" or step.stride != 1:
            return Way(0, dtype)
        mixed = arithmetic == "mixed"
        in_pairs = mixed and (
            role == "gradient"
            or (role == "prediction" and i == 0 and step.in_channels >= MIXED_CHANNELS)
        )
        if step.kernel_size == 3 and arithmetic != "own":
            multiplied = self.dtype if in_pairs else torch.float32
            large = role != "prediction" and self._large_tiles_fit(i)
            if large and self._tiles(i, 4) >= WINOGRAD_TILES[4]:
                return Way(4, multiplied)
            enough = MIXED_TILES if mixed and not in_pairs else WINOGRAD_TILES[2]
            if self._tiles(i, 2) >= enough:
                return Way(2, multiplied)
        return Way(int(dtype == torch.bfloat16), dtype)

    def _large_tiles_fit(self, i: int) -> bool:
        small, large = (Way(tile, torch.float32) for tile in (2, 4))
        weight = max(self._weights_bytes(i, {small, large}, {large}))
        return self.large_tiles and WINOGRAD_SHARE * weight <= self.budget

    def _tiles(self, i: int, tile: int) -> int:
        size = self.sizes[i]
        return self.n * -(-size.conv_h // tile) * -(-size.conv_w // tile)

    def _weights_bytes(self, i: int, forward: set[Way], backward: set[Way]) -> tuple[int, int]:
        """Of step i's weights as its convolution reads them, in the ways of `forward`, and as its
        data gradient does."""
        k = self.steps[i].kernel_size
        c_in, c_out = padded_channels(self.steps[i].in_channels), self.steps[i].out_channels

        def of(way: Way, c_in: int, c_out: int) -> int:
            elements = k * k * c_in * c_out
            if way.tile > 1:
                elements = winograd_elements(way.tile, c_in, c_out)
            elif way.tile == 1:
                elements = direct_elements(k * k, c_in, c_out)
            return way.dtype.itemsize * elements

        return sum(of(w, c_in, c_out) for w in forward), sum(of(w, c_out, c_in) for w in backward)

    # --------------------------------------------------------------------------------- coefficients

    def coefficients(self) -> dict[str, float]:
        """``w_b / (C_b H_b W_b)`` of each feature tap and twice that of each style tap."""
        out = {}
        for prefix, weights, factor in (
            ("feature", self.spec.feature_weights, 1.0),
            ("style", self.spec.style_weights, 2.0),
        ):
            for tap, weight in weights.items():
                _, h, w, c = self.tap_shape(tap)
                out[f"{prefix}.{tap}"] = factor * weight / (c * h * w)
        return out

    # --------------------------------------------------------------------------------------- chunks

    def _chunks(self) -> tuple[int, tuple[int, ...]]:
        """Images a chunk, and rows a strip for each segment (its whole height = no strips)."""
        budget = self.budget
        segments = range(len(self.segments))
        heights = tuple(self.sizes[s[0]].h for s in self.segments)
        whole = tuple(max(self._peak(i, 1, heights), 1) for i in segments)
        images = min((budget - self._weight_bytes(i)) // whole[i] for i in segments)
        preferred = PREFERRED_STRIP_BYTES if self.spec.device == "cpu" else budget
        if images >= 1 and max(whole) <= preferred:
            return max(1, min(self.n, images, preferred // max(whole))), heights
        rows = tuple(self._strip_rows(i) for i in segments)
        least = tuple(h if self._whole_only(i) else min(2, h) for i, h in enumerate(heights))
        while self._bytes(1, rows) > budget and rows != least:
            # Only the segment that needs most is cut: more launches, smaller ones.
            widest = max(
                segments, key=lambda i: (rows[i] > least[i], self._segment_peak(i, 1, rows))
            )
            cut = max(least[widest], rows[widest] // 2 // 2 * 2)
            rows = (*rows[:widest], cut, *rows[widest + 1 :])
        if self._bytes(1, rows) <= budget:
            return 1, rows
        if self.large_tiles:  # perhaps without their weights
            self.large_tiles = False
            return self._chunks()
        needed = self._bytes(1, least)
        if not self.spec.hard:
            self.budget = int(ENOUGH * needed)
            return self._chunks()
        raise ValueError(
            f"workspace_mb: got {self.spec.workspace_bytes / MIB:.3g}, expected at least "
            f"{-(-needed // MIB)} for an input of {self.h} x {self.w} with "
            f"{self.spec.in_channels} channels, of which not one strip of rows fits, or 'auto'"
        )

    def _weight_bytes(self, i: int) -> int:
        """What no chunk makes smaller: the weight of one of segment i's convolutions, as Winograd's
        algorithm reads it (one for each way) or in ATen's order."""
        out = 0
        for j in self.segments[i]:
            forward = {self.way(j, "prediction"), self.way(j, "difference")}
            out = max(out, *self._weights_bytes(j, forward, {self.way(j, "gradient")}))
        return out

    def _whole_only(self, i: int) -> bool:
        return self.steps[self.segments[i][0]].stride == 2

    def _strip_rows(self, i: int) -> int:
        height = self.sizes[self.segments[i][0]].h
        if self._whole_only(i):
            return height
        if self.spec.device != "cpu":
            return -(-height // 2) * 2
        a_row = (self._segment_bytes(i, 1, 66) - self._segment_bytes(i, 1, 2)) // 64
        rows = max(PREFERRED_STRIP_BYTES // max(a_row, 1), PREFERRED_ROWS)
        return height if rows >= height else rows // 2 * 2

    def _tall(self, i: int, rows: int) -> int:
        """Rows of a strip with its halo; of the whole height there is none."""
        height = self.sizes[self.segments[i][0]].h
        return rows + 2 * self.halo(self.segments[i]) if rows < height else height

    def _segment_bytes(self, i: int, images: int, rows: int) -> int:
        """Transient bytes of one strip: the larger of forward and backward."""
        segment, e = self.segments[i], self.dtype.itemsize
        size = self.sizes[segment[0]]
        tall = self._tall(i, rows)
        first = self.spec.kind in ("dense", "features", "encode") or self.front
        grids = labels = 0
        if i == 0:
            channels = padded_channels(self.spec.in_channels)
            grids = (2 if first else 1) * channels
            if self.front:
                grids += 3 * self.steps[0].in_channels
            if self.spec.resized:
                grids += 2 * self.spec.in_channels * 4 // e
            if self.spec.cross_entropy:
                labels = 8 * size.h * size.w  # the saved ones as int64, of whole images
        widest = max(self.steps[j].out_channels for j in segment)
        narrow = self.steps[segment[0]].in_channels if i else 0
        # (y, δ) in, (z, δz) out; with several convolutions both pairs are alive.
        # Of (z, δz), and of what they become.
        own = self.way(segment[0], "prediction").tile > 0
        wide = 4 if own or self.spec.arithmetic == "float32" else e
        outs = (4 if len(segment) > 1 else 2) * widest * wide
        if wide > e and not own:  # float32 copies of (y, δ)
            outs += 2 * 4 * max(narrow, padded_channels(self.spec.in_channels))
        if i == 0 and self.front:  # which is left in float32 too
            outs += 3 * self.steps[0].in_channels * (wide - e)
        return images * (tall * size.w * (e * (grids + narrow) + outs) + labels)

    def _style_bytes(self, i: int, images: int, rows: int) -> int:
        """Of a strip's style taps in float32: four maps at once, φ', δ and their products."""
        segment, styled = self.segments[i], self.spec.style_weights
        elements = [0]
        for step, size in ((self.steps[j], self.sizes[j]) for j in segment):
            if step.conv in styled or step.relu in styled:
                elements.append(step.out_channels * size.conv_h * size.conv_w)
            if step.pool in styled:
                elements.append(step.out_channels * size.out_h * size.out_w)
        height = max(self.sizes[segment[0]].h, 1)
        return 4 * 4 * images * max(elements) * self._tall(i, rows) // height

    def _bytes(self, images: int, rows: tuple[int, ...]) -> int:
        """Transient bytes of a chunk."""
        return max(self._segment_peak(i, images, rows) for i in range(len(self.segments)))

    def _segment_peak(self, i: int, images: int, rows: tuple[int, ...]) -> int:
        return self._weight_bytes(i) + self._peak(i, images, rows)

    def _peak(self, i: int, images: int, rows: tuple[int, ...]) -> int:
        """Of segment i: the levels on both sides, and a strip."""
        e, segment = self.dtype.itemsize, self.segments[i]
        first, last = self.sizes[segment[0]], self.sizes[segment[-1]]
        c_in, c_out = self.steps[segment[0]].in_channels, self.steps[segment[-1]].out_channels
        pad = 2 * self.halo(segment)
        level_in = 2 * (first.h + pad) * first.w * c_in * e if i else 0
        level_out = 2 * (last.out_h + pad) * last.out_w * c_out * e
        strip = self._segment_bytes(i, images, rows[i]) + self._style_bytes(i, images, rows[i])
        return images * (level_in + level_out) + strip


def winograd_elements(tile: int, c_in: int, c_out: int) -> int:
    """Of the weight that csrc/cpu/winograd.cpp reads, for `tile` results to a side: its points, in
    blocks of 32 output channels and of pairs of input channels."""
    return (tile + 2) ** 2 * (-(-c_in // 2) * 2) * (-(-c_out // 32) * 32)


def direct_elements(taps: int, c_in: int, c_out: int) -> int:
    """Of the weight that csrc/cpu/direct_conv.cpp reads: 32 input and output channels at a time."""
    return taps * (-(-c_in // 32) * 32) * (-(-c_out // 32) * 32)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def make_spec(
    net: LossNet,
    *,
    feature_weights: Mapping[str, float],
    style_weights: Mapping[str, float],
    kind: str,
    resized: bool = False,
    activation: str,
    target_activation: str,
    temperature: float,
    label_smoothing: float = 0.0,
    cross_entropy: bool = False,
    device: str = "cpu",
    dtype: torch.dtype,
    arithmetic: str = "own",
    workspace_mb: float,
    hard: bool = True,
) -> str:
    """The Spec of a loss on a network that is a chain, as JSON for `load_spec`."""
    assert isinstance(net.chain, Chain)
    return _spec_json(
        net.chain,
        biases=any(name.endswith(".bias") for name in net.weight_names),
        feature_weights=feature_weights,
        style_weights=style_weights,
        kind=kind,
        resized=resized,
        activation=activation,
        target_activation=target_activation,
        temperature=temperature,
        label_smoothing=label_smoothing,
        cross_entropy=cross_entropy,
        device=device,
        dtype=dtype,
        arithmetic=arithmetic,
        workspace_mb=workspace_mb,
        hard=hard,
    )


@constant_in_graphs  # json cannot be traced
def _spec_json(chain: Chain, *, dtype: torch.dtype, workspace_mb: float, **rest: Any) -> str:
    network = asdict(chain)
    del network["network_channels"]
    fields = {
        **network,
        **rest,
        "dtype": str(dtype).removeprefix("torch."),
        "workspace_bytes": int(workspace_mb * MIB),
    }
    return json.dumps(fields)
