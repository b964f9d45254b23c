"""A segmentation's batch in pieces, with several ignored labels, against the whole in float64 with
one: for tests of whoever computes it."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from cases import ATOL, NARROW, error
from criteria import wide
from torch import Tensor

from gpl_fast import LossNet, SegmentationLoss, TopK

C, SHAPE = 5, (3, 5, 9, 14)
NET = LossNet.vgg(C, (1, 1), NARROW)
KINDS = ("labels", "dense", "topk", "features")
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip
SEVERAL = (255, 7, -1)


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which each image counts another number, a dense teacher."""
    torch.manual_seed(seed)
    labels = torch.randint(C, (SHAPE[0], *SHAPE[2:]))
    for value, share in zip(SEVERAL, (0.1, 0.2, 0.1), strict=True):
        labels[torch.rand(labels.shape) < share] = value
    labels[0, 2:] = 7
    return 2 * torch.randn(SHAPE), labels, 2 * torch.randn(SHAPE)


def of_kind(kind: str, dense: Tensor, loss: SegmentationLoss) -> Any:
    if kind == "topk":
        return TopK(*dense.softmax(1).topk(2, dim=1))
    return {"labels": None, "dense": dense}.get(kind) if kind != "features" else loss.encode(dense)


def made(backend: str, dtype: torch.dtype, ignored: Any) -> SegmentationLoss:
    """Both terms weigh about the same."""
    return SegmentationLoss(
        C, net=NET, gpl_weight=300.0, ignore_index=ignored, class_weight=[1, 0.5, 0, 2, 1],
        label_smoothing=0.1, backend=backend, compute_dtype=dtype,
    )  # fmt: skip


def whole(dtype: torch.dtype, x: Tensor, y: Tensor, kind: str, dense: Tensor) -> list[Tensor]:
    """Value and gradient by the reference, every ignored label the same."""
    loss = made("reference", dtype, 255)
    exact = dtype == torch.float64
    teacher = of_kind(kind, dense.double() if exact else dense, loss)
    teacher = wide(teacher) if exact and isinstance(teacher, TopK) else teacher
    leaf = (x.double() if exact else x).detach().requires_grad_()
    value = loss(leaf, y.masked_fill((y < 0) | (y >= C), 255), teacher)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


def in_pieces(backend: str, dtype: torch.dtype, x: Tensor, y: Tensor, kind: str,
              dense: Tensor) -> list[Tensor]:  # fmt: skip
    """Sums of the pieces' values and gradients, divided by what the whole counts."""
    loss = made(backend, dtype, SEVERAL)
    exact = dtype == torch.float64
    teacher = of_kind(kind, dense.double() if exact else dense, loss)
    teacher = wide(teacher) if exact and isinstance(teacher, TopK) else teacher
    leaf = (x.double() if exact else x).detach().requires_grad_()
    pieces = (slice(0, 1), slice(1, 3))
    normalizer = sum(loss.count(y[piece]) for piece in pieces)
    values = [
        loss(
            leaf[piece], y[piece], None if teacher is None else teacher[piece],
            normalizer=normalizer,
        )
        for piece in pieces
    ]  # fmt: skip
    value = sum(values)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


def assert_the_whole(
    backend: str, dtype: str, kind: str, draws: int = 24, slack: float = 0.0
) -> None:
    """In the median the pieces err at most twice what the reference does of the whole in the same
    dtype.

    Args:
        slack: what whoever computes may err besides.
    """
    computed, errors = DTYPES[dtype], []
    for seed in range(draws):
        x, y, dense = drawn(seed)
        truth = whole(torch.float64, x, y, kind, dense)
        plain = whole(computed, x, y, kind, dense)
        got = in_pieces(backend, computed, x, y, kind, dense)
        errors.append(
            [[error(a, b) for a, b in zip(one, truth, strict=True)] for one in (got, plain)]
        )
    # Stored features are float32.
    floor = torch.finfo(torch.float32 if kind == "features" else computed).eps
    for which in (0, 1):
        ours, theirs = (median(one[by][which] for one in errors) for by in (0, 1))
        bound = 2 * max(theirs, floor) + ATOL.get(computed, 1e-12) + slack
        assert ours <= bound, (which, ours, theirs)
