"""Predictions that are DTensors, in one process: what other placements than the batch's say."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import gpl_fast


@pytest.fixture(scope="module")
def mesh() -> DeviceMesh:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


LOGITS, LABELS = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
MASK = torch.rand(2, 32, 32) > 0.3


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_shards_of_the_batch_are_this_process_images(mesh, placement, backend):
    loss = gpl_fast.SegmentationLoss(3, backend=backend)
    leaf = LOGITS.clone().requires_grad_()
    x, y, m = (DTensor.from_local(t, mesh, [placement]) for t in (leaf, LABELS, MASK))
    value = loss(x, y, teacher=x.detach() * 2, mask=m, normalizer=loss.count(y, m))
    value.backward()
    plain = LOGITS.clone().requires_grad_()
    expected = loss(plain, LABELS, teacher=LOGITS * 2, mask=MASK)
    expected.backward()
    assert type(value) is torch.Tensor
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(leaf.grad, plain.grad)


@pytest.mark.parametrize("placement", [Shard(1), Shard(2), Partial()], ids=str)
def test_other_placements_are_refused_with_the_way_out(mesh, placement):
    x = DTensor.from_local(LOGITS, mesh, [placement])
    for call in (
        lambda: gpl_fast.SegmentationLoss(3)(x, LABELS),
        lambda: gpl_fast.GenericPerceptualLoss(3)(x, LABELS),
        lambda: gpl_fast.GenericPerceptualLoss(3).encode(x),
        lambda: gpl_fast.LPIPS(gpl_fast.LossNet.vgg(3, (1, 1)))(x, LOGITS),
        lambda: gpl_fast.GenericPerceptualLoss(3).distance_map(x, LABELS),
    ):
        with pytest.raises(ValueError, match=r"Shard\(0\).*redistribute"):
            call()


def test_any_argument_may_be_the_one_that_is_sharded(mesh):
    def sharded(t):
        return DTensor.from_local(t, mesh, [Shard(0)])

    loss, generic = gpl_fast.SegmentationLoss(3), gpl_fast.GenericPerceptualLoss(3)
    for call in (
        lambda d: loss(LOGITS, LABELS, teacher=d(LOGITS * 2)),
        lambda d: loss(LOGITS, LABELS, mask=d(MASK)),
        lambda d: loss(LOGITS, d(LABELS)),
        lambda d: generic(LOGITS, LOGITS * 2, mask=d(MASK)),
    ):
        assert torch.equal(call(sharded), call(lambda t: t))


def test_it_is_explained_and_weighed(mesh):
    x, y, t = (DTensor.from_local(t, mesh, [Shard(0)]) for t in (LOGITS, LABELS, LOGITS * 2))
    loss = gpl_fast.SegmentationLoss(3)
    assert str(loss.explain(x, y, t, ratio=True)) == str(
        loss.explain(LOGITS, LABELS, LOGITS * 2, ratio=True)
    )
    assert loss.suggest_weight(x, y, t) == loss.suggest_weight(LOGITS, LABELS, LOGITS * 2)
    generic = gpl_fast.GenericPerceptualLoss(3)
    assert str(generic.explain(x, t)) == str(generic.explain(LOGITS, LOGITS * 2))
