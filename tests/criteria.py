"""How features may be compared, for tests of whoever computes it: options, targets, errors."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from cases import ATOL, NARROW, error, value_and_grad
from torch import Tensor, nn

from gpl_fast import GenericPerceptualLoss, LossNet, SegmentationLoss, TopK

C = 5
NET = LossNet.vgg(C, (1, 1), NARROW)
LEVELS = [torch.linspace(0.2, 2.0, 5), [3.0, 0.0, 0.5, 1e-3, 1.0, 0.25, 2.0, 0.75]]
# By words that a test's name holds.
OPTIONS: dict[str, dict[str, Any]] = {
    "l1": {"criterion": "l1"},
    "channels": {"level_weights": LEVELS},
    "normalized": {"normalize_features": True},
}
MIXED = {
    "-".join(names): {k: v for name in names for k, v in OPTIONS[name].items()}
    for names in (
        ("l1", "channels"),
        ("l1", "normalized"),
        ("channels", "normalized"),
        ("l1", "channels", "normalized"),
    )
}
KINDS = ("dense", "labels", "topk", "features", "teacher")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def loss_of(
    words: dict[str, Any], kind: str, backend: str, dtype: torch.dtype, **options: Any
) -> nn.Module:
    """Levels of two blocks; a teacher's stands beside a cross-entropy that it outweighs."""
    words = {"level_weights": (0.5, 1.0), "reduction": "none", **words, **options}
    words |= {"backend": backend, "compute_dtype": dtype}
    if kind == "teacher":
        return SegmentationLoss(C, net=NET, gpl_weight=500.0, ce_weight=1e-3, **words)
    return GenericPerceptualLoss(C, NET, **words)


def target_of(kind: str, shape: tuple[int, ...], seed: int) -> tuple[Any, ...]:
    """What follows the prediction, in float32; features as the dense target they are made of."""
    g = torch.Generator().manual_seed(seed)
    dense = 2 * torch.randn(shape, generator=g)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    if kind == "topk":
        return (TopK(*dense.softmax(1).topk(2, dim=1)),)
    return {"labels": (labels,), "teacher": (labels, dense)}.get(kind, (dense,))


def wide(x: Any) -> Any:
    if isinstance(x, TopK):
        return TopK(x.values.double(), x.indices, x.rest)
    return x.double() if x.is_floating_point() else x


def results(
    words: dict[str, Any],
    kind: str,
    dtype: torch.dtype,
    pred: Tensor,
    seed: int,
    mask: Tensor | None = None,
    backend: str = "fast",
    **options: Any,
) -> list[tuple[Tensor, Tensor]]:
    """Value and gradient: of the reference in float64 and in `dtype`, and of the backend."""
    target = target_of(kind, tuple(pred.shape), seed)
    found = []
    for by, computed in (("reference", torch.float64), ("reference", dtype), (backend, dtype)):
        loss = loss_of(words, kind, by, computed, **options)
        exact = computed == torch.float64
        given, x = tuple(map(wide, target)) if exact else target, wide(pred) if exact else pred
        named = {"mask": mask}
        if kind == "features":
            given, named = (loss.encode(given[0], mask),), {}
        found.append(value_and_grad(loss, x, *given, **named))
    return found


def errors(*args: Any, **options: Any) -> list[tuple[float, ...]]:
    """Of value and gradient against float64: the backend's, PyTorch's in the same dtype."""
    truth, plain, got = results(*args, **options)
    return [tuple(map(error, one, truth)) for one in (got, plain)]


def errors_by_image(*args: Any, **options: Any) -> list[list[tuple[float, ...]]]:
    """The same of each image, of losses that are not reduced."""
    truth, plain, got = results(*args, **options)
    images = range(len(truth[0]))
    return [
        [tuple(error(a[i], b[i]) for a, b in zip(one, truth, strict=True)) for one in (got, plain)]
        for i in images
    ]


def agree_in_median(draws: list[Any], dtype: torch.dtype, factor: float = 2.0) -> None:
    """In the median of the draws the backend errs at most twice what PyTorch does: winners of
    pools and signs of differences near 0 change places in single ones."""
    for which in (0, 1):
        got, plain = (median(draw[by][which] for draw in draws) for by in (0, 1))
        floor = torch.finfo(dtype).eps
        assert got <= factor * max(plain, floor) + ATOL[dtype], (which, got, plain)
