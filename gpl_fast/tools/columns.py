"""What the kernels are like that a step is predicted with: as they were, as they are, what is next.

Instructions are counted in the machine code of the kernels' loops, and put in here by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gpl_fast.tiles import Tile


class Count(NamedTuple):
    """Instructions of a thread an element: from so many classes on, of rows that are multiples of
    16 bytes or not (None: of all). Of `softmax_pack_fwd` an element is a pair."""

    kernel: str
    classes: int
    aligned: bool | None
    instructions: float


@dataclass(frozen=True)
class Kernels:
    """What the kernels of a column are like.

    Attributes:
        workspace_mb: of the walk; None = the one asked for.
        serial: every segment in the chunks of the first one, a wait behind each product,
            `BEFORE_TILE`, one program a row of the pack.
        halo: three column-shifted boxes serve nine taps; persistent programs. Of sm_90.
        fused: `conv_block_bwd` makes the data gradients, dZ while it is loaded.
        gradient: of ATen's or the own data gradients, FLOPs a second over a long product's.
        channels: classes come in blocks of so many.
        counts: the first row that fits is taken.
        host: seconds that the host needs for a launch.
    """

    name: str
    legend: str
    workspace_mb: float | None
    serial: bool
    halo: bool
    fused: bool
    gradient: float
    channels: int
    counts: tuple[Count, ...]
    host: float


BEFORE_TILE = Tile(8, 16, 64, 64, 8, 3, True)
# Read from the machine code for sm_90: float32 logits, bfloat16 maps.
COUNTS_BEFORE = (
    Count("softmax_pack_fwd", 33, None, 75),
    Count("softmax_pack_fwd", 1, None, 104),
    Count("softmax_bwd", 1, False, 156),
    Count("softmax_bwd", 201, True, 126),
    Count("softmax_bwd", 1, True, 100),
)
COUNTS = (
    Count("softmax_pack_fwd", 33, None, 45),
    Count("softmax_pack_fwd", 1, None, 80),
    Count("softmax_bwd", 33, None, 45),
    Count("softmax_bwd", 1, None, 80),
)
BEFORE = Kernels(
    "before", "each product waited for, one chunk of images through all layers, 256 MB",
    256, True, False, False, 330 / 790, 64, COUNTS_BEFORE, 50e-6,
)  # fmt: skip
NOW = Kernels(
    "now", "operands swapped, chunks by segment, lean softmax kernels",
    None, False, False, False, 450 / 790, 1, COUNTS, 20e-6,
)  # fmt: skip
NEXT = Kernels(
    "next", "with a kernel that loads halos once (sm_90) and conv_block_bwd in every layer",
    None, False, True, True, 600 / 790, 1, COUNTS, 20e-6,
)  # fmt: skip
COLUMNS = (BEFORE, NOW, NEXT)
