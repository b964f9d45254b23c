"""The frozen loss network: structure, initialisation, named layers, fingerprint, load and save."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpl_fast import reference
from gpl_fast.files import read_safetensors
from gpl_fast.initialisation import Init, draw_weight, own_generator
from gpl_fast.structure import (
    KERNEL_SIZES,
    POOLS,
    WIDTHS,
    Layer,
    check_chain,
    sequential_chain,
    weight_shape,
)
from gpl_fast.taps import TappedModule

T = TypeVar("T")


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile calls `function` while it traces and keeps the result.

    What `torch.compiler.assume_constant_result` does, which would import all of torch._dynamo. The
    arguments must be constants in torch 2.11; the object of a method may be any.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        module: nn.Module | None = None,
        taps: Mapping[str, str] | None = None,
        in_channels: int | None = None,
    ) -> None:
        self.layers = tuple(layers)
        with torch.inference_mode(False):  # tensors of that mode could not enter a graph later
            self._weights = {name: w.detach().clone() for name, w in weights.items()}
        self._names = tuple(self._weights)
        self.mean, self.std = _normalisation(mean, std)
        self._module = module
        self._taps = dict(taps or {})
        if "adapter" in self._weights:
            self.in_channels = self._weights["adapter"].shape[1]
        else:
            self.in_channels = in_channels or self.layers[0].in_channels
        if self.mean is not None and len(self.mean) not in (1, self._network_channels):
            raise ValueError(
                f"mean, std: got {len(self.mean)} values, expected {self._network_channels}, one "
                "for each channel that enters the network"
            )
        self._cast: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        self._cast_module: dict[tuple[torch.device, torch.dtype], TappedModule] = {}
        self._packs: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------------------- constructors

    @classmethod
    def vgg(
        cls,
        in_channels: int,
        blocks: Sequence[int] = (1, 1, 1, 1, 1),
        widths: Sequence[int] = WIDTHS,
        kernel_size: int = 3,
        pool: str = "max",
        init: Init = "he",
        seed: int = 0,
    ) -> LossNet:
        """The paper's VGG-like network with random weights and no biases (its Section 3.2).

        Args:
            in_channels: C, the channels of the maps that are compared.
            blocks: convolutions per block; each block ends in a down-sampling by 2.
            widths: output channels of each block (the first ``len(blocks)`` are used).
            kernel_size: 1, 3, 5 or 7, padded with ``kernel_size // 2`` zeros.
            pool: "max", "avg", or "stride": a convolution of stride 2 and a ReLU instead.
            init: "he", "xavier_normal", ("normal", std) or ("uniform", a).
            seed: of the weights' own CPU generator; the global one is neither read nor advanced.

        Raises:
            ValueError: an argument outside of what is listed.
        """
        for what, given in (("blocks", blocks), ("widths", widths)):
            if not isinstance(given, Iterable) or isinstance(given, str):
                raise ValueError(f"{what}: got {given!r}, expected a list, one for each block")
        blocks, widths = tuple(blocks), tuple(widths)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels: got {in_channels!r}, expected an integer >= 1")
        if not blocks or not all(isinstance(n, int) and n >= 1 for n in blocks):
            raise ValueError(f"blocks: got {blocks}, expected integers >= 1, one for each block")
        if len(widths) < len(blocks) or not all(isinstance(w, int) and w >= 1 for w in widths):
            raise ValueError(
                f"widths: got {widths}, expected {len(blocks)} integers >= 1, one for each block"
            )
        if kernel_size not in KERNEL_SIZES:
            raise ValueError(f"kernel_size: got {kernel_size!r}, expected one of {KERNEL_SIZES}")
        if pool not in POOLS:
            raise ValueError(f"pool: got {pool!r}, expected one of {POOLS}")
        layers: list[Layer] = []
        c = in_channels
        for b, (count, width) in enumerate(zip(blocks, widths, strict=False), start=1):
            for i in range(1, count + 1):
                layers.append(Layer(f"conv{b}_{i}", "conv", c, width, kernel_size))
                layers.append(Layer(f"relu{b}_{i}", "relu", width, width))
                c = width
            if pool == "stride":
                layers.append(Layer(f"down{b}", "down", c, c, kernel_size))
            else:
                layers.append(Layer(f"pool{b}", f"{pool}pool", c, c))
        generator = own_generator(seed)
        weights = {
            layer.name: draw_weight(weight_shape(layer), init, generator)
            for layer in layers
            if layer.kind in ("conv", "down")
        }
        return cls(layers, weights)

    @classmethod
    def from_sequential(
        cls,
        sequential: nn.Sequential,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> LossNet:
        """A chain of Conv2d, ReLU, MaxPool2d(2) and AvgPool2d(2), such as ``vgg16().features``.

        Weights and biases are copied and frozen. The input becomes ``(x - mean) / std`` before the
        first convolution pads it. Layers are named ``conv{block}_{i}``, ``relu{block}_{i}``,
        ``pool{block}``; what follows the last pool is one more block.

        Raises:
            TypeError: `sequential` is not an ``nn.Sequential``.
            ValueError: a layer that the chain cannot hold; `from_module` takes any module.
        """
        layers, weights = sequential_chain(sequential)
        return cls(layers, weights, mean=mean, std=std)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        taps: Mapping[str, str] | Iterable[str],
        *,
        in_channels: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> LossNet:
        """Any module, copied, frozen and in eval mode; it runs on the reference backend.

        Args:
            module: called with ``(N, C, H, W)``.
            taps: layer names mapped to submodule paths, ``{"relu1": "features.1"}``, or paths
                alone; in the order of the forward pass. Each must give one (N, C_b, H_b, W_b).
            in_channels: of the module; found from its first convolution if None.

        Raises:
            TypeError: `module` is not an ``nn.Module``.
            ValueError: an unknown path, no taps, or no convolution to find the channels from.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"from_module: got {type(module).__name__}, expected torch.nn.Module")
        paths = dict(taps) if isinstance(taps, Mapping) else {path: path for path in taps}
        known = dict(module.named_modules())
        unknown = [path for path in paths.values() if path not in known]
        if unknown or not paths:
            raise ValueError(
                f"from_module: taps: got {unknown or 'none'}, expected paths of submodules, such "
                f"as {[name for name in known if name][:8]}"
            )
        if in_channels is None:
            convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
            if not convs:
                raise ValueError("from_module: no Conv2d in the module, pass in_channels=")
            in_channels = convs[0].in_channels
        frozen = copy.deepcopy(module).cpu().eval().requires_grad_(False)
        for m in frozen.modules():  # would overwrite taps, or the caller's input
            if getattr(m, "inplace", None) is True:
                m.inplace = False  # type: ignore[assignment]
        return cls(
            (), {}, mean=mean, std=std, module=frozen, taps=paths, in_channels=in_channels
        )  # fmt: skip

    def with_input_adapter(self, in_channels: int, seed: int = 0) -> LossNet:
        """This network behind a frozen random 1x1 convolution ``in_channels -> C``.

        The "T" rows of the paper's Table 1 (150 classes into a pre-trained network of 3 channels).
        The weight is He-initialised from an own generator; mean and std act after it.

        Raises:
            ValueError: the network has an adapter already, or `in_channels` is not >= 1.
        """
        if "adapter" in self._weights:
            raise ValueError(
                "with_input_adapter: this network has an input adapter already; call it on the "
                "network without one"
            )
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels: got {in_channels!r}, expected an integer >= 1")
        generator = own_generator(seed)
        adapter = draw_weight((self.in_channels, in_channels, 1, 1), "he", generator)
        return LossNet(
            self.layers,
            {"adapter": adapter, **self._weights},
            mean=self.mean,
            std=self.std,
            module=self._module,
            taps=self._taps,
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
        return {name: w.clone() for name, w in self._weights.items()}

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Keys of `weights`."""
        return self._names

    @property
    def is_chain(self) -> bool:
        """True for a chain of named layers, False for `from_module`."""
        return self._module is None

    @property
    def _network_channels(self) -> int:
        adapter = self._weights.get("adapter")
        return self.in_channels if adapter is None else adapter.shape[0]

    def shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        """``(C_b, H_b, W_b)`` of each layer's output for an input of height x width.

        Raises:
            ValueError: the input is too small for the down-sampling.
        """
        sizes: dict[str, tuple[int, int, int]] = {}
        h, w = height, width
        for layer in self.layers:
            if layer.kind in ("maxpool", "avgpool"):
                h, w = h // 2, w // 2
            elif layer.kind == "down":
                h, w = (h + 1) // 2, (w + 1) // 2
            sizes[layer.name] = (layer.out_channels, h, w)
        if min(h, w) < 1:
            pools = sum(layer.kind in ("maxpool", "avgpool") for layer in self.layers)
            raise ValueError(
                f"input: got {height} x {width}, expected at least {2**pools} x {2**pools}: the "
                f"network halves it {pools} times; use larger inputs or a net with fewer blocks"
            )
        return sizes

    def fingerprint(self) -> str:
        """SHA-256 (hex) of structure and weights: the same on every machine, rank and device."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self._structure().encode())
            tensors = dict(self._weights)
            if self._module is not None:
                digest.update(repr(self._module).encode())
                tensors |= self._module.state_dict()
            for name in sorted(tensors):
                t = tensors[name].detach().cpu().contiguous()
                digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
                digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __repr__(self) -> str:
        body = "module" if self._module is not None else f"{len(self.layers)} layers"
        return f"LossNet(in_channels={self.in_channels}, {body}, levels={list(self.levels)})"

    # ------------------------------------------------------------------------------------ forward

    def weights_on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights on `device` in `dtype`, made once. Not copies: never write to them."""
        return dict(zip(self._names, self._cast_weights(device, dtype), strict=True))

    @constant_in_graphs
    def _cast_weights(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        key = (device, dtype)
        if key not in self._cast:
            with torch.inference_mode(False), torch.no_grad():
                cast = [_rounded(self._weights[k], dtype).to(device) for k in self._names]
            if torch._guards.detect_fake_mode() is not None:  # fake tensors must not outlive it
                return cast
            self._cast[key] = cast
        return self._cast[key]

    @constant_in_graphs
    def chain_obstacle(self) -> str | None:
        """Why the fast path cannot hold this network, or None; see `gpl_fast.plan`."""
        from gpl_fast.plan import obstacle

        return obstacle(self)

    @constant_in_graphs
    def chain_json(self) -> str:
        """This network's part of the fast path's `Spec`; see `gpl_fast.plan`."""
        from gpl_fast.plan import network_json

        return network_json(self)

    @constant_in_graphs
    def cached_packs(
        self, device: torch.device, dtype: torch.dtype, looked_up: bool
    ) -> list[Tensor]:
        """`chain.pack_weights` of this network, made once."""
        from gpl_fast.chain import pack_weights

        key = (device, dtype, looked_up)
        if key not in self._packs:
            with torch.inference_mode(False), torch.no_grad():
                packs = pack_weights(self, device, dtype, looked_up)
            if torch._guards.detect_fake_mode() is not None:
                return packs
            self._packs[key] = packs
        return self._packs[key]

    def cached_tensors(self) -> list[Tensor]:
        """All copies that `weights_on` and module networks hold, on any device."""
        copies = (*self._cast.values(), *self._packs.values())
        tensors = [t for held in copies for t in held]
        for module in self._cast_module.values():
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
            module: TappedModule = self._module_on(y.device, y.dtype)
            return module(y, taps)  # type: ignore[no-any-return]
        return reference.features(y, self.layers, self.weights_on(y.device, y.dtype), taps)

    def _module_on(self, device: torch.device, dtype: torch.dtype) -> TappedModule:
        key = (device, dtype)
        if key not in self._cast_module:
            assert self._module is not None
            with torch.inference_mode(False):
                module = copy.deepcopy(self._module).to(device=device, dtype=dtype)
            self._cast_module[key] = TappedModule(module, self._taps)
        return self._cast_module[key]

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
        from safetensors.torch import save_file

        tensors = {name: w.contiguous() for name, w in self._weights.items()}
        save_file(tensors, str(path), metadata={"gpl_fast.lossnet": self._structure()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LossNet:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            ValueError: not a safetensors file, truncated, not a LossNet's, or of another shape.
        """
        structure, tensors = read_safetensors(path, "gpl_fast.lossnet", "LossNet.save")
        try:
            layers = [Layer(**layer) for layer in structure["layers"]]
            shapes = {x.name: weight_shape(x) for x in layers if x.kind in ("conv", "down")}
            mean, std = _normalisation(structure["mean"], structure["std"])
            check_chain(layers)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the network's structure is malformed: {error!r}") from error
        for name, t in tensors.items():
            layer = name.removesuffix(".bias")
            if name == "adapter":
                expected: Sequence[int] = (layers[0].in_channels, t.shape[1] if t.dim() == 4 else 1)
                expected = (*expected, 1, 1)
            elif layer in shapes:
                expected = shapes[layer][:1] if name.endswith(".bias") else shapes[layer]
            else:
                raise ValueError(f"{path}: got a tensor {name!r} that no layer has")
            if tuple(t.shape) != tuple(expected) or t.dtype != torch.float32:
                raise ValueError(
                    f"{path}: {name}: got {tuple(t.shape)} {t.dtype}, expected {tuple(expected)} "
                    "torch.float32"
                )
        missing = [name for name in shapes if name not in tensors]
        if missing or not layers:
            raise ValueError(f"{path}: weights of {missing or 'all layers'} are missing")
        return cls(layers, tensors, mean=mean, std=std)

    def _structure(self) -> str:
        layers = [asdict(layer) for layer in self.layers]
        return json.dumps(
            {"layers": layers, "mean": self.mean, "std": self.std, "taps": self._taps}
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": {}, "_cast_module": {}, "_packs": {}}


def _rounded(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`; in half precision the rounding error of a kernel's tap goes on to its
    next tap, so that their sum, which is all that flat regions see of them, is off by one error at
    most instead of by all of theirs (docs/derivation.md, section 4)."""
    if w.dim() != 4 or torch.finfo(dtype).bits >= torch.finfo(w.dtype).bits:
        return w.to(dtype)
    taps, out = w.flatten(2), torch.empty_like(w.flatten(2), dtype=dtype)
    error = torch.zeros_like(taps[..., 0])
    for i in range(taps.shape[2]):
        wanted = taps[..., i] + error
        out[..., i] = wanted
        error = wanted - out[..., i].float()
    return out.view_as(w)


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    if mean is None and std is None:
        return None, None
    if mean is None or std is None or len(mean) != len(std) or not all(s > 0 for s in std):
        raise ValueError(
            f"mean, std: got {mean} and {std}, expected both, of the same length, std > 0"
        )
    return tuple(float(m) for m in mean), tuple(float(s) for s in std)
