"""The stages as Triton kernels: the functions of `gpl_fast.stages.TritonStages`.

Twins of ``csrc/cpu``; one stage a file: device helpers, kernel, launcher.
"""

from gpl_fast.kernels.binary_ce import binary_ce_bwd, binary_ce_fwd
from gpl_fast.kernels.branch import carry_target_fwd
from gpl_fast.kernels.conv_block import conv_block_fwd
from gpl_fast.kernels.diff_reduce import diff_reduce_fwd
from gpl_fast.kernels.label_conv import label_conv_fwd, topk_conv_fwd
from gpl_fast.kernels.relu import relu_bwd, relu_diff_fwd, relu_fwd
from gpl_fast.kernels.relu_pool import relu_pool_bwd, relu_pool_diff_fwd, relu_pool_fwd
from gpl_fast.kernels.softmax_bwd import softmax_bwd
from gpl_fast.kernels.softmax_pack import softmax_pack_fwd
from gpl_fast.kernels.unit_diff import unit_diff_fwd

__all__ = [
    "binary_ce_bwd",
    "binary_ce_fwd",
    "carry_target_fwd",
    "conv_block_fwd",
    "diff_reduce_fwd",
    "label_conv_fwd",
    "relu_bwd",
    "relu_diff_fwd",
    "relu_fwd",
    "relu_pool_bwd",
    "relu_pool_diff_fwd",
    "relu_pool_fwd",
    "softmax_bwd",
    "softmax_pack_fwd",
    "topk_conv_fwd",
    "unit_diff_fwd",
]
