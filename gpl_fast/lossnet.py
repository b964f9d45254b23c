"""The frozen loss network: structure, initialisation, named layers, fingerprint, load and save."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpl_fast import reference

Init = str | tuple[str, float]
T = TypeVar("T")

# Convolutions per block of the paper's networks (its Section 4.2).
STRUCTURES: Mapping[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
KERNEL_SIZES = (1, 3, 5, 7)
POOLS = ("max", "avg", "stride")
KINDS = ("conv", "relu", "maxpool", "avgpool", "down")


@dataclass(frozen=True)
class Layer:
    """One step of the chain: ``kind`` is conv, relu, maxpool, avgpool or down (stride 2 + ReLU)."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: int = 1


def parse_blocks(net: str) -> tuple[int, ...]:
    """``"vgg19"`` or ``"2,2,4,4,4"`` -> convolutions per block.

    Raises:
        ValueError: the text is neither a known name nor a list of positive integers.
    """
    if net in STRUCTURES:
        return STRUCTURES[net]
    try:
        blocks = tuple(int(part) for part in net.split(","))
    except ValueError:
        blocks = ()
    if not blocks or min(blocks) < 1:
        known = ", ".join(repr(name) for name in STRUCTURES)
        raise ValueError(
            f"net: got {net!r}, expected one of {known}, or convolutions per block such as "
            "'1,1,1,1,1', or a LossNet (LossNet.vgg, .from_sequential, .from_module, .load)"
        )
    return blocks


def draw_weight(shape: Sequence[int], init: Init, generator: torch.Generator) -> Tensor:
    """A ``(C_out, C_in, K, K)`` float32 weight, drawn in float64 and cast.

    float32 draws differ between CPU generations (vectorised and plain code round differently).
    ``"he"``: N(0, 2 / fan_in), the paper's Section 3.2.

    Raises:
        ValueError: `init` is unknown or its number is not positive and finite.
    """
    fan_in, fan_out = math.prod(shape[1:]), shape[0] * math.prod(shape[2:])
    named = isinstance(init, str)
    try:
        kind, number = (init, 1.0) if isinstance(init, str) else (init[0], float(init[1]))
    except (TypeError, ValueError, IndexError):
        kind, number = "malformed", 1.0
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"init: got {init!r}, expected a positive number, as in ('normal', 0.01)")
    if kind == "uniform" and not named:
        draw = torch.rand(*shape, generator=generator, dtype=torch.float64)
        return ((2 * draw - 1) * number).float()
    if kind == "he" and named:
        std = math.sqrt(2 / fan_in)
    elif kind == "xavier_normal" and named:
        std = math.sqrt(2 / (fan_in + fan_out))
    elif kind == "normal" and not named:
        std = number
    else:
        raise ValueError(
            f"init: got {init!r}, expected 'he', 'xavier_normal', ('normal', std) or ('uniform', a)"
        )
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).float()


