"""Learned perceptual image patch similarity."""

from __future__ import annotations

import os
from dataclasses import replace
from os import PathLike
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gpl_fast import distance_maps, lpips_file, lpips_peers, parts
from gpl_fast.costs import Explanation
from gpl_fast.distance import Distance
from gpl_fast.explain import explain
from gpl_fast.heads import Heads, as_heads, tap_weights
from gpl_fast.input_checks import Number
from gpl_fast.layer_weights import HeldWeights
from gpl_fast.lpips_file import Stored
from gpl_fast.lpips_inputs import as_eps, as_reduction, check_flags, check_images
from gpl_fast.net.fingerprint import fingerprint
from gpl_fast.net.frozen_module import frozen_copy
from gpl_fast.net.lossnet import LossNet
from gpl_fast.net.normalisation import of_unit_range
from gpl_fast.options import Options
from gpl_fast.targets import TargetFeatures, TargetLike, TargetMap


class LPIPS(nn.Module):
    """The distance of two images in unit-normalised features, each channel weighed by a head.

    ``Σ_layers 1/(H_b W_b) Σ_hw Σ_c h_c (n(φ')_c − n(φ)_c)²`` with ``n(φ) = φ / (‖φ‖ + eps)``, the
    norm over channels. Holds no parameters and no buffers; only the prediction gets a gradient, and
    where all its features at a position are 0, such as those of a black image may be, 0 from there.

    Args:
        net: the trunk, with the mean and std that it takes of inputs in [-1, 1]; a chain, such as
            VGG-16 by `LossNet.from_sequential`, for the fast path.
        heads: (C_b,) finite numbers by layer, None in place of them for ones; None alone = ones at
            the last ReLU of each block (lpips' ``lpips=False``), of a `LossNet.from_module` at its
            taps.
        eps, eps_inside: of the norm; inside it is ``sqrt(‖φ‖² + eps)`` (torchmetrics: 1e-8, True).
        normalize: inputs are in [0, 1] instead of [-1, 1].
        spatial: the map (N, 1, H, W) instead of its mean, each layer's resized bilinearly.
        reduction: "mean", "sum", or "none" -> (N,). None: "mean", of a map "none", the only one.
        compute_dtype, backend, workspace_mb: see `GenericPerceptualLoss`.

    Shape:
        (N, 3, H, W) and a target -> 0-dim, (N,), or (N, 1, H, W) if `spatial`; see `forward`.

    Raises:
        TypeError, ValueError: an argument outside of what is listed.

    Source:
        docs/math.md, section 3; Zhang et al., "The Unreasonable Effectiveness of Deep Features as a
        Perceptual Metric", CVPR 2018, eq. (1).
    """

    def __init__(
        self, net: LossNet, heads: Heads | None = None, *,
        eps: Number = 1e-10, eps_inside: bool = False,
        normalize: bool = False, spatial: bool = False,
        reduction: str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        workspace_mb: Number | str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(net, LossNet):
            raise TypeError(
                f"net: got {type(net).__name__}, expected a LossNet (LossNet.from_sequential, "
                ".from_module, .load); of lpips' and torchmetrics' modules: LPIPS.from_module"
            )
        check_flags(eps_inside=eps_inside, normalize=normalize, spatial=spatial)
        self.net = _of_unit_range(net) if normalize else net
        self.normalize, self.spatial = normalize, spatial
        self.distance = Distance("l2", True, as_eps(eps), eps_inside)
        given = {"reduction": as_reduction(reduction, spatial), "compute_dtype": compute_dtype,
                 "backend": backend, "workspace_mb": workspace_mb}  # fmt: skip
        self.options = Options.of("LPIPS", given, activation="none", normalize_features=True)
        self._heads = as_heads(net, heads)
        self.weights = HeldWeights(tap_weights(self._heads, self.distance))

    @classmethod
    def from_module(cls, peer: nn.Module, **changes: Any) -> Self:
        """The same as an `lpips.LPIPS` (vgg, alex, squeeze) or a torchmetrics
        `LearnedPerceptualImagePatchSimilarity`, in eval mode.

        Network and heads are copied and frozen, without hooks. VGG takes the fast path, the others
        are no chains and run on the reference.

        Args:
            peer: on any device, in any dtype. lpips takes ``normalize`` at its call: say it here.
            **changes: keywords of `LPIPS` in place of the peer's settings.

        Raises:
            TypeError, ValueError: neither of the two, or with parts that are not the package's.
        """
        found = lpips_peers.known_peer(peer)
        net, heads = lpips_peers.read_model(frozen_copy(found.model), found.package)
        return cls(net, heads, **{**found.words, **changes})

    @property
    def heads(self) -> dict[str, Tensor]:
        """(C_b,) float64 by layer: copies."""
        return {layer: head.clone() for layer, head in self._heads.items()}

    def forward(self, pred: Tensor, target: TargetLike, mask: Tensor | None = None) -> Tensor:
        """The distance of `pred` (N, 3, H, W) to `target`.

        Args:
            target: (N, 3, h, w) floating, resized to the prediction's size, what `encode` gave, or
                what else `functional.generic_perceptual_loss` takes. Never gets a gradient.
            mask: see `functional.generic_perceptual_loss`.

        Shape:
            As above -> 0-dim, (N,), or (N, 1, H, W) if `spatial`; float32, float64 for float64.

        Raises:
            TypeError, ValueError: bad input, with what was got, expected, and the way out.
            BackendUnavailable: ``backend="fast"`` where it cannot run.
        """
        check_images(self.net.in_channels, pred, target)
        value = distance_maps.spatial_value if self.spatial else parts.generic_value
        return value(pred, target, mask, self.net, self.weights.on(pred), self.options)

    def distance_map(self, pred: Tensor, target: TargetLike, mask: Tensor | None = None) -> Tensor:
        """The map that `spatial` gives, without gradient, by the reference.

        Shape:
            As `forward` -> (N, 1, H, W).
        Raises:
            TypeError, ValueError: as `forward`.
        """
        check_images(self.net.in_channels, pred, target)
        return distance_maps.distance_map(
            pred, target, mask, self.net, self.weights.on(pred), self.options
        )

    def encode(self, target: TargetMap, mask: Tensor | None = None) -> TargetFeatures:
        """φ(target), to be reused or stored, by each LPIPS of the same network and range too, of
        these layers or fewer, whatever its heads.

        Shape:
            As `functional.encode`, of (N, 3, H, W).
        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.encode`.
        """
        check_images(self.net.in_channels, None, target)
        return parts.encode_target(
            target, mask, self.net, tuple(self.weights.features), self.options
        )

    def explain(
        self, pred: Tensor, target: TargetLike, mask: Tensor | None = None,
        architecture: str | None = None,
    ) -> Explanation:  # fmt: skip
        """Which backend would run and why, FLOPs, bytes saved, workspace; print it.

        Nothing is computed. Meta tensors stand for tensors of the default device; another
        `architecture` than theirs goes by its name, such as "sm_90" or "avx2".

        Shape:
            As `forward`; of "meta" tensors too.
        Raises:
            TypeError, ValueError, BackendUnavailable: as `forward`; an unknown `architecture`.
        """
        check_images(self.net.in_channels, pred, target)
        return explain(
            self, self.net, self.options, pred, target, mask, weights=self.weights.on(pred),
            architecture=architecture, spatial=self.spatial,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Hex digest of network, heads and norm: the same on every machine."""
        said = {"net": self.net.fingerprint(), "distance": self.distance.text}
        return fingerprint(said, self._heads)

    def save(self, path: str | PathLike[str]) -> None:
        """Write network, heads and settings to one safetensors file.

        Raises:
            ValueError: the network is a `LossNet.from_module` one.
            OSError: the file cannot be written.
        """
        settings = {
            "eps": self.distance.eps, "eps_inside": self.distance.eps_inside,
            "spatial": self.spatial, "reduction": self.options.reduction,
            "compute_dtype": self.options.compute_dtype and str(self.options.compute_dtype),
        }  # fmt: skip
        lpips_file.write(path, Stored(self.net, self._heads, self.normalize, settings))

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        backend: str = "auto",
        workspace_mb: Number | str = "auto",
    ) -> Self:
        """Read what `save` wrote; nothing is unpickled. No file holds backend and workspace_mb.

        Raises:
            OSError: the file cannot be opened.
            ValueError: not a safetensors file, truncated, not an LPIPS', or of another shape; the
                message begins with the path.
        """
        stored = lpips_file.read(path)
        try:
            loss = cls(stored.net, stored.heads, **stored.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fsdecode(path)}: {error}") from error
        loss.normalize = stored.normalize  # the network has it already
        loss.options = replace(loss.options, backend=backend, workspace_mb=cast(Any, workspace_mb))
        return loss

    def extra_repr(self) -> str:
        words = {"normalize": self.normalize, "spatial": self.spatial}
        changed = "".join(f", {name}=True" for name, word in words.items() if word)
        if self.distance != Distance("l2", True):
            changed += f", eps={self.distance.eps}, eps_inside={self.distance.eps_inside}"
        return (
            f"net={self.net}, layers={list(self._heads)}, fingerprint={self.fingerprint()[:12]}"
            f"{changed}{self.options.changed(activation='none', normalize_features=True)}"
        )


def _of_unit_range(net: LossNet) -> LossNet:
    """The network for inputs in [0, 1]."""
    if "adapter" in net.weight_names:
        raise ValueError(
            "normalize: got True with an input adapter, behind which mean and std act; pass "
            "inputs in the range that the adapter takes, with normalize=False"
        )
    mean, std = of_unit_range(net.mean, net.std, net.in_channels)
    return LossNet(**{**net._arguments(), "mean": mean, "std": std})
