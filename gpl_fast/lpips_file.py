"""The file of an `LPIPS`: network, heads and settings, safetensors with JSON in its metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

from torch import Tensor

from gpl_fast.files import read_safetensors, write_safetensors
from gpl_fast.net.lossnet import LossNet
from gpl_fast.net.network_file import network_arguments

KEY = "gpl_fast.lpips"


class Stored(NamedTuple):
    """What a file holds: ``settings`` are keywords of `LPIPS`; what ``normalize`` makes of mean and
    std the network has already."""

    net: LossNet
    heads: Mapping[str, Tensor]
    normalize: bool
    settings: Mapping[str, Any]


def write(path: str | PathLike[str], stored: Stored) -> None:
    """Raises: ValueError for a `LossNet.from_module`; OSError, as `write_safetensors`."""
    if not stored.net.is_chain:
        raise ValueError(
            "save: a from_module network has no structure of its own to write; save the module's "
            "state_dict and build the LPIPS from the module again"
        )
    tensors = {f"net.{name}": w for name, w in stored.net.weights.items()}
    tensors |= {f"head.{layer}": head for layer, head in stored.heads.items()}
    header = {
        "net": stored.net._structure(),
        "heads": list(stored.heads),
        "normalize": stored.normalize,
        "settings": dict(stored.settings),
    }
    write_safetensors(path, tensors, KEY, header)


def read(path: str | PathLike[str]) -> Stored:
    """Raises: OSError, ValueError, as `LPIPS.load`, but for what `LPIPS` itself refuses."""
    header, tensors = read_safetensors(path, KEY, "LPIPS.save")
    try:
        heads = _stored_heads(header.get("heads"), tensors)
        weights = {name.removeprefix("net."): t for name, t in tensors.items()}
        net = LossNet(**network_arguments(header.get("net"), weights))
        settings, normalize = header.get("settings"), header.get("normalize")
        if not isinstance(settings, dict) or not isinstance(normalize, bool):
            raise ValueError(f"settings: got {settings!r}, normalize={normalize!r}")
        if "normalize" in settings:  # the network's mean and std would be changed once more
            raise ValueError("settings: got 'normalize', expected it beside them")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}") from error
    return Stored(net, heads, normalize, settings)


def _stored_heads(layers: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The heads of a file: taken out of its tensors ``head.{layer}``.

    Raises:
        ValueError: the file has others.
    """
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ValueError(f"heads: got {type(layers).__name__}, expected a list of layers")
    if len(set(layers)) < len(layers):
        raise ValueError(f"heads: got {layers}, expected each layer once")
    missing = [layer for layer in layers if f"head.{layer}" not in tensors]
    if missing:
        raise ValueError(f"heads of {missing} are missing")
    return {layer: tensors.pop(f"head.{layer}") for layer in layers}
