"""What the kernels are like that a step is predicted with: as they were, as they are, what is next.

Instructions are counted in the machine code of the kernels' loops, and put in here by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from gpl_fast.tiles import Tile


class Count(NamedTuple):
    """Of a softmax kernel from so many classes on, with rows that are multiples of 16 bytes or not
    (None: either): instructions of a thread an element, and how often a logit comes from memory.
    Of `softmax_pack_fwd` an element is a pair."""

    kernel: str
    classes: int
    aligned: bool | None
    instructions: float
    reads: float


@dataclass(frozen=True)
class Kernels:
    """What the kernels of a column are like.

    Attributes:
        workspace_mb: of the walk, of "auto": it grows; None = the one asked for.
        serial: every segment in the chunks of the first one, a wait behind each product,
            `BEFORE_TILE`, one program a row of the pack.
        halo: three column-shifted boxes serve nine taps; persistent programs. Of sm_90, and of
            the difference form.
        fused: `conv_block_bwd` makes the data gradients, dZ while it is loaded.
        gradient: of ATen's or the own data gradients, FLOPs a second over a long product's.
        channels: classes come in blocks of so many to the pack.
        counts: the first row that fits is taken.
        host: seconds that the host needs for a stage: as benchmarks/launches.py finds on a server.
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
# Instructions: counted in the machine code for sm_90, float32 logits, bfloat16 maps. Reads of some
# hundreds of classes on: what all programs hold is more than the L2 cache.
COUNTS_BEFORE = (
    Count("softmax_pack_fwd", 401, None, 75, 2.0),
    Count("softmax_pack_fwd", 33, None, 75, 1.15),
    Count("softmax_pack_fwd", 1, None, 104, 1.15),
    Count("softmax_bwd", 201, True, 126, 1.8),
    Count("softmax_bwd", 1, True, 100, 1.0),
    Count("softmax_bwd", 201, False, 156, 1.8),
    Count("softmax_bwd", 1, False, 156, 1.0),
)
# tests/compile/test_softmax.py and test_nvcc.py hold them; CUDA's softmax_bwd. A pack of up to 1280
# classes has them in registers.
COUNTS = (
    Count("softmax_pack_fwd", 1281, None, 45, 1.5),
    Count("softmax_pack_fwd", 1203, True, 38.6, 1.05),
    Count("softmax_pack_fwd", 1203, False, 41.4, 1.05),
    Count("softmax_pack_fwd", 847, True, 43.2, 1.05),
    Count("softmax_pack_fwd", 847, False, 45.7, 1.05),
    Count("softmax_pack_fwd", 33, True, 37.8, 1.05),
    Count("softmax_pack_fwd", 33, False, 39.3, 1.05),
    Count("softmax_pack_fwd", 1, True, 59.7, 1.05),
    Count("softmax_pack_fwd", 1, False, 51.6, 1.05),
    Count("softmax_bwd", 201, None, 42, 1.8),
    Count("softmax_bwd", 33, None, 42, 1.0),
    Count("softmax_bwd", 1, None, 53, 1.0),  # 24 channels where there are 19
)
BEFORE = Kernels(
    "before", "each product waited for, one chunk of images through all layers, 256 MB",
    256, True, False, False, 330 / 790, 64, COUNTS_BEFORE, 65e-6,
)  # fmt: skip
NOW = Kernels(
    "now", "operands swapped, chunks by segment, lean softmax kernels",
    None, False, False, False, 450 / 790, 1, COUNTS, 30e-6,
)  # fmt: skip
NEXT = Kernels(
    "next", "with a kernel that loads halos once (sm_90) and conv_block_bwd in every layer",
    None, False, True, True, 600 / 790, 1, COUNTS, 30e-6,
)  # fmt: skip
COLUMNS = (BEFORE, NOW, NEXT)
