"""A target map stored sparsely: the k largest classes of each pixel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpl_fast.input_checks import FLOAT_DTYPES, describe, is_integer

RESTS = ("renormalize", "uniform", "drop")


@dataclass(frozen=True)
class TopK:
    """A target map stored sparsely: the k largest classes of each pixel.

    Args:
        values: (N, k, H, W) floating, >= 0 and finite; duplicates in a pixel add up.
        indices: (N, k, H, W) integer classes in ``[0, C)``.
        rest: where the mass that is not listed goes: "renormalize" (values / their sum; a sum of
            0 gives a zero pixel), "uniform" (spread over the classes that are not listed) or
            "drop".

    Raises:
        TypeError: values are not floating or indices not integer.
        ValueError: the shapes differ or are not 4-d; an unknown `rest`.
    """

    values: Tensor
    indices: Tensor
    rest: str = "renormalize"

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"TopK: values: got {describe(self.values)}, expected a floating tensor "
                "(N, k, H, W), such as probabilities.topk(k, dim=1).values"
            )
        if not isinstance(self.indices, Tensor) or not is_integer(self.indices):
            raise TypeError(
                f"TopK: indices: got {describe(self.indices)}, expected an integer tensor "
                "(N, k, H, W), such as probabilities.topk(k, dim=1).indices"
            )
        if self.values.dim() != 4 or self.values.shape != self.indices.shape:
            raise ValueError(
                f"TopK: got values {tuple(self.values.shape)} and indices "
                f"{tuple(self.indices.shape)}, expected both (N, k, H, W)"
            )
        if self.rest not in RESTS:
            raise ValueError(f"TopK: rest: got {self.rest!r}, expected one of {RESTS}")
