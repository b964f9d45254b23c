"""A frozen network: named layers or a module, the weights, and what they compute."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gpl_fast import reference, streams
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net.fingerprint import fingerprint
from gpl_fast.net.frozen_module import in_dtype
from gpl_fast.net.layers import Layer, check_weights, layer_shapes
from gpl_fast.net.normalisation import Normalisation, check_normalisation
from gpl_fast.net.steps import chain_of
from gpl_fast.net.taps import Tap, TappedModule
from gpl_fast.net.weights import Layout, shared_weights
from gpl_fast.real_tensors import holds_values, real_tensors


class FrozenNetwork:
    """What `LossNet` is once it is made.

    Attributes:
        layers: of a chain, in order; of a module none.
        in_channels: C of the maps that enter.
        mean, std: a number for each channel, behind an input adapter; None without.
        chain: the steps that the fast path goes through, or why it cannot.
        identity: networks of one identity have equal structure and weights. Of a chain the
            fingerprint; of a module one of its own in all processes, as nobody can compare what
            modules compute.
    """

    def __init__(
        self, layers: Sequence[Layer], weights: Mapping[str, Tensor], *,
        mean: Normalisation | None = None, std: Normalisation | None = None,
        module: nn.Module | None = None, taps: Mapping[str, Tap] | None = None,
        in_channels: int | None = None, drawn: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        held = [*weights.values(), *(module.parameters() if module is not None else ())]
        if not all(holds_values(t) for t in held):
            raise ValueError(
                "LossNet: got weights that hold no values (fake, or on the meta device); unpickle "
                "networks outside of FakeTensorMode"
            )
        self.layers = tuple(layers)
        with real_tensors():
            if module is None:
                check_weights(self.layers, weights)
            own = {name: w.detach().clone() for name, w in weights.items()}
        self._module, self._taps = module, dict(taps or {})
        self._drawn = drawn  # what draws the weights again: arguments of `vgg`, of the adapter
        self._network_channels = in_channels or self.layers[0].in_channels
        self.mean, self.std = check_normalisation(mean, std, self._network_channels)
        adapter = own.get("adapter")
        self.in_channels = self._network_channels if adapter is None else int(adapter.shape[1])
        self.chain = chain_of(
            self.layers, in_channels=self.in_channels, adapter=adapter is not None,
            mean=self.mean, std=self.std, network_channels=self._network_channels,
        )  # fmt: skip
        self._fingerprint: str | None = None  # of a module, once it is asked for
        self.identity = fingerprint(self._structure(), own) if self.is_chain else uuid.uuid4().hex
        self._weights = shared_weights(self.identity, own, self.chain)
        self._cast_modules = SimpleNamespace()  # `TappedModule` by `_module_on`

    @property
    def is_chain(self) -> bool:
        """True for a chain of named layers, False for `LossNet.from_module`."""
        return self._module is None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names that may be tapped, in the order of the forward pass."""
        return tuple(self._taps) or tuple(layer.name for layer in self.layers)

    @property
    def levels(self) -> tuple[str, ...]:
        """The blocks' outputs, which `level_weights` count: pools, and a rest after the last."""
        if self._taps:
            return tuple(self._taps)
        ends = [x.name for x in self.layers if x.kind in ("maxpool", "avgpool", "down")]
        return tuple(dict.fromkeys([*ends, self.layers[-1].name]))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights by layer, float32 on the CPU, ``(C_out, C_in, K, K)``."""
        with real_tensors():
            return {name: w.clone() for name, w in self._weights.tensors.items()}

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Keys of `weights`."""
        return tuple(self._weights.tensors)

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """``(C_b, H_b, W_b)`` of each layer's output for an input of height x width.

        Raises:
            ValueError: the input is too small for the down-sampling.
        """
        return layer_shapes(self.layers, height, width)

    def chain_obstacle(self) -> str | None:
        """Why the fast path cannot hold this network, or None."""
        return self.chain if isinstance(self.chain, str) else None

    def fingerprint(self) -> str:
        """SHA-256 (hex) of structure and weights: the same on every machine, rank and device.

        Of a `LossNet.from_module` network: its ``repr`` and all tensors that its modules hold, but
        no plain numbers that the ``repr`` does not show.
        """
        return self.identity if self.is_chain else self._fingerprint_of_module(self.identity)

    @constant_in_graphs
    def _fingerprint_of_module(self, _identity: str) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._structure(), self._weights.tensors, self._module)
        return self._fingerprint

    def _structure(self) -> dict[str, Any]:
        # A first call is its path alone: fingerprints depend on this text.
        taps = {name: tap if tap.call else tap.path for name, tap in self._taps.items()}
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": layers, "mean": self.mean, "std": self.std, "taps": taps}

    def _arguments(self) -> dict[str, Any]:
        """What this network can be made of again, but for how it was drawn."""
        return {
            "layers": self.layers, "weights": self._weights.tensors,
            "mean": self.mean, "std": self.std, "module": self._module, "taps": self._taps,
            "in_channels": self._network_channels,
        }  # fmt: skip

    def __repr__(self) -> str:
        if self._drawn is None:
            body = f"levels={list(self.levels)}, fingerprint={self.fingerprint()[:12]}"
            if self._module is not None:
                body = f"module={type(self._module).__name__}, {body}"
            return f"LossNet(in_channels={self.in_channels}, {body})"
        words = ", ".join(f"{name}={value!r}" for name, value in self._drawn["vgg"].items())
        adapter = self._drawn["adapter"]
        behind = f".with_input_adapter({adapter[0]}, seed={adapter[1]})" if adapter else ""
        return f"LossNet.vgg({words}){behind}"

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights on `device` in `dtype`, made once. Not copies: never write to them.

        Shape:
            As `weights`, by layer.
        """
        cast = self._cast_weights(self.identity, device, dtype)
        return dict(zip(self.weight_names, cast, strict=True))

    @constant_in_graphs
    def _cast_weights(
        self, _identity: str, device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        return list(self._weights.cast(device, dtype).values())

    def packs(self, layout: Layout) -> dict[str, Tensor]:
        """A chain's weights as the fast path reads them (`net.weights.pack_weights`), made once.
        Not copies: never write to them.

        Shape:
            As `pack_weights` says, by name.
        Raises:
            RuntimeError: the network is no chain.
        """
        return self._weights.packs(layout)

    @constant_in_graphs
    def _module_on(self, _identity: str, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the module on `device` in `dtype` in `_cast_modules`, made once."""
        name = f"{device} {dtype}".replace(".", "_")
        if not hasattr(self._cast_modules, name):
            assert self._module is not None
            with real_tensors(), streams.made_once(device, dtype):
                module = in_dtype(self._module, device, dtype)
            setattr(self._cast_modules, name, TappedModule(module, self._taps))
        return name

    def cached_tensors(self) -> list[Tensor]:
        """All that was made of the weights, on any device; networks of one identity share it.

        Shape:
            Any: for counting bytes.
        """
        tensors = self._weights.cached_tensors()
        for module in vars(self._cast_modules).values():
            tensors += [*module.parameters(), *module.buffers()]
        return tensors

    def network_input(self, y: Tensor, valid: Tensor | None) -> Tensor:
        """Input adapter, mean/std, then 0 where a pixel is not valid.

        Shape:
            (N, in_channels, H, W), `valid` (N, H, W) -> (N, C, H, W) in the dtype of `y`.
        """
        mean = std = None
        if self.mean is not None and self.std is not None:
            mean = torch.tensor(self.mean, dtype=y.dtype, device=y.device)
            std = torch.tensor(self.std, dtype=y.dtype, device=y.device)
        adapter = None
        if "adapter" in self._weights.tensors:
            adapter = self.weights_on(y.device, y.dtype)["adapter"]
        return reference.network_input(y, valid, adapter, mean, std)

    def features(self, y: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of the layers named, after `network_input`.

        Shape:
            (N, C, H, W) -> ``(N, C_b, H_b, W_b)`` by layer.
        Raises:
            ValueError: of a module, a tap that does not run or gives something else.
        """
        if self._module is not None:
            module = getattr(self._cast_modules, self._module_on(self.identity, y.device, y.dtype))
            return module(y, taps)  # type: ignore[no-any-return]
        return reference.features(y, self.layers, self.weights_on(y.device, y.dtype), taps)
