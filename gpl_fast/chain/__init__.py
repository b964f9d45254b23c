"""The fast path's two walks over the network: forward in the difference form, and backward.

Both go through images in chunks and through each segment in strips of rows (`gpl_fast.plan`).
On the CPU convolutions are our own or ATen's (`convolution`) and everything between them is one
of the stage operators of `gpl_fast.ops`; on a GPU one kernel may do a whole step (`stages`,
`data_gradient`).
Maps are NHWC, prediction and target carried as ``y'`` and ``δ = y' − y`` (eq. 6 of
docs/math.md), or as ``y`` and δ (`branch`). What the forward leaves for the backward is
`Plan.saved`.
"""

from gpl_fast.chain.backward import Backward, empty_gradient
from gpl_fast.chain.forward import Forward
from gpl_fast.chain.packs import pack_names, pack_weights
from gpl_fast.chain.stages import arithmetic

__all__ = [
    "Backward",
    "Forward",
    "arithmetic",
    "empty_gradient",
    "pack_names",
    "pack_weights",
]
