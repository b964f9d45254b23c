"""Outputs of named submodules of any module, for `LossNet.from_module`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class TappedModule(nn.Module):
    """Any module that also returns what its submodules put out; made for one device and dtype."""

    def __init__(self, module: nn.Module, taps: Mapping[str, str]) -> None:
        super().__init__()
        self.module, self.taps = module, dict(taps)
        self.outputs: dict[str, Any] = {}
        # Registered once and not at each call, which torch.compile could not trace.
        for tap, path in self.taps.items():
            module.get_submodule(path).register_forward_hook(self._keep(tap))

    def _keep(self, tap: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self.outputs[tap] = output

        return keep

    def forward(self, y: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        self.module(y)
        outputs = {tap: self.outputs[tap] for tap in taps}
        self.outputs.clear()
        for tap, e in outputs.items():
            if not isinstance(e, Tensor) or e.dim() != 4:
                got = tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__
                raise ValueError(
                    f"from_module: tap {tap!r} ({self.taps[tap]}): got {got}, expected one "
                    "(N, C, H, W) tensor"
                )
        return outputs
