"""`LossNet`: the ways to make a frozen network, its file, its copies and pickles."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from types import SimpleNamespace
from typing import Any

from torch import nn

from gpl_fast.input_checks import Integer
from gpl_fast.net.frozen_module import first_channels, frozen_copy
from gpl_fast.net.initialisation import Init, check_init, draw_weight, own_generator
from gpl_fast.net.layers import weight_shape
from gpl_fast.net.network import FrozenNetwork
from gpl_fast.net.network_file import read_network, write_network
from gpl_fast.net.normalisation import Normalisation
from gpl_fast.net.sequential import sequential_chain
from gpl_fast.net.structure import WIDTHS, Structure, check_channels
from gpl_fast.net.taps import Tap, Taps, parse_taps


class LossNet(FrozenNetwork):
    """A frozen network and its named layers. Immutable, and not an ``nn.Module``: a loss that
    holds one has no parameters and no buffers. Weights are copied to a device and dtype once.

    Build one with `vgg`, `from_sequential`, `from_module` or `load`.

    Shape:
        (N, in_channels, H, W) -> (N, C_b, H_b, W_b) of each layer, whose sizes `shapes` gives.
    Raises:
        TypeError, ValueError: as these four say.
    Source:
        docs/math.md, section 2; Liu et al., CVPR 2021, Sections 3.1 and 3.2.
    """

    @classmethod
    def vgg(
        cls,
        in_channels: Integer,
        blocks: Iterable[Integer] = (1, 1, 1, 1, 1),
        widths: Iterable[Integer] = WIDTHS,
        kernel_size: Integer = 3,
        pool: str = "max",
        init: Init = "he",
        seed: Integer = 0,
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

        Weights and biases are copied and frozen. A BatchNorm2d behind a convolution, as in
        ``vgg16_bn``, is folded into it with its running statistics, in train mode too. The input
        becomes ``(x - mean) / std`` before the first convolution pads it. Layers are named
        ``conv{block}_{i}``, ``relu{block}_{i}``, ``pool{block}``; what follows the last pool is one
        more block.

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
        in_channels: Integer | None = None,
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
        channels = first_channels(module) if in_channels is None else check_channels(in_channels)
        frozen = frozen_copy(module)
        return cls((), {}, mean=mean, std=std, module=frozen, taps=parsed, in_channels=channels)

    def with_input_adapter(self, in_channels: Integer, seed: Integer = 0) -> LossNet:
        """This network behind a frozen random 1x1 convolution ``in_channels -> C``.

        The "T" rows of the paper's Table 1 (19 classes into a pre-trained network of 3 channels).
        Frozen, He-initialised from an own generator of `seed`: a convention here. mean and std act
        after it.

        Raises:
            ValueError: the network has an adapter already, or `in_channels` is not >= 1.
        """
        if "adapter" in self._weights.tensors:
            raise ValueError(
                "with_input_adapter: this network has an input adapter already; call it on the "
                "network without one"
            )
        channels = check_channels(in_channels)
        adapter = draw_weight((self._network_channels, channels, 1, 1), "he", own_generator(seed))
        drawn = self._drawn and {**self._drawn, "adapter": (channels, int(seed))}
        weights = {"adapter": adapter, **self._weights.tensors}
        return LossNet(**{**self._arguments(), "weights": weights, "drawn": drawn})

    def save(self, path: str | PathLike[str]) -> None:
        """Write structure and weights to a safetensors file.

        Raises:
            OSError: the file cannot be written.
            ValueError: the network is a `from_module` one; save that module's state_dict instead.
        """
        if self._module is not None:
            raise ValueError(
                "save: a from_module network has no structure of its own to write; save the "
                "module's state_dict and build the LossNet from the module again"
            )
        write_network(path, self._structure(), self._weights.tensors)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LossNet:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            OSError: the file cannot be opened.
            ValueError: not a safetensors file, truncated, not a LossNet's, of another shape, or
                with weights that are not finite; the message begins with the path.
        """
        arguments = read_network(path)
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{path!s}: {error}") from error

    def __copy__(self) -> LossNet:
        """The same weights, and what was made of them, which nothing writes to; a module's own
        copies stay behind."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._cast_modules = SimpleNamespace()
        return other

    def __deepcopy__(self, _memo: dict[int, Any]) -> LossNet:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        """How to draw the weights again, or where they were not drawn here, the weights."""
        if self._drawn is not None:
            return {**self._drawn, "fingerprint": self.fingerprint()}
        return self._arguments()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_weights" in state:
            state = _named_state(state)
        net = _drawn_again(state) if "vgg" in state else LossNet(**state)
        self.__dict__.update(net.__dict__)


def _drawn_again(state: dict[str, Any]) -> LossNet:
    net = LossNet.vgg(**state["vgg"])
    if state["adapter"]:
        net = net.with_input_adapter(*state["adapter"])
    if net.fingerprint() != state["fingerprint"]:
        raise ValueError(
            "LossNet: the pickle's weights, drawn again, have the fingerprint "
            f"{net.fingerprint()[:12]}…, expected {state['fingerprint'][:12]}…: another version "
            "drew them; keep weights with LossNet.save and LossNet.load instead"
        )
    return net


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
