"""The seam between the walks and the code that does a stage: names, arguments, shapes, codes.

`gpl_fast.ops` (compiled) and `gpl_fast.kernels` (Triton) offer the same functions. The first
argument is positional, all others go by keyword; outputs are buffers of the caller's, each written
all over. An argument that does not say otherwise is contiguous, and of a map each image is.

- Maps are NHWC, of one dtype: float32, bfloat16 or float16. z, y and a are the carried branch's:
  the target's where `from_target` (N,) bool says so, else the prediction's. dz, delta and d are the
  prediction's less the target's, eq. (6) of docs/math.md.
- A strip is the rows [row0, row0 + rows) of every image. A row outside the image is zeros.
- A mask has a bit a channel, ⌈C/8⌉ bytes, the first in the lowest: unless the prediction's z <= 0.
  A code has four, ⌈C/2⌉ bytes: the window's winner 0 to 3, or 4 = none is positive.
- `valid` (N, H, W) is bool, or float32: a weight m above 0 counts; of bool m is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gpl_fast.binary_stages import BinaryBackwardStages, BinaryStages
from gpl_fast.tap_stages import TapStages
from gpl_fast.tiles import Tile

# As enum class Activation, Pool and Criterion in csrc have them. The losses take these words.
ACTIVATIONS = {"softmax": 1, "sigmoid": 2, "none": 0}
POOLS = {"max": 0, "avg": 1, "": 2}
CRITERIA = {"l2": 0, "l1": 1}


@dataclass(frozen=True)
class Listed:
    """A target of labels, or of top-k values, indices and rest: as the two look-ups take it."""

    table: Tensor
    taken: Tensor
    taken_row0: int
    valid: Tensor | None = None
    labels: Tensor | None = None
    interior: Tensor | None = None
    values: Tensor | None = None
    indices: Tensor | None = None
    rest: Tensor | None = None
    rest_table: Tensor | None = None


class BackwardStages(BinaryBackwardStages, Protocol):
    """What a CPU, CUDA and Triton offer."""

    def relu_pool_bwd(
        self,
        dy: Tensor,  # (N, height // 2, width // 2, C)
        *,
        code: Tensor,  # of `relu_pool_fwd`
        pool: int, height: int, width: int, row0: int,  # of the grid before the pool
        dz: Tensor,  # (N, rows, width, C)
    ) -> None:  # fmt: skip
        """Through the pool and the ReLU, eq. (3)."""

    def relu_bwd(self, dy: Tensor, *, mask: Tensor, dz: Tensor) -> None:
        """dy where the mask is set: (N, H, W, C), mask (N, H, W, ⌈C/8⌉)."""

    def softmax_bwd(
        self,
        x: Tensor,  # (N, C, H, W), any strides
        *,
        activation: int, temperature: float, label_smoothing: float = 0.0, row0: int, rows: int,
        dx: Tensor,  # as x: rows of the image in the strip are written
        lse: Tensor | None = None,  # of `softmax_pack_fwd`
        dy: Tensor | None = None,  # (N, rows, W, C_pad); None: the cross-entropy's gradient alone
        scale: Tensor | None = None,  # (N,) float32, with dy, by which its part is multiplied
        valid: Tensor | None = None,  # (N, H, W): dy counts there, with its weight
        ce_labels: Tensor | None = None,  # (N, H, W) int64
        ce_mask: Tensor | None = None,  # (N, H, W) float32, weights of its pixels
        ce_lse: Tensor | None = None,  # of `softmax_pack_fwd`
        ce_scale: Tensor | None = None,  # (N,) float32, with ce_labels
        class_weight: Tensor | None = None,  # (C,) float32
    ) -> None:  # fmt: skip
        """The logits' gradient from that of their map, eq. (5), plus the cross-entropy's."""


class Stages(BinaryStages, BackwardStages, TapStages, Protocol):
    """What a CPU and Triton offer: those, and all stages of the forward."""

    def softmax_pack_fwd(
        self,
        x: Tensor,  # (N, C, H, W), any strides
        *,
        activation: int,
        target_activation: int,  # "none" beside another takes the target as it is, without T
        temperature: float, label_smoothing: float = 0.0, row0: int, rows: int,
        core0: int, core_rows: int,  # the rows of lse, ce_lse and ce_rows that are written
        valid: Tensor | None = None,  # (N, H, W); maps are m y, and 0 elsewhere
        target: Tensor | None = None,  # (N, C, H, W), as x, or uint8 labels, which are the map
        elements: Tensor | None = None,  # (N, C, H, W) uint8, with target: maps are 0 where it is 2
        from_target: Tensor | None = None,  # (N,) bool, with target
        labels: Tensor | None = None,  # (N, H, W) int64; outside [0, C): no class
        topk_values: Tensor | None = None,  # (N, k, H, W) float32, each plane contiguous
        topk_indices: Tensor | None = None,  # (N, k, H, W) int64, of the same strides
        topk_rest: Tensor | None = None,  # (N, H, W) float32, of each class that is not listed
        ce_labels: Tensor | None = None,  # (N, H, W) int64; outside [0, C): not counted
        ce_mask: Tensor | None = None,  # (N, H, W) float32, weights of its pixels
        class_weight: Tensor | None = None,  # (C,) float32
        y: Tensor | None = None,  # (N, rows, W, C_pad); of a list: y' less it where taken
        delta: Tensor | None = None,  # (N, rows, W, C_pad), with target
        taken: Tensor | None = None,  # (N, rows, W) uint8, with a list: y' is nearer to it than 0
        lse: Tensor | None = None,  # (N, H, W) float32: max + T log Σ e^((x − max) / T)
        ce_lse: Tensor | None = None,  # (N, H, W) float32: with T = 1, where lse is not that
        ce_rows: Tensor | None = None,  # (N, H, 2) float64: Σ losses, Σ weights
    ) -> None:  # fmt: skip
        """Logits to maps; what their gradient needs; the cross-entropy in the same passes."""

    def label_conv_fwd(
        self,
        labels: Tensor,  # (N, H, W) int64
        *,
        table: Tensor,  # (K², C, C_out): the weight, a row a tap and class
        interior: Tensor,  # (C, C_out) float32: the taps' sum
        from_target: Tensor,
        taken: Tensor,  # (N, taken_rows, W) uint8, rows from taken_row0, of `softmax_pack_fwd`
        taken_row0: int, row0: int,
        z: Tensor,  # (N, rows, W, C_out)
        dz: Tensor,  # (N, rows, W, C_out); on entry the convolution of `softmax_pack_fwd`'s y
        valid: Tensor | None = None,  # (N, H, W)
    ) -> None:  # fmt: skip
        """What a target of labels adds to the first convolution, by look-up, eq. (7)."""

    def topk_conv_fwd(
        self,
        topk_values: Tensor,  # (N, k, H, W) float32
        *,
        topk_indices: Tensor,  # (N, k, H, W) int64
        table: Tensor, from_target: Tensor, taken: Tensor, taken_row0: int, row0: int, z: Tensor,
        dz: Tensor,
        topk_rest: Tensor | None = None,  # (N, H, W) float32
        rest_table: Tensor | None = None,  # (K², C_out) float32, with it: the classes' sum
        valid: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The same of a list of k classes and values."""

    def relu_fwd(self, z: Tensor, *, y: Tensor, mask: Tensor | None = None) -> None:
        """ReLU of one branch, as `relu_diff_fwd`."""

    def relu_diff_fwd(
        self, z: Tensor, *, dz: Tensor, from_target: Tensor, delta: Tensor,
        y: Tensor | None = None, mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        """ReLU of both, eq. (6): (N, H, W, C) contiguous, mask (N, H, W, ⌈C/8⌉); y may be z and
        delta dz."""

    def relu_pool_fwd(self, z: Tensor, *, pool: int, y: Tensor, code: Tensor | None = None) -> None:
        """ReLU and pool of one branch, as `relu_pool_diff_fwd`."""

    def relu_pool_diff_fwd(
        self,
        z: Tensor,  # (N, H, W, C): of the outputs' dtype or float32, as dz
        *,
        dz: Tensor, from_target: Tensor, pool: int,
        delta: Tensor,  # (N, H // 2, W // 2, C)
        y: Tensor | None = None,
        code: Tensor | None = None,  # max: of the pooled grid; average: the mask (N, H, W, ⌈C/8⌉)
    ) -> None:  # fmt: skip
        """ReLU and 2 x 2 pool of both, eq. (6)."""


class CpuStages(Stages, Protocol):
    """What a CPU alone offers: convolutions of stride 1, x (N, rows, W, C_in) to z (…, C_out)."""

    def winograd_weight(self, w: Tensor, tile: int, transposed: bool, u: Tensor) -> None:
        """(C_out, 3, 3, C_in) to u, as `winograd` reads it; transposed: for the data gradient."""

    def winograd(self, x: Tensor, u: Tensor, tile: int, pad_h: int, row0: int, z: Tensor) -> None:
        """3 x 3, tiles of 2 x 2 or 4 x 4 results; row0 is the image's row that z begins with."""

    def direct_weight(self, w: Tensor, transposed: bool, u: Tensor) -> None:
        """bfloat16 (C_out, K, K, C_in) to u, as `direct_conv` reads it."""

    def direct_conv(self, x: Tensor, u: Tensor, K: int, pad_h: int, z: Tensor) -> None:
        """K x K by the definition, in bfloat16."""

    def populate(self, t: Tensor) -> None:
        """Map the pages of memory that will be written all over, in a scattered order."""


class TritonStages(Stages, Protocol):
    """What Triton alone offers: a whole step of the forward in one launch; a look before it."""

    def carry_target_fwd(
        self, x: Tensor, *, activation: int, target_activation: int, temperature: float,
        step: tuple[int, int], near: float, from_target: Tensor, dense: Tensor | None = None,
        elements: Tensor | None = None, labels: Tensor | None = None,
        topk_values: Tensor | None = None, topk_indices: Tensor | None = None,
        topk_rest: Tensor | None = None, valid: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Whether an image's target is near and constant at every step-th row and column, into
        from_target (N,) bool: `gpl_fast.fast.branch`; dense (N, C, h, w), the rest as above."""

    def conv_block_fwd(
        self,
        a: Tensor,  # (N, H_in, W_in, C_in), C_in a multiple of 8; u of a `target`, contiguous
        *,
        weight: Tensor,  # (K² C_in, C_out), rows by tap, then channel
        kernel_size: int, stride: int, relu: bool, pool: int,
        pad_h: int,  # rows of zeros above and below: 0 where the strip has its halo
        row0: int,  # the image's row of the convolution's first one
        image_rows: int,  # of the convolution
        tile: Tile,
        d: Tensor | None = None,  # as a; None: there is one branch, or a `target`
        bias: Tensor | None = None,  # (C_out,) float32
        from_target: Tensor | None = None,  # None: there is one branch
        target: Listed | None = None,  # whose `taken` has the rows of a
        y: Tensor | None = None,  # (N, rows, W, C_out), or (N, rows // 2, W // 2, C_out) pooled
        delta: Tensor | None = None,  # as y
        code: Tensor | None = None,  # of a max pool, else the mask of the rows inside the image
        reduce: bool = False,
        allow_tf32: bool = True,  # in float32
    ) -> Tensor | None:  # fmt: skip
        """Convolution of both branches, ReLU, pool, code; with `reduce` the partial sums
        (N, programs) float32 of δ² as it is stored."""


class CudaStages(BackwardStages, Protocol):
    """What the CUDA operators alone offer: the gradient of a whole step in one launch."""

    def conv_block_bwd(
        self,
        dy: Tensor,  # (N, dy_rows, w, C_out), of the step's output
        *,
        w: Tensor,  # (K², C_out up to a multiple of 64, C_in of 8), taps reversed
        pool: int, stride: int,
        dy_row0: int,  # of the step's output
        allow_tf32: bool,  # in float32
        height: int, row0: int,  # of the step's input
        dx: Tensor,  # (N, rows, W, C_in); with stride 2 all rows
        code: Tensor | None = None,  # or the mask; None: neither pool nor ReLU
    ) -> None:  # fmt: skip
        """dZ by eq. (3) while it is read, and its data gradient, eq. (4)."""

    def conv_block_logits_bwd(
        self, dy: Tensor, *, w: Tensor, pool: int, stride: int, dy_row0: int, allow_tf32: bool,
        x: Tensor, scale: Tensor, activation: int, temperature: float,
        label_smoothing: float = 0.0, row0: int, rows: int, dx: Tensor, code: Tensor | None = None,
        lse: Tensor | None = None, valid: Tensor | None = None, ce_labels: Tensor | None = None,
        ce_mask: Tensor | None = None, ce_lse: Tensor | None = None,
        ce_scale: Tensor | None = None, class_weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The first step's `conv_block_bwd`, on through `softmax_bwd`."""
