"""Losses of other packages beside this torch, and LPIPS as a case of `run.py`: the package lpips in
the place of plain PyTorch, `gpl_fast.LPIPS` made from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from providers import Provider, compiled
from torch import Tensor, nn

import gpl_fast

# lpips, piq, torchmetrics and MONAI import torchvision; none of their losses calls these.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[torch.library.Library] = []  # its end would take the schemas away


def declare_operators() -> None:
    """Makes ``import torchvision`` work where its compiled operators do not load beside this torch,
    as PyPI's do beside a CPU build: it describes two of them to torch whether they are there or
    not. To be called before that import."""
    spec = find_spec("torchvision")
    if _kept or spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        _kept.append(torch.library.Library("torchvision", "DEF"))
        for schema in _SCHEMAS:
            _kept[0].define(schema)


def obstacle() -> str | None:
    """Why LPIPS cannot be compared here, or None."""
    missing = [name for name in ("lpips", "torchvision") if find_spec(name) is None]
    return f"no {' and no '.join(missing)}; make test-peers installs them" if missing else None


@cache
def peer() -> nn.Module:
    """The package's own, with its heads, on a VGG16 of random weights; everything frozen."""
    declare_operators()
    import lpips

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the keyword that it asks torchvision with
        torch.manual_seed(0)
        found: nn.Module = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return found.requires_grad_(False)


def of_package(dtype: torch.dtype, layout: torch.memory_format, *_: object) -> Provider:
    """The package as it is, its convolutions in `dtype`; the mean over the batch is taken."""
    module = deepcopy(peer()).to(dtype, memory_format=layout)

    def value(pred: Tensor, target: Tensor) -> Tensor:
        images = (x.to(dtype, memory_format=layout) for x in (pred, target))
        return module(*images).float().mean()

    return Provider(value, lambda: [*module.parameters(), *module.buffers()])


def ours(dtype: torch.dtype, *_: object) -> Provider:
    """gpl_fast's, made from the package's."""
    loss = gpl_fast.LPIPS.from_module(peer(), compute_dtype=dtype, backend="fast")
    return Provider(loss, loss.net.cached_tensors)


_fp32 = partial(of_package, torch.float32, torch.contiguous_format)
PROVIDERS: dict[str, Callable[..., Provider]] = {
    "eager-fp32": _fp32,
    "eager-bf16-cl": partial(of_package, torch.bfloat16, torch.channels_last),
    "compile": partial(compiled, _fp32),
    "gpl_fast-fp32": partial(ours, torch.float32),
    "gpl_fast-bf16": partial(ours, torch.bfloat16),
}


def exact() -> Callable[[Tensor, Tensor], Tensor]:
    """The package in float64, of float64 images."""
    module = deepcopy(peer()).double()
    return lambda pred, target: module(pred, target).mean()
