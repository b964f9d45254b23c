"""A target's features, computed once and stored."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from gpl_fast.files import read_safetensors, write_safetensors
from gpl_fast.input_checks import FLOAT_DTYPES, as_int, check_tensor, describe
from gpl_fast.targets.data.batch import Batch, as_items, brief, check_same, joined, register

KEY = "gpl_fast.features"
MASK_DTYPES = (torch.bool, *FLOAT_DTYPES)


@dataclass(frozen=True, eq=False, repr=False)
class TargetFeatures(Batch):
    """φ(target), computed once by `encode`: usable as a target, and stored in 300 times less.

    As data: ``f[i]`` are images of the batch, ``len(f)`` their number, `cat` joins what a dataset
    returns, `to` and `pin_memory` do what they do for a tensor, `save` and `load` are safetensors
    files. A pytree node, so that torch.compile, torch.func and FSDP reach its tensors; ``==``
    compares identity. A DataLoader needs a ``collate_fn`` that joins: see `TopK`.

    Shape:
        N images of H x W by their features; as a target at a prediction of that size.
    Attributes:
        features: ``{layer: (N, C_b, H_b, W_b)}`` floating.
        settings: fingerprint, target activation, temperature and input size ``[H, W]`` they were
            made with: a loss compares them with its own.
        mask: (N, H, W) bool or float32 as given to `encode`, or None.
        valid: (N, H, W) as `mask`, without ignored labels, or None; used for the prediction too.

    Raises:
        TypeError: features are no mapping of names to floating tensors, masks of another dtype.
        ValueError: no features or no size; batch sizes, shapes or devices that do not agree.
    Source:
        docs/math.md, section 1, "Features"; ``φ_b(y)`` of Liu et al., CVPR 2021, Section 3.1.
    """

    features: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    mask: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.features, Mapping) or not isinstance(self.settings, Mapping):
            raise TypeError(
                f"TargetFeatures: got {describe(self.features)} and {describe(self.settings)}, "
                "expected features {layer: (N, C, H, W)} and settings, as loss.encode(target) gives"
            )
        height, width = _size(self.settings)
        # Copies: a change of the caller's dictionaries stays there.
        object.__setattr__(self, "features", dict(self.features))
        object.__setattr__(self, "settings", {**self.settings, "size": [height, width]})
        _check_features(self.features)
        _check_masks(self, (len(self), height, width))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TargetFeatures:
        features = {name: fn(t) for name, t in self.features.items()}
        mask = None if self.mask is None else fn(self.mask)
        valid = None if self.valid is None else fn(self.valid)
        return TargetFeatures(features, self.settings, mask, valid)

    def __len__(self) -> int:
        return next(iter(self.features.values())).shape[0]

    def __repr__(self) -> str:
        layers = self.features.items() if isinstance(self.features, Mapping) else ()
        parts = [f"{name}={brief(t)}" for name, t in layers]
        parts += [f"mask={brief(self.mask)}", f"valid={brief(self.valid)}"]
        for name, x in self.settings.items():
            parts.append(f"{name}={x[:8] if name == 'fingerprint' and isinstance(x, str) else x}")
        return f"TargetFeatures({', '.join(parts)})"

    @staticmethod
    def cat(items: Iterable[TargetFeatures]) -> TargetFeatures:
        """One batch of several, in their order; where some have no mask, all their pixels count.

        Shape:
            Of (N_i, C_b, H_b, W_b) and masks (N_i, H, W) -> Σ N_i images.
        Raises:
            TypeError: something else than TargetFeatures is given.
            ValueError: nothing is given; settings, layers, shapes or devices differ.
        """
        found = as_items("TargetFeatures.cat", items, TargetFeatures)
        first = found[0]
        for x in found:
            for name in (*first.settings, *x.settings):
                a, b = first.settings.get(name), x.settings.get(name)
                if a != b:
                    raise ValueError(
                        f"TargetFeatures.cat: {name}: got {a!r} and {b!r}, expected features made "
                        "with the same settings"
                    )
            if {*x.features} != {*first.features}:
                raise ValueError(
                    f"TargetFeatures.cat: layers: got {[*first.features]} and {[*x.features]}, "
                    "expected features made with the same settings"
                )
        features = {
            name: joined(f"TargetFeatures.cat: {name} (C, H, W)", [x.features[name] for x in found])
            for name in first.features
        }
        masks = [_cat_masks([(x, getattr(x, kind)) for x in found]) for kind in ("mask", "valid")]
        return TargetFeatures(features, first.settings, *masks)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file, whatever device and layout the tensors have.

        Raises:
            OSError: the folder does not exist, or the file cannot be written.
        """
        tensors = {f"feature.{name}": t for name, t in self.features.items()}
        masks = {"mask": self.mask, "valid": self.valid}
        tensors |= {name: t for name, t in masks.items() if t is not None}
        header = {"settings": dict(self.settings), "layers": list(self.features)}
        write_safetensors(path, tensors, KEY, header)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TargetFeatures:
        """Read what `save` wrote, onto the CPU; nothing is unpickled. Values are taken as they are:
        infinity or NaN in them shows in the loss.

        Shape:
            As they were saved.
        Raises:
            OSError: the file cannot be opened.
            ValueError: not a safetensors file, truncated, or not of TargetFeatures.
        """
        header, tensors = read_safetensors(path, KEY, "TargetFeatures.save")
        try:
            layers, settings = _check_header(header)
            features = {x: tensors.pop(f"feature.{x}") for x in layers if f"feature.{x}" in tensors}
            if len(features) != len(layers):
                raise ValueError(
                    f"malformed: got {len(features)} of the layers {reprlib.repr(layers)}"
                )
            loaded = cls(features, settings, tensors.pop("mask", None), tensors.pop("valid", None))
            _check_stored(settings)
            if tensors:
                raise ValueError(f"malformed: got tensors of no layer, {reprlib.repr([*tensors])}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fsdecode(path)}: {error}") from error
        return loaded


