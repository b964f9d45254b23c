"""The frozen loss network: structure, initialisation, named layers, fingerprint, load and save."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from types import SimpleNamespace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

from gpl_fast import reference, streams
from gpl_fast.files import read_safetensors, write_safetensors
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net.frozen_module import (
    frozen_copy,
    in_dtype,
    module_tensors,
    module_text,
    tensor_bytes,
)
from gpl_fast.net.initialisation import Init, check_init, draw_weight, own_generator
from gpl_fast.net.sequential import sequential_chain
from gpl_fast.net.structure import (
    WIDTHS,
    Layer,
    Normalisation,
    Structure,
    check_channels,
    check_normalisation,
    check_weights,
    layer_shapes,
    stored_layers,
    weight_shape,
)
from gpl_fast.net.taps import Tap, TappedModule, Taps, parse_taps
from gpl_fast.real_tensors import holds_values, real_tensors


class LossNet:
    """A frozen network and its named layers. Immutable, and not an ``nn.Module``: a loss that
    holds one has no parameters and no buffers. Weights are copied to a device and dtype once.

    Build one with `vgg`, `from_sequential`, `from_module` or `load`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: Mapping[str, Tensor],
        *,
        mean: Normalisation | None = None,
        std: Normalisation | None = None,
        module: nn.Module | None = None,
        taps: Mapping[str, Tap] | None = None,
        in_channels: int | None = None,
        drawn: dict[str, Any] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        held = [*weights.values(), *(module.parameters() if module is not None else ())]
        if not all(holds_values(t) for t in held):
            raise ValueError(
                "LossNet: got weights that hold no values (fake, or on the meta device); unpickle "
                "networks outside of FakeTensorMode"
            )
        with real_tensors():
            if module is None:
                check_weights(self.layers, weights)
            self._weights = {name: w.detach().clone() for name, w in weights.items()}
        self._names = tuple(self._weights)
        self._module = module
        self._taps = dict(taps or {})
        channels = in_channels or self.layers[0].in_channels
        self.mean, self.std = check_normalisation(mean, std, channels)
        adapter = self._weights.get("adapter")
        self.in_channels: int = channels if adapter is None else adapter.shape[1]
        self._network_channels = channels
        self._drawn = drawn  # what draws the weights again: arguments of `vgg`, of the adapter
        # In the guards of what torch.compile keeps of this network: no other network, of any
        # process, has it. A string: integers may become symbols.
        self.identity = uuid.uuid4().hex
        self._fingerprint: str | None = None
        self._forget()

    def _forget(self) -> None:
        """Start with empty caches."""
        self._cast: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._cast_modules = SimpleNamespace()  # `TappedModule` by `_module_on`
        self._packs: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}

    # ------------------------------------------------------------------------------- constructors

    @classmethod
    def vgg(
        cls,
        in_channels: SupportsIndex,
        blocks: Iterable[SupportsIndex] = (1, 1, 1, 1, 1),
        widths: Iterable[SupportsIndex] = WIDTHS,
        kernel_size: SupportsIndex = 3,
        pool: str = "max",
        init: Init = "he",
        seed: SupportsIndex = 0,
    ) -> LossNet:
        """The paper's VGG-like network (its Section 3.1), random and without biases (Section 3.2).

        Args:
            in_channels: C, the channels of the maps that are compared.
            blocks: convolutions per block; each block ends in a down-sampling by 2. The paper's
                tables of dense prediction (its Section 4.2) use 16 convolutions and 5 pools,
                (2, 2, 4, 4, 4); the default is what its Section 4.1 recommends where time and
                memory count.
            widths: output channels of each block (the first ``len(blocks)`` are used).
            kernel_size: 1, 3, 5 or 7, padded with ``kernel_size // 2`` zeros.
            pool: "max", "avg", or "stride": a convolution of stride 2 and a ReLU instead.
            init: "he", "xavier_normal", ("normal", std) or ("uniform", a). "he" is N(0, 2/fan_in),
                which names a variance; std is a standard deviation.
            seed: of the weights' own CPU generator; the global one is neither read nor advanced.

        Raises:
            ValueError: an argument outside of what is listed.
        """
        structure = Structure.checked(in_channels, blocks, widths, kernel_size, pool)
        init, generator = check_init(init), own_generator(seed)
        layers = structure.layers()
        weights = {
            layer.name: draw_weight(weight_shape(layer), init, generator)
            for layer in layers
            if layer.kind in ("conv", "down")
        }
        arguments = {**structure._asdict(), "init": init, "seed": int(seed)}
        return cls(layers, weights, drawn={"vgg": arguments, "adapter": None})

    @classmethod
    def from_sequential(
        cls,
        sequential: nn.Sequential,
        *,
        mean: Normalisation | None = None,
        std: Normalisation | None = None,
    ) -> LossNet:
        """A chain of Conv2d, ReLU, MaxPool2d(2) and AvgPool2d(2), such as ``vgg16().features``.

        Weights and biases are copied and frozen. The input becomes ``(x - mean) / std`` before the
        first convolution pads it. Layers are named ``conv{block}_{i}``, ``relu{block}_{i}``,
        ``pool{block}``; what follows the last pool is one more block.

        Args:
            sequential: of modules whose ``forward`` is torch's own, without hooks and without
                parametrizations; nested ones are taken apart.
            mean, std: one number for each channel that enters the network, or one for all.

        Raises:
            TypeError: `sequential` is not an ``nn.Sequential``.
            ValueError: a layer that the chain cannot hold, with its position; `from_module` takes
                any module.
        """
        layers, weights = sequential_chain(sequential)
        return cls(layers, weights, mean=mean, std=std)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        taps: Taps,
        *,
        in_channels: SupportsIndex | None = None,
        mean: Normalisation | None = None,
        std: Normalisation | None = None,
    ) -> LossNet:
        """Any module, copied, frozen and in eval mode; it runs on the reference backend.

        A tap is what its submodule returns, before anything that follows writes to it. A pass ends
        at the last tap that a loss uses: gradients and autocast are as before then, lists, dicts
        and sets that were empty in `module` are empty again; a ``@contextmanager`` without try and
        finally does not get to its end.

        The copy has the hooks that are part of the module: what ``torch.nn.utils`` makes a weight
        with (`weight_norm`), and methods of its own modules. A UserWarning names the modules whose
        other forward hooks it does not have.

        Args:
            module: called with ``(N, C, H, W)``.
            taps: layer names mapped to submodule paths, ``{"relu1": "features.1"}``, or paths
                alone; in the order of the forward pass. Each must give one (N, C_b, H_b, W_b).
                Of a submodule that runs more than once, the first output;
                ``{"name": ("path", 1)}`` is the second. A submodule with several paths is named
                by its first.
            in_channels: of the module; found from its first convolution if None.
            mean, std: one number for each channel that enters the network, or one for all.

        Raises:
            TypeError: `module` is not an ``nn.Module``.
            ValueError: an unknown path, a second path of one submodule, no taps, a part of a
                scripted module, no convolution to find the channels from, weights that hold no
                values, or a module that cannot be copied. At a call: a tap that does not run, or
                that has no gradient where the input has one.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"from_module: got {type(module).__name__}, expected torch.nn.Module")
        parsed = parse_taps(module, taps)
        if in_channels is None:
            convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
            if not convs:
                raise ValueError("from_module: no Conv2d in the module, pass in_channels=")
            in_channels = convs[0].in_channels
        frozen, channels = frozen_copy(module), check_channels(in_channels)
        return cls((), {}, mean=mean, std=std, module=frozen, taps=parsed, in_channels=channels)

    def with_input_adapter(self, in_channels: SupportsIndex, seed: SupportsIndex = 0) -> LossNet:
        """This network behind a frozen random 1x1 convolution ``in_channels -> C``.

        The "T" rows of the paper's Table 1 (19 classes into a pre-trained network of 3 channels).
        Frozen, and He-initialised from an own generator: a convention here. mean and std act after
        it.

        Raises:
            ValueError: the network has an adapter already, or `in_channels` is not >= 1.
        """
        if "adapter" in self._weights:
            raise ValueError(
                "with_input_adapter: this network has an input adapter already; call it on the "
                "network without one"
            )
        channels = check_channels(in_channels)
        shape = (self._network_channels, channels, 1, 1)
        adapter = draw_weight(shape, "he", own_generator(seed))
        drawn = self._drawn and {**self._drawn, "adapter": (channels, int(seed))}
        return LossNet(
            self.layers,
            {"adapter": adapter, **self._weights},
            mean=self.mean,
            std=self.std,
            module=self._module,
            taps=self._taps,
            in_channels=self._network_channels,
            drawn=drawn,
        )

    # -------------------------------------------------------------------------------- description

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
            return {name: w.clone() for name, w in self._weights.items()}

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Keys of `weights`."""
        return self._names

    @property
    def is_chain(self) -> bool:
        """True for a chain of named layers, False for `from_module`."""
        return self._module is None

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """``(C_b, H_b, W_b)`` of each layer's output for an input of height x width.

        Raises:
            ValueError: the input is too small for the down-sampling.
        """
        return layer_shapes(self.layers, height, width)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of structure and weights: the same on every machine, rank and device.

        Of a `from_module` network: its ``repr`` and all tensors that its modules hold, but no plain
        numbers that the ``repr`` does not show.
        """
        return self._digest(self.identity)

    @constant_in_graphs
    def _digest(self, _identity: str) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self._structure()).encode())
            with real_tensors():
                tensors = dict(self._weights)
                if self._module is not None:
                    digest.update(module_text(self._module).encode())
                    tensors |= module_tensors(self._module)
                for name in sorted(tensors):
                    digest.update(f"{name} ".encode() + tensor_bytes(tensors[name]))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

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

    # ------------------------------------------------------------------------------------ forward

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights on `device` in `dtype`, made once. Not copies: never write to them."""
        weights = self._cast_weights(self.identity, device, dtype)
        return dict(zip(self._names, weights, strict=True))

    @constant_in_graphs
    def _cast_weights(
        self, _identity: str, device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        key = (device, dtype)
        if key not in self._cast:
            made_once = streams.made_once(device, dtype)
            with torch.inference_mode(False), torch.no_grad(), made_once:
                cast = [_rounded(self._weights[k], dtype).to(device) for k in self._names]
            if active_fake_mode() is not None:  # fake tensors must not outlive it
                return cast
            self._cast[key] = cast
        return streams.read_here(self._cast[key])

    def chain_obstacle(self) -> str | None:
        """Why the fast path cannot hold this network, or None; see `gpl_fast.plan`."""
        return self._chain_obstacle(self.identity)

    @constant_in_graphs
    def _chain_obstacle(self, _identity: str) -> str | None:
        from gpl_fast.plan import obstacle

        return obstacle(self)

    def chain_json(self) -> str:
        """This network's part of the fast path's `Spec`; see `gpl_fast.plan`."""
        return self._chain_json(self.identity)

    @constant_in_graphs
    def _chain_json(self, _identity: str) -> str:
        from gpl_fast.plan import network_json

        return network_json(self)

    def cached_packs(
        self, device: torch.device, dtype: torch.dtype, looked_up: bool
    ) -> list[Tensor]:
        """`chain.pack_weights` of this network, made once."""
        return self._cached_packs(self.identity, device, dtype, looked_up)

    @constant_in_graphs
    def _cached_packs(
        self, _identity: str, device: torch.device, dtype: torch.dtype, looked_up: bool
    ) -> list[Tensor]:
        from gpl_fast.chain import pack_weights

        key = (device, dtype, looked_up)
        if key not in self._packs:
            made_once = streams.made_once(device, dtype)
            with torch.inference_mode(False), torch.no_grad(), made_once:
                packs = pack_weights(self, device, dtype, looked_up)
            if active_fake_mode() is not None:
                return packs
            self._packs[key] = packs
        return streams.read_here(self._packs[key])

    def cached_tensors(self) -> list[Tensor]:
        """All copies that `weights_on` and module networks hold, on any device."""
        copies = (*self._cast.values(), *self._packs.values())
        tensors = [t for held in copies for t in held]
        for module in vars(self._cast_modules).values():
            tensors += [*module.parameters(), *module.buffers()]
        return tensors

    def network_input(self, y: Tensor, valid: Tensor | None) -> Tensor:
        """Input adapter, mean/std, then 0 where a pixel is not valid; in the dtype of `y`."""
        mean = std = None
        if self.mean is not None and self.std is not None:
            mean = torch.tensor(self.mean, dtype=y.dtype, device=y.device)
            std = torch.tensor(self.std, dtype=y.dtype, device=y.device)
        adapter = None
        if "adapter" in self._weights:
            adapter = self.weights_on(y.device, y.dtype)["adapter"]
        return reference.network_input(y, valid, adapter, mean, std)

    def features(self, y: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Outputs ``(N, C_b, H_b, W_b)`` of the layers named, after `network_input`."""
        if self._module is not None:
            module = getattr(self._cast_modules, self._module_on(self.identity, y.device, y.dtype))
            return module(y, taps)  # type: ignore[no-any-return]
        return reference.features(y, self.layers, self.weights_on(y.device, y.dtype), taps)

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

    # -------------------------------------------------------------------------------------- files

    def save(self, path: str | PathLike[str]) -> None:
        """Write structure and weights to a safetensors file.

        Raises:
            ValueError: the network is a `from_module` one; save that module's state_dict instead.
        """
        if self._module is not None:
            raise ValueError(
                "save: a from_module network has no structure of its own to write; save the "
                "module's state_dict and build the LossNet from the module again"
            )
        write_safetensors(path, self._weights, "gpl_fast.lossnet", self._structure())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LossNet:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            OSError: the file cannot be opened.
            ValueError: not a safetensors file, truncated, not a LossNet's, of another shape, or
                with weights that are not finite; the message begins with the path.
        """
        structure, tensors = read_safetensors(path, "gpl_fast.lossnet", "LossNet.save")
        try:
            layers = stored_layers(structure["layers"])
            mean, std = (structure[name] for name in ("mean", "std"))
            if not all(x is None or isinstance(x, list) for x in (mean, std)):
                raise TypeError(f"mean, std: got {mean} and {std}, expected lists")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path!s}: the network's structure is malformed: {error}") from error
        try:
            return cls(layers, tensors, mean=mean, std=std)
        except ValueError as error:
            raise ValueError(f"{path!s}: {error}") from error

    def _structure(self) -> dict[str, Any]:
        # A first call is its path alone: fingerprints depend on this text.
        taps = {name: tap if tap.call else tap.path for name, tap in self._taps.items()}
        layers = [asdict(layer) for layer in self.layers]
        return {"layers": layers, "mean": self.mean, "std": self.std, "taps": taps}

    # ------------------------------------------------------------------------------------- copies

    def __copy__(self) -> LossNet:
        """The same weights, which nothing writes to, without what was made of them."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._forget()
        return other

    def __deepcopy__(self, _memo: dict[int, Any]) -> LossNet:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        """How to draw the weights again, or where they were not drawn here, the weights."""
        if self._drawn is not None:
            return {**self._drawn, "fingerprint": self.fingerprint()}
        return {
            "layers": self.layers,
            "weights": self._weights,
            "mean": self.mean,
            "std": self.std,
            "module": self._module,
            "taps": self._taps,
            "in_channels": self._network_channels,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_weights" in state:
            state = _named_state(state)
        if "vgg" in state:
            net = LossNet.vgg(**state["vgg"])
            if state["adapter"]:
                net = net.with_input_adapter(*state["adapter"])
            if net.fingerprint() != state["fingerprint"]:
                raise ValueError(
                    "LossNet: the pickle's weights, drawn again, have the fingerprint "
                    f"{net.fingerprint()[:12]}…, expected {state['fingerprint'][:12]}…: another "
                    "version drew them; keep weights with LossNet.save and LossNet.load instead"
                )
        else:
            net = LossNet(**state)
        self.__dict__.update(net.__dict__)


def _named_state(state: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `LossNet` from its attributes, of which old pickles are."""
    adapter, module = state["_weights"].get("adapter"), state["_module"]
    return {
        "layers": state["layers"],
        "weights": state["_weights"],
        "mean": state["mean"],
        "std": state["std"],
        "module": module and frozen_copy(module),
        "taps": {name: Tap(path) for name, path in state["_taps"].items()},
        "in_channels": state["in_channels"] if adapter is None else adapter.shape[0],
    }


def _rounded(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`; in half precision the rounding error of a kernel's tap goes on to its
    next tap, so that their sum, which is all that flat regions see of them, is off by one error at
    most instead of by all of theirs (docs/numerics.md)."""
    if w.dim() != 4 or torch.finfo(dtype).bits >= torch.finfo(w.dtype).bits:
        return w.to(dtype)
    taps, out = w.flatten(2), torch.empty_like(w.flatten(2), dtype=dtype)
    error = torch.zeros_like(taps[..., 0])
    for i in range(taps.shape[2]):
        wanted = taps[..., i] + error
        out[..., i] = wanted
        error = wanted - out[..., i].float()
    return out.view_as(w)
