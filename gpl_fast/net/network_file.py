"""The file of a chain: safetensors, with the structure as JSON in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from gpl_fast.files import read_safetensors, write_safetensors
from gpl_fast.net.layers import stored_layers

KEY = "gpl_fast.lossnet"


def write_network(
    path: str | PathLike[str], structure: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Raises: OSError, as `write_safetensors`."""
    write_safetensors(path, weights, KEY, structure)


def read_network(path: str | PathLike[str]) -> dict[str, Any]:
    """The arguments of a `LossNet`: "layers", "weights", "mean" and "std".

    Raises:
        OSError, ValueError: as `LossNet.load`, but for what `LossNet` itself refuses.
    """
    structure, weights = read_safetensors(path, KEY, "LossNet.save")
    try:
        return network_arguments(structure, weights)
    except ValueError as error:
        raise ValueError(f"{path!s}: {error}") from error


def network_arguments(structure: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The same of what a file holds.

    Raises:
        ValueError: it is no structure.
    """
    try:
        layers = stored_layers(structure["layers"])
        mean, std = (structure[name] for name in ("mean", "std"))
        if not all(x is None or isinstance(x, list) for x in (mean, std)):
            raise TypeError(f"mean, std: got {mean} and {std}, expected lists")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the network's structure is malformed: {error}") from error
    return {"layers": layers, "weights": weights, "mean": mean, "std": std}