def _size(settings: Mapping[str, Any]) -> tuple[int, int]:
    size: Any = settings.get("size")
    pair = isinstance(size, list | tuple) and len(size) == 2
    if not pair or not all(type(x) is int or isinstance(x, SupportsIndex) for x in size):
        raise ValueError(
            f"TargetFeatures: settings: got no input size ({reprlib.repr(size)}), expected 'size': "
            "[H, W], as loss.encode(target) gives"
        )
    # An int may be a symbol of torch.compile: it stays one.
    height, width = (x if type(x) is int else as_int("TargetFeatures: size", x) for x in size)
    if not (0 < height < 2**31 and 0 < width < 2**31):
        raise ValueError(f"TargetFeatures: size: got {list(size)}, expected positive [H, W]")
    return height, width


def _check_features(features: Mapping[str, Tensor]) -> None:
    if not features:
        raise ValueError("TargetFeatures: got none, expected features {layer: (N, C, H, W)}")
    for name, t in features.items():
        what = f"TargetFeatures: {name}"
        if not isinstance(name, str):
            raise TypeError(f"{what}: got the layer name {name!r}, expected text")
        if not isinstance(t, Tensor):
            raise TypeError(f"{what}: got {describe(t)}, expected a tensor; use torch.as_tensor")
        check_tensor(what, t, "a tensor (N, C, H, W)")
        if t.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{what}: got {describe(t)}, expected one of {FLOAT_DTYPES}")
        if t.dim() != 4:
            raise ValueError(f"{what}: got {tuple(t.shape)}, expected features (N, C, H, W)")
    check_same("TargetFeatures: N of the features", [t.shape[0] for t in features.values()])
    check_same("TargetFeatures: device", [t.device for t in features.values()])


def _check_masks(f: TargetFeatures, shape: tuple[int, int, int]) -> None:
    for name, t in (("mask", f.mask), ("valid", f.valid)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype not in MASK_DTYPES:
            raise TypeError(f"TargetFeatures: {name}: got {describe(t)}, expected {MASK_DTYPES}")
        if tuple(t.shape) != shape:
            raise ValueError(
                f"TargetFeatures: {name}: got {tuple(t.shape)}, expected (N, H, W) = {shape}"
            )
        device = next(iter(f.features.values())).device
        if t.device != device:
            raise ValueError(f"TargetFeatures: {name}: got {t.device}, expected {device}")
    if f.mask is not None and f.valid is None:
        raise ValueError(
            "TargetFeatures: got a mask but no valid, expected both: `valid` says which pixels "
            "count; without ignored labels it is the mask"
        )


def _cat_masks(items: Sequence[tuple[TargetFeatures, Tensor | None]]) -> Tensor | None:
    """Masks (N_i, H, W) -> (N, H, W), True or 1 where there is none; None if none has any."""
    if all(mask is None for _, mask in items):
        return None
    device = next(iter(items[0][0].features.values())).device
    weights = any(mask is not None and mask.is_floating_point() for _, mask in items)
    dtype = torch.float32 if weights else torch.bool
    return torch.cat([
        torch.ones(len(x), *x.settings["size"], dtype=dtype, device=device)
        if mask is None else mask.to(dtype)
        for x, mask in items
    ])  # fmt: skip


def _check_header(header: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """A file's layers and settings."""
    layers, settings = header.get("layers"), header.get("settings")
    if not isinstance(layers, list) or not all(isinstance(x, str) for x in layers):
        raise ValueError(f"malformed: layers: got {reprlib.repr(layers)}, expected a list of names")
    if len({*layers}) != len(layers):
        raise ValueError(f"malformed: layers: got {reprlib.repr(layers)}, expected each once")
    if not isinstance(settings, dict):
        raise ValueError(
            f"malformed: settings: got {reprlib.repr(settings)}, expected entries by name"
        )
    return layers, settings


def _check_stored(settings: Mapping[str, Any]) -> None:
    for name in ("fingerprint", "activation"):
        if not isinstance(settings.get(name), str):
            raise ValueError(
                f"malformed: {name}: got {reprlib.repr(settings.get(name))}, expected text"
            )
    temperature: Any = settings.get("temperature")
    if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
        raise ValueError(
            f"malformed: temperature: got {reprlib.repr(temperature)}, expected one above 0"
        )


register(TargetFeatures, ("features", "mask", "valid"), "settings")
