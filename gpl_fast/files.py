"""Reading safetensors files; nothing is ever unpickled."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

from torch import Tensor


def read_safetensors(
    path: str | PathLike[str], key: str, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON under `key` in the file's metadata, and its tensors on the CPU.

    Raises:
        ValueError: not a safetensors file, truncated, or without that key.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: got a file that is not safetensors or is truncated ({error}), expected one "
            f"written by {writer}; pickles are never read"
        ) from error
    if key not in metadata:
        raise ValueError(f"{path}: got a foreign safetensors file, expected one of {writer}")
    try:
        header = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its metadata is malformed: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its metadata is malformed: got {type(header).__name__}")
    return header, tensors
