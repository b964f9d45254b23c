"""The Generic Perceptual Loss as a module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpl_fast import distance_maps, parts
from gpl_fast.costs import Explanation
from gpl_fast.explain import explain
from gpl_fast.input_checks import Integer, Number, as_int
from gpl_fast.layer_weights import HeldWeights, LayerWeight, level_taps
from gpl_fast.net.initialisation import Init
from gpl_fast.net.lossnet import LossNet
from gpl_fast.net.structure import WIDTHS, parse_blocks
from gpl_fast.options import IgnoreIndex, Options, TermWords
from gpl_fast.targets import TargetFeatures, TargetLike, TargetMap, first_look


class GenericWords(TermWords, total=False):
    """Keywords of `GenericPerceptualLoss` beside its channels and the label that is ignored."""

    net: str | Sequence[Integer] | LossNet
    widths: Iterable[Integer]
    kernel_size: Integer
    pool: str
    init: Init
    seed: Integer
    level_weights: Iterable[LayerWeight] | None
    reduction: str


class GenericPerceptualLoss(nn.Module):
    """Compare prediction and target in the features of one frozen random network.

    Holds no parameters and no buffers.

    Args:
        in_channels: C: classes, or 1 for depth and masks.
        net: "vgg11", "vgg13", "vgg16", "vgg19" (the paper's structures, random weights),
            convolutions per block such as "1,1,1,1,1", or a `LossNet`. The default is the paper's
            recommendation where time and memory count; its tables for dense prediction use 16
            convolutions and 5 pools, "vgg19".
        widths, kernel_size, pool, init, seed: of the network; see `LossNet.vgg`. With a `LossNet`
            they are that network's own and must be left alone.
        level_weights: one for each block, a number or one for each of its C_b channels; None = the
            last block only, weight 1.
        activation: "softmax", "sigmoid" or "none", of the prediction and of a dense target.
        target_activation: of a dense target: "auto" = the prediction's, and a target that holds
            probabilities already (one-hot, multi-hot, a mask, a teacher's softmax) is refused, as
            its activation would be applied twice: looked at on the CPU at each call, on a GPU at
            the first; "same" = the prediction's whatever it holds; "softmax", "sigmoid"; "none" =
            it holds probabilities, or is compared as it is.
        temperature: T: every activation, "none" included, sees ``z / T``; a target that is taken as
            it is beside an activated prediction is not divided. The gradient is not multiplied by
            the T² of distillation: do that with the loss' weight.
        ignore_index: label of pixels that do not count, or several, for label targets.
        reduction: "mean", "sum", or "none" -> (N,).
        criterion: "l2", the mean of squares, or "l1", of absolute values (of Gram matrices' too).
        normalize_features: divide the features at each tap by their norm over channels, plus 1e-10,
            before they are compared; Gram matrices are of the features as they are.
        compute_dtype: of the network; None = autocast's dtype if on, else the prediction's.
        backend: "auto", "fast" or "reference"; the variable GPL_FAST_BACKEND overrides "auto".
        workspace_mb: bound on the fast path's transient memory, in 2^20 bytes: images go through
            in chunks and strips. "auto" = 256 on a CPU, 1/64 of a GPU's memory but at least 640,
            and more where an input cannot do with it.

    Shape:
        As `functional.generic_perceptual_loss`: (N, C, H, W) and a target -> 0-dim or (N,).

    Raises:
        TypeError, ValueError: an argument outside of what is listed.

    Source:
        docs/math.md, eq. (1); Liu et al., "Generic Perceptual Loss for Modeling Structured Output
        Dependencies", CVPR 2021, eq. (1) and Section 3.
    """

    def __init__(
        self,
        in_channels: Integer,
        net: str | Sequence[Integer] | LossNet = "1,1,1,1,1",
        *,
        widths: Iterable[Integer] = WIDTHS,
        kernel_size: Integer = 3,
        pool: str = "max",
        init: Init = "he",
        seed: Integer = 0,
        level_weights: Iterable[LayerWeight] | None = None,
        activation: str = "softmax",
        target_activation: str = "auto",
        temperature: Number = 1.0,
        ignore_index: IgnoreIndex = None,
        reduction: str = "mean",
        criterion: str = "l2",
        normalize_features: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        workspace_mb: Number | str = "auto",
    ) -> None:
        super().__init__()
        channels = as_int("in_channels", in_channels, "an integer >= 1")
        self.net = _network(channels, net, widths, kernel_size, pool, init, seed)
        self.options = Options.of(
            "GenericPerceptualLoss",
            {
                "activation": activation,
                "target_activation": target_activation,
                "temperature": temperature,
                "ignore_index": ignore_index,
                "reduction": reduction,
                "criterion": criterion,
                "normalize_features": normalize_features,
                "compute_dtype": compute_dtype,
                "backend": backend,
                "workspace_mb": workspace_mb,
            },
        )
        self.options.check_channels(channels)
        weights = level_taps(self.net, level_weights, self.options.distance, once=True)
        self.weights = HeldWeights(weights)
        self._looked = False  # at a dense target on a GPU

    @property
    def taps(self) -> dict[str, float]:
        """The weight of each layer that is compared; `HeldWeights.features`."""
        return self.weights.features

    def forward(self, pred: Tensor, target: TargetLike, mask: Tensor | None = None) -> Tensor:
        """The loss of `pred`, with the words of this module.

        Shape:
            As `functional.generic_perceptual_loss`.

        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.generic_perceptual_loss`.
        """
        weights = self.weights.on(pred)
        value = parts.generic_value(pred, target, mask, self.net, weights, self.options)
        if not (torch.compiler.is_compiling() or self._looked):
            self._looked = first_look(self.options, target=(target, mask))
        return value

    def encode(self, target: TargetMap, mask: Tensor | None = None) -> TargetFeatures:
        """φ(target) at the levels compared, to be reused or stored.

        Shape:
            As `functional.encode`.

        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.encode`.
        """
        features = parts.encode_target(target, mask, self.net, tuple(self.taps), self.options)
        if not self._looked:
            self._looked = first_look(self.options, target=(target, mask))
        return features

    def distance_map(self, pred: Tensor, target: TargetLike, mask: Tensor | None = None) -> Tensor:
        """Where they differ: the last level's distance, with its weight, at each of its pixels and
        resized bilinearly; without gradient, computed by the reference.

        Shape:
            As `forward` -> (N, 1, H, W), float32, float64 for float64 input.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        weights = distance_maps.last_layer(self.weights.on(pred), self.net)
        return distance_maps.distance_map(pred, target, mask, self.net, weights, self.options)

    def fingerprint(self) -> str:
        """Hex digest of the network's structure and weights: the same on every machine."""
        return self.net.fingerprint()

    def explain(
        self,
        pred: Tensor,
        target: TargetLike,
        mask: Tensor | None = None,
        architecture: str | None = None,
        ratio: bool = False,
    ) -> Explanation:
        """Which backend would run and why, FLOPs, bytes saved, workspace; print it.

        Nothing is computed. Meta tensors stand for tensors of the default device; another
        `architecture` than theirs goes by its name, such as "sm_90" or "avx2". `ratio` asks for
        norms of gradients of one part beside another's; there is one here.

        Shape:
            As `forward`; of "meta" tensors too.

        Raises:
            TypeError, ValueError, BackendUnavailable: as `forward`; an unknown `architecture`.
        """
        found = explain(
            self,
            self.net,
            self.options,
            pred,
            target,
            mask,
            weights=self.weights.on(pred),
            architecture=architecture,
        )
        return replace(found, ratio={}) if ratio else found

    def extra_repr(self) -> str:
        last, shown = {self.net.levels[-1]: 1.0}, self.weights.shown()
        levels = "" if shown == last else f", level_weights={shown}"
        return f"net={self.net}{levels}{self.options.changed()}"


def _network(
    channels: int,
    net: str | Sequence[Integer] | LossNet,
    widths: Iterable[Integer],
    kernel_size: Integer,
    pool: str,
    init: Init,
    seed: Integer,
) -> LossNet:
    """The network that was given, or a random one of the structure that was named."""
    if isinstance(net, LossNet):
        given = {"widths": (tuple(widths), WIDTHS), "kernel_size": (kernel_size, 3),
                 "pool": (pool, "max"), "init": (init, "he"), "seed": (seed, 0)}  # fmt: skip
        clash = [name for name, (value, default) in given.items() if value != default]
        if clash:
            raise ValueError(f"{', '.join(clash)}: fixed by the LossNet, leave them out")
        if net.in_channels != channels:
            raise ValueError(
                f"in_channels: got {channels}, expected {net.in_channels}, the LossNet's; "
                f"net.with_input_adapter({channels}) puts a 1x1 convolution in front"
            )
        return net
    if isinstance(net, str | Sequence):
        return LossNet.vgg(channels, parse_blocks(net), widths, kernel_size, pool, init, seed)
    raise TypeError(
        f"net: got {type(net).__name__}, expected a string such as '1,1,1,1,1' or 'vgg16', "
        "or a LossNet (LossNet.from_module takes any nn.Module)"
    )
