"""SHA-256 of a network: what two of them have in common that compute the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gpl_fast.net.frozen_module import module_tensors, module_text, tensor_bytes
from gpl_fast.real_tensors import real_tensors


@real_tensors()
def fingerprint(
    structure: Mapping[str, Any], weights: Mapping[str, Tensor], module: nn.Module | None = None
) -> str:
    """Hexadecimal; the same on every machine, rank and device.

    Args:
        structure: what JSON can hold of it.
        weights: by name; those of `module` are read too, and its text.
    """
    digest = hashlib.sha256(json.dumps(structure).encode())
    tensors = dict(weights)
    if module is not None:
        digest.update(module_text(module).encode())
        tensors |= module_tensors(module)
    for name in sorted(tensors):
        digest.update(f"{name} ".encode() + tensor_bytes(tensors[name]))
    return digest.hexdigest()
