"""A target map stored sparsely: the k largest classes of each pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from gpl_fast.input_checks import FLOAT_DTYPES, check_tensor, describe, is_integer
from gpl_fast.targets.data.batch import Batch, as_items, brief, check_same, joined, register

RESTS = ("renormalize", "uniform", "drop")


@dataclass(frozen=True, eq=False, repr=False)
class TopK(Batch):
    """A target map stored sparsely: the k largest classes of each pixel.

    ``TopK(*probabilities.topk(k, dim=1))`` of a teacher's softmax. As data: ``t[i]`` are images of
    the batch, ``len(t)`` their number, `cat` joins what a dataset returns, and `to` and
    `pin_memory` do what they do for a tensor. A pytree node, so that torch.compile, torch.func and
    FSDP reach its tensors; ``==`` compares identity. A DataLoader needs to be told how to join::

        def collate(samples):  # [(image (3, H, W), TopK of one image), ...]
            images, targets = zip(*samples)
            return torch.stack(images), gpl_fast.TopK.cat(targets)

        DataLoader(dataset, batch_size=8, collate_fn=collate, pin_memory=True)

    Args:
        values: (N, k, H, W) floating, >= 0 and finite; duplicates in a pixel add up. k may be 0.
        indices: (N, k, H, W) integer classes in ``[0, C)``, on the device of `values`.
        rest: where the mass that is not listed goes: "renormalize" (values / their sum; a sum of
            0 gives a zero pixel), "uniform" (spread over the classes that are not listed) or
            "drop".

    Shape:
        A map (N, C, H, W) by its k largest classes; as a target at the prediction's H x W.

    Raises:
        TypeError: values are not floating or indices not integer, or not plain tensors.
        ValueError: the shapes or devices differ, or are not 4-d; an unknown `rest`.

    Source:
        docs/math.md, section 1, "Top-k": of this library; in the place of the teacher of Liu et
        al., CVPR 2021, eq. (2).
    """

    values: Tensor
    indices: Tensor
    rest: str = "renormalize"

    def __post_init__(self) -> None:
        _check_part("values", self.values)
        _check_part("indices", self.indices)
        if self.values.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"TopK: values: got {describe(self.values)}, expected a floating tensor "
                "(N, k, H, W), such as probabilities.topk(k, dim=1).values"
            )
        if not is_integer(self.indices):
            raise TypeError(
                f"TopK: indices: got {describe(self.indices)}, expected an integer tensor "
                "(N, k, H, W), such as probabilities.topk(k, dim=1).indices; use .long()"
            )
        if self.values.dim() != 4 or self.values.shape != self.indices.shape:
            raise ValueError(
                f"TopK: got values {tuple(self.values.shape)} and indices "
                f"{tuple(self.indices.shape)}, expected both (N, k, H, W), as from "
                "topk(k, dim=1); one image: use .unsqueeze(0)"
            )
        if self.values.device != self.indices.device:
            raise ValueError(
                f"TopK: got values on {self.values.device} and indices on {self.indices.device}, "
                "expected one device; use indices.to(values.device)"
            )
        if not isinstance(self.rest, str) or self.rest not in RESTS:
            raise ValueError(f"TopK: rest: got {self.rest!r}, expected one of {RESTS}")

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TopK:
        return TopK(fn(self.values), fn(self.indices), self.rest)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        return (
            f"TopK(values={brief(self.values)}, indices={brief(self.indices)}, rest={self.rest!r})"
        )

    @staticmethod
    def cat(items: Iterable[TopK]) -> TopK:
        """One batch of several, in their order; dtypes are promoted as by ``torch.cat``.

        Shape:
            Of (N_i, k, H, W) -> (Σ N_i, k, H, W).

        Raises:
            TypeError: something else than TopK is given.
            ValueError: nothing is given; `rest`, k, the size or the device differ.
        """
        found = as_items("TopK.cat", items, TopK)
        check_same("TopK.cat: rest", [x.rest for x in found])
        values = joined("TopK.cat: values (k, H, W)", [x.values for x in found])
        indices = joined("TopK.cat: indices (k, H, W)", [x.indices for x in found])
        return TopK(values, indices, found[0].rest)


def _check_part(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"TopK: {name}: got {type(x).__name__}, expected a tensor (N, k, H, W), such as "
            f"probabilities.topk(k, dim=1).{name}; an array or list: use torch.as_tensor"
        )
    check_tensor(f"TopK: {name}", x, "a tensor (N, k, H, W)")


register(TopK, ("values", "indices"), "rest")
