"""The stages of a backward on a GPU: compiled, but where Triton's was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpl_fast import ops


class ByTable:
    """`gpl_fast.stages.CudaStages`.

    Args:
        softmax_bwd: who has that stage of so many classes: "compiled" or "triton".
    """

    def __init__(self, softmax_bwd: Callable[[int], str]) -> None:
        self._who = softmax_bwd

    def __getattr__(self, stage: str) -> Any:
        return getattr(ops, stage)

    def softmax_bwd(self, x: Tensor, **arguments: Any) -> None:
        """`gpl_fast.stages.BackwardStages.softmax_bwd`."""
        if self._who(x.shape[1]) == "compiled":
            ops.softmax_bwd(x, **arguments)
            return
        from gpl_fast import kernels  # only here: importing Triton takes a while

        kernels.softmax_bwd(x, **arguments)
