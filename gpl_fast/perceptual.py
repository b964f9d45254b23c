"""Feature reconstruction, style and total variation on any network with named layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Unpack

import torch
from torch import Tensor, nn

from gpl_fast import distance_maps, parts
from gpl_fast.balance import gradient_norms, ratios
from gpl_fast.costs import Explanation
from gpl_fast.explain import explain
from gpl_fast.input_checks import Number
from gpl_fast.layer_weights import HeldWeights, LayerWeight, as_layers
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import OPTION_NAMES, LabelWords, Options, refuse_unknown
from gpl_fast.targets import TargetFeatures, TargetLike, TargetMap, first_look

_KNOWN = [name for name in OPTION_NAMES if name != "reduction"]


class PerceptualLoss(nn.Module):
    """Feature reconstruction, style and total variation; one pass gives all layers.

    Args:
        net: any `LossNet`; `LossNet.from_sequential(vgg16(weights=…).features, mean=…, std=…)` for
            the paper's own.
        feature_layers: weight of ``‖φ' − φ‖² / (C H W)`` by layer name, a number or one for each
            channel.
        style_layers: weight of ``‖G' − G‖_F²`` by layer name.
        tv_weight: of the total variation of the prediction.
        reduction: "mean", "sum", or "none" -> (N,).
        return_parts: return ``{"loss_feature", "loss_style", "loss_tv"}`` instead of their sum; the
            call's own word wins.
        **options: activation ("none" by default), target_activation, temperature, ignore_index,
            criterion, normalize_features, compute_dtype, backend, workspace_mb of
            `GenericPerceptualLoss`.

    Shape:
        As `functional.perceptual_loss`: (N, C, H, W) and a target -> 0-dim or (N,).

    Raises:
        TypeError, ValueError: an argument outside of what is listed.

    Source:
        docs/math.md, section 3; Johnson et al., "Perceptual Losses for Real-Time Style Transfer and
        Super-Resolution", ECCV 2016, Section 3.2, eq. (2) to (4).
    """

    def __init__(
        self,
        net: LossNet,
        feature_layers: Mapping[str, LayerWeight] = MappingProxyType({"relu2_2": 1.0}),
        style_layers: Mapping[str, Number] = MappingProxyType({}),
        tv_weight: Number = 0.0,
        reduction: str = "mean",
        return_parts: bool = False,
        **options: Unpack[LabelWords],
    ) -> None:
        super().__init__()
        if not isinstance(net, LossNet):
            raise TypeError(
                f"net: got {type(net).__name__}, expected a LossNet (LossNet.vgg, "
                ".from_sequential, .from_module, .load)"
            )
        refuse_unknown("PerceptualLoss", options, _KNOWN)
        self.net = net
        self.return_parts = return_parts
        self.options = Options.of(
            "PerceptualLoss", {"reduction": reduction, **options}, activation="none"
        )
        weights, self.tv_weight = as_layers(
            net, feature_layers, style_layers, tv_weight, self.options.distance, once=True
        )
        self.weights = HeldWeights(weights)
        self.options.check_channels(net.in_channels)
        self._looked = False  # at a dense target on a GPU

    @property
    def feature_layers(self) -> dict[str, float]:
        """The weight of each layer's feature reconstruction; `HeldWeights.features`."""
        return self.weights.features

    @property
    def style_layers(self) -> dict[str, float]:
        """The weight of each layer's style."""
        return self.weights.styles

    def forward(
        self,
        pred: Tensor,
        target: TargetLike,
        style_target: TargetLike | None = None,
        mask: Tensor | None = None,
        return_parts: bool | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of `pred`, with the words of this module.

        Shape:
            As `functional.perceptual_loss`.

        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.perceptual_loss`.
        """
        found = self._parts(pred, target, style_target, mask, self.options)
        if not (torch.compiler.is_compiling() or self._looked):
            self._looked = first_look(
                self.options, target=(target, mask), style_target=(style_target, None)
            )
        wanted = self.return_parts if return_parts is None else return_parts
        return found if wanted else parts.sum_of_parts(found)

    def _parts(
        self,
        pred: Tensor,
        target: TargetLike,
        style_target: TargetLike | None,
        mask: Tensor | None,
        o: Options,
    ) -> dict[str, Tensor]:
        return parts.perceptual_parts(
            pred, target, self.net, o, style_target=style_target, mask=mask,
            weights=self.weights.on(pred), tv_weight=self.tv_weight,
        )  # fmt: skip

    def encode(self, target: TargetMap, mask: Tensor | None = None) -> TargetFeatures:
        """φ(target) at every layer used: a `target`, a `style_target`, or both.

        Shape:
            As `functional.encode`.

        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.encode`.
        """
        layers = tuple(dict.fromkeys((*self.feature_layers, *self.style_layers)))
        features = parts.encode_target(target, mask, self.net, layers, self.options)
        if not self._looked:
            self._looked = first_look(self.options, target=(target, mask))
        return features

    def explain(
        self,
        pred: Tensor,
        target: TargetLike,
        style_target: TargetLike | None = None,
        mask: Tensor | None = None,
        architecture: str | None = None,
        ratio: bool = False,
    ) -> Explanation:
        """Which backend would run and why, FLOPs, bytes saved, workspace; print it.

        Nothing is computed. Meta tensors stand for tensors of the default device; another
        `architecture` than theirs goes by its name, such as "sm_90" or "avx2". With `ratio`, what
        norm the gradients of the parts that there are have beside the first one's, which is
        computed.

        Shape:
            As `forward`; of "meta" tensors too, without `ratio`.

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
            style_target=style_target,
            tv_weight=self.tv_weight,
            architecture=architecture,
        )
        if not ratio:
            return found

        def parts_of(x: Tensor, o: Options) -> dict[str, Tensor]:
            return self._parts(x, target, style_target, mask, o)

        norms = gradient_norms(parts_of, pred, self.options, target)
        by_part = {"loss_feature": self.feature_layers, "loss_style": self.style_layers,
                   "loss_tv": self.tv_weight}  # fmt: skip
        return replace(found, ratio=ratios(norms, by_part))

    def distance_map(self, pred: Tensor, target: TargetLike, mask: Tensor | None = None) -> Tensor:
        """Where they differ: the last level's distance, with its weight, at each of its pixels and
        resized bilinearly; without gradient, computed by the reference.

        Shape:
            As `forward` -> (N, 1, H, W), float32, float64 for float64 input.

        Raises:
            TypeError, ValueError: as `forward`; the loss compares styles alone.
        """
        weights = distance_maps.last_layer(self.weights.on(pred), self.net)
        return distance_maps.distance_map(pred, target, mask, self.net, weights, self.options)

    def fingerprint(self) -> str:
        """Hex digest of the network's structure and weights: the same on every machine."""
        return self.net.fingerprint()

    def extra_repr(self) -> str:
        return (
            f"net={self.net}, feature_layers={self.weights.shown()}, "
            f"style_layers={self.style_layers}, tv_weight={self.tv_weight}"
            f"{', return_parts=True' if self.return_parts else ''}"
            f"{self.options.changed(activation='none')}"
        )
