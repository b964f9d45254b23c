"""workspace_mb: "auto" never refuses an input, a number is a hard bound."""

from __future__ import annotations

import pytest
import torch
from cases import call_of

from gpl_fast import GenericPerceptualLoss
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.policy import CPU_WORKSPACE_MB, MIB, Policy


def planned(shape, *, net="1,1,1,1,1", workspace_mb=None, **options):
    n, c, h, w = shape
    loss = GenericPerceptualLoss(c, net, **options)
    call = call_of(loss.net, loss.taps, kind="labels", workspace_mb=workspace_mb, policy="avx2")
    return Plan(call, n, h, w)


LARGE = {
    "1 x 19 x 1024 x 2048": ((1, 19, 1024, 2048), {}),
    "stride 512": ((1, 19, 512, 512), {"pool": "stride"}),
    "stride 2048": ((2, 19, 2048, 2048), {"pool": "stride"}),
    "vgg19 of a panorama": ((1, 150, 4096, 8192), {"net": "vgg19"}),
    "many classes": ((1, 1203, 1024, 1024), {}),
}


@pytest.mark.parametrize("case", LARGE)
def test_auto_takes_every_input(case):
    shape, options = LARGE[case]
    p = planned(shape, **options)
    assert min(p.images) >= 1
    # What is not a strip cannot shrink; a number below it is refused, the needed one is taken.
    needed = p.bytes_transient() / MIB
    assert needed <= p.budget / MIB
    if p.budget > CPU_WORKSPACE_MB * MIB:
        with pytest.raises(ValueError, match=r"workspace_mb: got 256, .*or 'auto'"):
            planned(shape, workspace_mb=CPU_WORKSPACE_MB, **options)
    assert (
        planned(shape, workspace_mb=needed + 1, **options).bytes_transient() <= (needed + 1) * MIB
    )


def test_auto_is_256_where_that_does():
    shape = (4, 19, 256, 256)
    auto, fixed = planned(shape), planned(shape, workspace_mb=256)
    assert (auto.images, auto.rows, auto.budget) == (fixed.images, fixed.rows, fixed.budget)


def test_a_large_input_runs_and_is_right():
    x = torch.randn(1, 2, 520, 512, requires_grad=True)
    y = torch.randint(0, 2, (1, 520, 512))
    options = {"net": "1,1", "widths": (64, 64), "pool": "stride"}
    loss = GenericPerceptualLoss(2, backend="fast", **options)
    with pytest.raises(ValueError, match="workspace_mb: got 64"):
        GenericPerceptualLoss(2, backend="fast", workspace_mb=64, **options)(x, y)
    want = GenericPerceptualLoss(2, backend="reference", **options)(x.double(), y)
    value = loss(x, y)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    value.backward()
    assert x.grad.isfinite().all()
    assert loss.explain(x, y).workspace_bytes <= CPU_WORKSPACE_MB * MIB * 4


def test_a_gpus_share_is_of_its_memory_and_enough_for_few_launches():
    for total, share in ((139 * 1024, 139 * 16), (48 * 1024, 768), (24 * 1024, 640)):
        gpu = Policy("cuda", memory_mb=total)
        assert gpu.workspace(None) == (share * MIB, False)
        assert gpu.workspace(64.0) == (64 * MIB, True)


@pytest.mark.parametrize("word", ["256", "Auto", 0, -1, float("nan"), None, True, [256]])
def test_words_that_are_none(word):
    with pytest.raises(ValueError, match=r"workspace_mb: got .*'auto' or a number of megabytes"):
        GenericPerceptualLoss(19, workspace_mb=word)
