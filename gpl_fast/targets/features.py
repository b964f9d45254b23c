"""A target's features, computed once and stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from gpl_fast.files import read_safetensors


@dataclass(frozen=True)
class TargetFeatures:
    """φ(target), computed once by `encode`: usable as a target, and stored in 300 times less.

    Attributes:
        features: ``{layer: (N, C_b, H_b, W_b)}``.
        settings: fingerprint, target activation, temperature and input size they were made with.
        mask: (N, H, W) bool as given to `encode`, or None.
        valid: (N, H, W) bool, `mask` without ignored labels, or None; used for the prediction too.
    """

    features: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    mask: Tensor | None = None
    valid: Tensor | None = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"feature.{k}": v.detach().cpu() for k, v in self.features.items()}
        for name in ("mask", "valid"):
            if (t := getattr(self, name)) is not None:
                tensors[name] = t.cpu()
        tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
        header = json.dumps({"settings": dict(self.settings), "layers": list(self.features)})
        save_file(tensors, str(path), metadata={"gpl_fast.features": header})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TargetFeatures:
        """Read what `save` wrote, onto the CPU; nothing is unpickled.

        Raises:
            ValueError: not a safetensors file, truncated, or not of TargetFeatures.
        """
        header, tensors = read_safetensors(path, "gpl_fast.features", "TargetFeatures.save")
        try:
            features = {name: tensors.pop(f"feature.{name}") for name in header["layers"]}
            settings = dict(header["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: features are missing or malformed: {error!r}") from error
        loaded = cls(features, settings, tensors.pop("mask", None), tensors.pop("valid", None))
        height, width = _check_size_entry(path, settings)
        batch = {t.shape[0] for t in features.values() if t.dim() == 4}
        masks = [t for t in (loaded.mask, loaded.valid) if t is not None]
        if tensors or len(batch) != 1 or not all(t.dim() == 4 for t in features.values()):
            raise ValueError(f"{path}: expected features (N, C, H, W) of one batch size only")
        shape = (batch.pop(), height, width)
        if any(tuple(t.shape) != shape or t.dtype != torch.bool for t in masks):
            raise ValueError(f"{path}: expected masks {shape} of torch.bool")
        return loaded

    def to(self, *args: Any, **kwargs: Any) -> TargetFeatures:
        """The same on another device, or with features of another dtype, as ``Tensor.to``."""
        features = {k: v.to(*args, **kwargs) for k, v in self.features.items()}
        device = next(iter(features.values())).device
        mask = None if self.mask is None else self.mask.to(device)
        valid = None if self.valid is None else self.valid.to(device)
        return TargetFeatures(features, self.settings, mask, valid)

    def __len__(self) -> int:
        return int(next(iter(self.features.values())).shape[0])

    def __getitem__(self, index: int | slice | Tensor) -> TargetFeatures:
        """Some images of the batch (an integer keeps the batch dimension)."""
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"TargetFeatures: got image {index}, expected one of {len(self)}")
        i = slice(index, index + 1 or None) if isinstance(index, int) else index
        features = {k: v[i] for k, v in self.features.items()}
        mask = None if self.mask is None else self.mask[i]
        valid = None if self.valid is None else self.valid[i]
        return TargetFeatures(features, self.settings, mask, valid)

    @staticmethod
    def cat(items: Sequence[TargetFeatures]) -> TargetFeatures:
        """One batch of several: what a DataLoader's `collate_fn` needs.

        Raises:
            ValueError: nothing given, or settings or layers that differ.
        """
        made = [(dict(x.settings), list(x.features)) for x in items]
        if not made or any(m != made[0] for m in made):
            raise ValueError("TargetFeatures.cat: expected features made with the same settings")
        features = {k: torch.cat([x.features[k] for x in items]) for k in items[0].features}
        return TargetFeatures(
            features, items[0].settings, _cat_masks(items, "mask"), _cat_masks(items, "valid")
        )


def _check_size_entry(path: object, settings: Mapping[str, Any]) -> tuple[int, int]:
    size = settings.get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) for v in size)):
        raise ValueError(f"{path}: its settings hold no input size")
    return size[0], size[1]


def _cat_masks(items: Sequence[TargetFeatures], name: str) -> Tensor | None:
    masks = [getattr(x, name) for x in items]
    if all(m is None for m in masks):
        return None
    filled = []
    for x, m in zip(items, masks, strict=True):
        device = next(iter(x.features.values())).device
        ones = torch.ones(len(x), *x.settings["size"], dtype=torch.bool, device=device)
        filled.append(ones if m is None else m)
    return torch.cat(filled)
