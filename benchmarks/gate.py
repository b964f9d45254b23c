"""Who may be timed: a provider's value and gradient against float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peer_losses
from providers import LPIPS, NET, Provider, dtype_of, loss_net
from torch import Tensor

import gpl_fast
from gpl_fast.tools import measure

# Largest value error and least gradient cosine. A bfloat16 baseline has none: near convergence its
# error is a result, not a mistake.
LIMITS = {
    "eager-fp32": (1e-3, 0.999),
    "compile": (1e-3, 0.999),
    "gpl_fast-fp32": (1e-3, 0.999),
    "gpl_fast-bf16": (0.05, 0.95),
}
PEER = "eager-bf16-cl"  # plain PyTorch in the same dtype


def errors(
    made: dict[str, Provider], logits: Tensor, target: Any, net: str = NET
) -> dict[str, tuple[float, float]]:
    """Relative value error and gradient cosine of each provider against float64: the
    reference's, or that of the package whose loss it is."""
    c = logits.shape[1]
    activation = "sigmoid" if c == 1 else "softmax"
    exact: measure.Loss
    if net == LPIPS:
        exact = peer_losses.exact()
    else:
        exact = gpl_fast.GenericPerceptualLoss(
            c, loss_net(c, net), activation=activation, backend="reference"
        )
    dense = isinstance(target, Tensor) and target.is_floating_point()
    truth = measure.step(exact, logits.double(), target.double() if dense else target)
    return {
        name: measure.deviation(measure.step(provider, logits, target), truth)
        for name, provider in made.items()
    }


def complaints(found: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """What is wrong with the providers that are, by name, from what `errors` found.

    A deep network in bfloat16 is as exact as bfloat16 is: an error up to twice that of plain
    PyTorch in the same dtype is none of ours.
    """
    wrong = {}
    for name, (error, cosine) in found.items():
        if name not in LIMITS:
            continue
        largest, least = LIMITS[name]
        if dtype_of(name) == "bfloat16" and PEER in found:
            peer_error, peer_cosine = found[PEER]
            largest, least = max(largest, 2 * peer_error), min(least, 2 * peer_cosine - 1)
        if not (error <= largest and cosine >= least):
            wrong[name] = (
                f"its value is off by {error:.1e} (at most {largest:.1e}), its gradient's cosine "
                f"is {cosine:.5f} (at least {least:.5f})"
            )
    return wrong
