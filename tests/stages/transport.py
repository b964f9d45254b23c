"""A stage of CPU tensors, run on a device: storages go there as they are, and come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor


class Storages:
    """Copies on a device; what shared memory here does so there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # by address: all bytes here and there

    def there(self, value: Any) -> Any:
        """A tensor's twin of the same strides; anything else as it is."""
        if is_dataclass(value):
            inner = {f.name: self.there(getattr(value, f.name)) for f in fields(value)}
            return replace(value, **inner)
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.pairs:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            copy = here.clone() if self.device.type == "cpu" else here.to(self.device)
            self.pairs[storage.data_ptr()] = here, copy
        _, copy = self.pairs[storage.data_ptr()]
        twin = torch.empty(0, dtype=value.dtype, device=self.device)
        at = value.storage_offset(), value.shape, value.stride()
        return twin.set_(copy.untyped_storage(), *at)

    def back(self) -> None:
        for here, copy in self.pairs.values():
            here.copy_(copy)


def on_device(
    device: torch.device, stage: Callable[..., Any], first: Tensor, **options: Any
) -> Any:
    storages = Storages(device)
    result = stage(
        storages.there(first), **{name: storages.there(v) for name, v in options.items()}
    )
    storages.back()
    return result.cpu() if isinstance(result, Tensor) else result
