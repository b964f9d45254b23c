"""What the fast path is asked for, as text: all that is static of a call of a loss."""

from __future__ import annotations

import torch

from gpl_fast.fast import operator
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.targets import Target
from gpl_fast.terms import Weights


def describe(
    net: LossNet,
    o: Options,
    target: Target,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    tensors: tuple[str, ...],
    label_smoothing: float | None = None,
    *,
    weighed: bool = False,
    encode: bool = False,
    spatial: bool = False,
    by: str | None = None,
) -> str:
    """The text of the fast path's `Call`, a constant in graphs.

    Args:
        dtype: what the network computes in.
        tensors: names of the target's.
        label_smoothing: of the cross-entropy that shares the passes, None without one.
        weighed: by a mask of its own, or by the target's.
        spatial: the distance of each pixel is asked for.
        by: who decides, None = `device`'s own; see `gpl_fast.fast.policy.named`.
    """
    workspace = o.constant_workspace
    return operator.describe(
        net.identity,
        device,
        by,
        features=tuple(weights.features.items()),
        styles=tuple(weights.styles.items()),
        distance=weights.distance.text,
        kind=target.kind,
        activation=o.target if encode else o.activation,
        target_activation=target.activation(o),
        temperature=o.target_temperature if encode else o.constant_temperature,
        dtype=dtype,
        workspace_mb=None if isinstance(workspace, str) else workspace,
        tensors=tensors,
        encode=encode,
        resized=target.resized or (target.kind == "dense" and target.data.dtype == torch.float64),
        cross_entropy=label_smoothing is not None,
        elements=target.elements is not None,
        label_smoothing=label_smoothing or 0.0,
        weighed=weighed,
        spatial=spatial,
        signs=o.criterion == "l1",
    )
