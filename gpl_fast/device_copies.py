"""A loss' own small tensors where its input is: copying them at each step would stop a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from gpl_fast import streams


class DeviceCopies:
    """Copies on other devices, by name; they are neither pickled nor copied with the loss."""

    def __init__(self) -> None:
        # What of, its version, the copy.
        self._made: dict[tuple[str, torch.device], tuple[Tensor, int | None, Tensor]] = {}

    def of(self, name: str, own: Tensor | None, like: object) -> Tensor | None:
        """`own` on the device of `like`: made anew where it is another tensor or has changed."""
        if torch.compiler.is_compiling() or own is None or not isinstance(like, Tensor):
            return own
        device = like.device
        if own.device == device or like.is_meta or active_fake_mode() is not None:
            return own
        version = None if own.is_inference() else own._version
        made_of, made_at, copied = self._made.get((name, device), (None, None, own))
        if made_of is not own or made_at != version:
            with streams.made_once(device, own.dtype):
                copied = own.to(device)
            self._made[name, device] = own, version, copied
        return streams.read_here([copied])[0]

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": {}}
