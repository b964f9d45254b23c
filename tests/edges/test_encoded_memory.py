"""Every way into a target keeps to the workspace: transient memory of `encode`, and of a step
against a target of another size."""

from __future__ import annotations

import pytest
import torch
from cases import value_and_grad
from inside import peak_bytes

from gpl_fast import GenericPerceptualLoss, TopK

MIB = 2**20
C, SIZE, WORKSPACE = 150, 320, 32
NET = {"net": "1,1", "widths": (16, 16), "workspace_mb": WORKSPACE}


def target_of(kind):
    labels = torch.randint(C, (1, SIZE, SIZE))
    if kind == "labels":
        return labels
    if kind == "dense":
        return torch.randn(1, C, SIZE, SIZE)
    values = torch.rand(1, 3, SIZE, SIZE)
    indices = torch.stack([labels, (labels + 1) % C, (labels + 5) % C], dim=1)
    return TopK(values / 4, indices, rest=kind)


@pytest.mark.parametrize("kind", ["labels", "dense", "renormalize", "uniform", "drop"])
def test_encode_keeps_to_the_workspace(kind):
    """A one-hot map of these labels alone would be 59 MiB."""
    loss, target = GenericPerceptualLoss(C, backend="fast", **NET), target_of(kind)
    loss.encode(target)  # the weights are made once
    peak, features = peak_bytes(lambda: loss.encode(target))
    kept = sum(t.nbytes for t in features.features.values())
    lists = 0 if isinstance(target, torch.Tensor) else 6 * target.indices.nbytes
    assert peak - kept - lists <= WORKSPACE * MIB
    want = GenericPerceptualLoss(C, backend="reference", **NET).encode(target)
    for name, e in features.features.items():
        torch.testing.assert_close(e, want.features[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_target_of_another_size_keeps_to_the_workspace(masked):
    loss = GenericPerceptualLoss(C, backend="fast", **NET)
    pred, target = torch.randn(1, C, SIZE, SIZE), torch.randn(1, C, 200, 240)
    mask = torch.rand(1, 200, 240) > 0.3 if masked else None
    value_and_grad(loss, pred, target, mask)
    peak, (_, grad) = peak_bytes(lambda: value_and_grad(loss, pred, target, mask))
    assert peak - 2 * grad.nbytes <= WORKSPACE * MIB