def constant_in_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """torch.compile calls `function` while it traces and keeps the result.

    What `torch.compiler.assume_constant_result` does, which would import all of torch._dynamo.
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
        self._cast_module: dict[tuple[torch.device, torch.dtype], _TappedModule] = {}
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
        generator = _own_generator(seed)
        weights = {
            layer.name: draw_weight(_weight_shape(layer), init, generator)
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
        if not isinstance(sequential, nn.Sequential):
            raise TypeError(
                f"from_sequential: got {type(sequential).__name__}, expected torch.nn.Sequential "
                "(of torchvision's VGG its .features); any other module: LossNet.from_module"
            )
        layers: list[Layer] = []
        weights: dict[str, Tensor] = {}
        block, i, c = 1, 0, 0
        for position, m in enumerate(_flatten(sequential)):
            after_conv = bool(layers) and layers[-1].kind == "conv"
            if isinstance(m, nn.Conv2d) and _is_same_convolution(m) and c in (0, m.in_channels):
                i, c = i + 1, m.out_channels
                name = f"conv{block}_{i}"
                layers.append(Layer(name, "conv", m.in_channels, c, int(m.kernel_size[0])))
                weights[name] = m.weight.detach().float().cpu().clone()
                if m.bias is not None:
                    weights[f"{name}.bias"] = m.bias.detach().float().cpu().clone()
            elif isinstance(m, nn.ReLU) and after_conv:
                layers.append(Layer(f"relu{block}_{i}", "relu", c, c))
            elif isinstance(m, nn.MaxPool2d | nn.AvgPool2d) and _halves(m) and layers:
                kind = "maxpool" if isinstance(m, nn.MaxPool2d) else "avgpool"
                layers.append(Layer(f"pool{block}", kind, c, c))
                block, i = block + 1, 0
            else:
                raise ValueError(
                    f"from_sequential: got {m} at position {position}, expected a chain of "
                    "Conv2d (odd kernel, stride 1, padding kernel_size // 2, zeros), each followed "
                    "by at most one ReLU, and MaxPool2d(2) or AvgPool2d(2); for anything else use "
                    "LossNet.from_module"
                )
        if not layers:
            raise ValueError("from_sequential: got an empty chain, expected at least one Conv2d")
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
        generator = _own_generator(seed)
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
                cast = [self._weights[k].to(device=device, dtype=dtype) for k in self._names]
            if torch._guards.detect_fake_mode() is not None:  # fake tensors must not outlive it
                return cast
            self._cast[key] = cast
        return self._cast[key]

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
            module: _TappedModule = self._module_on(y.device, y.dtype)
            return module(y, taps)  # type: ignore[no-any-return]
        return reference.features(y, self.layers, self.weights_on(y.device, y.dtype), taps)

    def _module_on(self, device: torch.device, dtype: torch.dtype) -> _TappedModule:
        key = (device, dtype)
        if key not in self._cast_module:
            assert self._module is not None
            with torch.inference_mode(False):
                module = copy.deepcopy(self._module).to(device=device, dtype=dtype)
            self._cast_module[key] = _TappedModule(module, self._taps)
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
            shapes = {x.name: _weight_shape(x) for x in layers if x.kind in ("conv", "down")}
            mean, std = _normalisation(structure["mean"], structure["std"])
            _check_chain(layers)
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


class _TappedModule(nn.Module):
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


def _own_generator(seed: int) -> torch.Generator:
    try:
        return torch.Generator().manual_seed(seed)
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"seed: got {seed!r}, expected a 64-bit integer") from None


def _check_chain(layers: Sequence[Layer]) -> None:
    """Raises: TypeError for an unknown kind, or channels that do not fit the layer before."""
    for before, layer in zip((None, *layers), layers, strict=False):
        if layer.kind not in KINDS or (before and layer.in_channels != before.out_channels):
            raise TypeError(f"got {layer} after {before}")


def _weight_shape(layer: Layer) -> tuple[int, int, int, int]:
    return (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)


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


def _flatten(sequential: nn.Sequential) -> list[nn.Module]:
    flat: list[nn.Module] = []
    for m in sequential:
        flat.extend(_flatten(m) if isinstance(m, nn.Sequential) else [m])
    return flat


def _is_same_convolution(m: nn.Conv2d) -> bool:
    k = m.kernel_size[0]
    return (
        m.kernel_size == (k, k)
        and k % 2 == 1
        and m.stride == (1, 1)
        and m.padding in ((k // 2, k // 2), "same")
        and m.dilation == (1, 1)
        and m.groups == 1
        and m.padding_mode == "zeros"
    )


def _halves(m: nn.MaxPool2d | nn.AvgPool2d) -> bool:
    pair = (2, (2, 2))
    if isinstance(m, nn.MaxPool2d) and (m.dilation not in (1, (1, 1)) or m.return_indices):
        return False
    if isinstance(m, nn.AvgPool2d) and m.divisor_override is not None:
        return False
    no_padding = m.padding in (0, (0, 0)) and not m.ceil_mode
    return m.kernel_size in pair and m.stride in pair and no_padding
