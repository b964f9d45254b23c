"""Top-k maps without entries, with tiny and huge sums, and what `encode` keeps of a mask."""

from __future__ import annotations

import pytest
import torch

from gpl_fast import GenericPerceptualLoss, TopK

N, C, SIZE = 2, 4, (32, 36)


def dense(t: TopK) -> torch.Tensor:
    """The map by its definition, pixel by pixel in exact arithmetic's order."""
    values, y = t.values.double(), torch.zeros(N, C, *SIZE, dtype=torch.float64)
    listed = torch.zeros(N, C, *SIZE, dtype=torch.bool)
    for j in range(values.shape[1]):
        for c in range(C):
            here = t.indices[:, j] == c
            y[:, c] += values[:, j] * here
            listed[:, c] |= here
    total = y.sum(dim=1, keepdim=True)
    if t.rest == "renormalize":
        return torch.where(total > 0, y / torch.where(total > 0, total, 1), 0)
    if t.rest == "uniform":
        unlisted = C - listed.sum(dim=1, keepdim=True)
        share = (1 - total).clamp(min=0) / unlisted.clamp(min=1)
        return torch.where(listed, y, share)
    return y


def compare(t: TopK, backend: str) -> None:
    x = torch.randn(N, C, *SIZE, requires_grad=True)
    as_it_is = GenericPerceptualLoss(C, target_activation="none", backend="reference")
    x64 = x.detach().double().requires_grad_()
    want = as_it_is(x64, dense(t))
    want.backward()
    loss = GenericPerceptualLoss(C, backend=backend)
    got = loss(x, t)
    got.backward()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    assert torch.cosine_similarity(x.grad.double().flatten(), x64.grad.flatten(), dim=0) > 1 - 1e-6
    stored = loss(x, loss.encode(t))
    torch.testing.assert_close(stored.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rest", ["renormalize", "uniform", "drop"])
def test_no_entries(rest, backend):
    empty = torch.zeros(N, 0, *SIZE)
    compare(TopK(empty, empty.long(), rest), backend)


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_sums_of_any_size_are_renormalized(scale, backend):
    values = torch.rand(N, 3, *SIZE).clamp(min=0.5) * scale
    values[:, 1] = values[:, 0]  # exact in whatever is left of their digits
    values[:, 2] = values[:, 0]
    indices = torch.stack([torch.full((N, *SIZE), c) for c in (0, 2, 2)], dim=1)
    compare(TopK(values, indices, "renormalize"), backend)


def test_a_pixel_of_nothing_beside_ordinary_ones(backend):
    values, indices = torch.randn(N, C, *SIZE).softmax(dim=1).topk(2, dim=1)
    values[:, :, :7] = 0
    compare(TopK(values, indices, "renormalize"), backend)


@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_encode_keeps_a_copy_of_the_mask(kind, backend):
    mask = torch.rand(N, *SIZE) > 0.3
    t = torch.randn(N, C, *SIZE)
    target = {
        "dense": t,
        "labels": t.argmax(dim=1),
        "topk": TopK(*t.softmax(dim=1).topk(2, dim=1)),
    }[kind]
    loss, x = GenericPerceptualLoss(C, backend=backend), torch.randn(N, C, *SIZE)
    features = loss.encode(target, mask)
    want = loss(x, features)
    mask.fill_(True)  # a buffer of the caller's, used again
    assert torch.equal(loss(x, features), want)
    assert not features.mask.all()
