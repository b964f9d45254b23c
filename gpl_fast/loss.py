"""The Generic Perceptual Loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpl_fast import functional
from gpl_fast.explain import Explanation, explain
from gpl_fast.initialisation import Init
from gpl_fast.lossnet import LossNet
from gpl_fast.options import Options, level_taps
from gpl_fast.structure import WIDTHS, parse_blocks
from gpl_fast.targets import TargetFeatures, TopK


class GenericPerceptualLoss(nn.Module):
    """Compare prediction and target in the features of one frozen random network.

    Eq. (1) of docs/derivation.md; Liu et al., "Generic Perceptual Loss for Modeling Structured
    Output Dependencies", CVPR 2021, Section 3. Holds no parameters and no buffers.

    Args:
        in_channels: C: classes, or 1 for depth and masks.
        net: "vgg11", "vgg13", "vgg16", "vgg19" (the paper's structures, random weights),
            convolutions per block such as "1,1,1,1,1", or a `LossNet`.
        widths, kernel_size, pool, init, seed: of the network; see `LossNet.vgg`. With a `LossNet`
            they are that network's own and must be left alone.
        level_weights: one float for each block; None = the last block only, weight 1.
        activation: "softmax", "sigmoid" or "none", of the prediction and of a dense target.
        target_activation: the same words for a dense target, or "same".
        temperature: T: every activation, "none" included, sees ``z / T``.
        ignore_index: label of pixels that do not count, for label targets.
        reduction: "mean", "sum", or "none" -> (N,).
        compute_dtype: of the network; None = autocast's dtype if on, else the prediction's.
        backend: "auto", "fast" or "reference"; the variable GPL_FAST_BACKEND overrides "auto".
        workspace_mb: bound on the fast path's transient memory, in 2^20 bytes.

    Raises:
        TypeError, ValueError: an argument outside of what is listed.
    """

    def __init__(
        self,
        in_channels: int,
        net: str | LossNet = "1,1,1,1,1",
        *,
        widths: Sequence[int] = WIDTHS,
        kernel_size: int = 3,
        pool: str = "max",
        init: Init = "he",
        seed: int = 0,
        level_weights: Sequence[float] | None = None,
        activation: str = "softmax",
        target_activation: str = "same",
        temperature: float = 1.0,
        ignore_index: int | None = None,
        reduction: str = "mean",
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
        workspace_mb: float = 256,
    ) -> None:
        super().__init__()
        if isinstance(net, LossNet):
            given = {"widths": (tuple(widths), WIDTHS), "kernel_size": (kernel_size, 3),
                     "pool": (pool, "max"), "init": (init, "he"), "seed": (seed, 0)}  # fmt: skip
            clash = [name for name, (value, default) in given.items() if value != default]
            if clash:
                raise ValueError(f"{', '.join(clash)}: fixed by the LossNet, leave them out")
            if net.in_channels != in_channels:
                raise ValueError(
                    f"in_channels: got {in_channels}, expected {net.in_channels}, the LossNet's; "
                    f"net.with_input_adapter({in_channels}) puts a 1x1 convolution in front"
                )
            self.net = net
        elif isinstance(net, str):
            blocks = parse_blocks(net)
            self.net = LossNet.vgg(in_channels, blocks, widths, kernel_size, pool, init, seed)
        else:
            raise TypeError(f"net: got {type(net).__name__}, expected a string or a LossNet")
        self.options: dict[str, Any] = {
            "activation": activation,
            "target_activation": target_activation,
            "temperature": temperature,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "compute_dtype": compute_dtype,
            "backend": backend,
            "workspace_mb": workspace_mb,
        }
        Options(**self.options).check_channels(in_channels)
        level_taps(self.net, level_weights)
        self.level_weights = None if level_weights is None else tuple(level_weights)

    def forward(
        self, pred: Tensor, target: Tensor | TopK | TargetFeatures, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of `pred` (N, C, H, W); see `functional.generic_perceptual_loss`."""
        return functional.generic_perceptual_loss(
            pred,
            target,
            self.net,
            mask=mask,
            level_weights=self.level_weights,
            **self.options,
        )

    def encode(self, target: Tensor | TopK, mask: Tensor | None = None) -> TargetFeatures:
        """φ(target), to be reused or stored; see `functional.encode`."""
        layers = tuple(level_taps(self.net, self.level_weights))
        return functional.encode(target, self.net, layers, mask=mask, **self.options)

    def fingerprint(self) -> str:
        """Hex digest of the network's structure and weights: the same on every machine."""
        return self.net.fingerprint()

    def explain(
        self, pred: Tensor, target: Tensor | TopK | TargetFeatures, mask: Tensor | None = None
    ) -> Explanation:
        """Which backend would run and why, FLOPs, bytes saved, workspace; print it."""
        layers = tuple(level_taps(self.net, self.level_weights))
        return explain(self, pred, target, mask, self.net, layers, Options(**self.options))

    def extra_repr(self) -> str:
        words: dict[str, Any] = {"net": self.net, "level_weights": self.level_weights}
        words |= {k: v for k, v in self.options.items() if v != getattr(Options, k)}
        return ", ".join(f"{k}={v!r}" for k, v in words.items() if v is not None)
