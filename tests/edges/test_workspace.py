"""workspace_mb: "auto" never refuses an input, a number is a hard bound."""

from __future__ import annotations

import pytest
import torch

from gpl_fast import GenericPerceptualLoss, autograd, plan


def planned(shape, *, net="1,1,1,1,1", workspace_mb="auto", dtype=torch.float32, **options):
    n, c, h, w = shape
    loss = GenericPerceptualLoss(c, net, **options)
    megabytes, hard = autograd.workspace(torch.device("cpu"), workspace_mb)
    spec = plan.make_spec(
        loss.net,
        feature_weights=loss.taps,
        style_weights={},
        kind="labels",
        activation="softmax",
        target_activation="softmax",
        temperature=1.0,
        dtype=dtype,
        arithmetic="float32",
        workspace_mb=megabytes,
        hard=hard,
    )
    return plan.Plan(plan.load_spec(spec), n, h, w)


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
    assert p.images >= 1
    # What is not a strip cannot shrink; a number below it is refused, the needed one is taken.
    needed = p.bytes_transient() / plan.MIB
    assert needed <= p.budget / plan.MIB
    if p.budget > plan.CPU_WORKSPACE_MB * plan.MIB:
        with pytest.raises(ValueError, match=r"workspace_mb: got 256, .*or 'auto'"):
            planned(shape, workspace_mb=plan.CPU_WORKSPACE_MB, **options)
    assert (
        planned(shape, workspace_mb=needed + 1, **options).bytes_transient()
        <= (needed + 1) * plan.MIB
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
    assert loss.explain(x, y).workspace_bytes <= plan.CPU_WORKSPACE_MB * plan.MIB * 4


def test_a_gpus_share_is_of_its_memory_and_at_least_a_cpus(monkeypatch):
    class Properties:
        total_memory = 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    for total, share in ((139 * 1024, 139 * 16), (24 * 1024, 384), (8 * 1024, 256)):
        Properties.total_memory = total * plan.MIB
        assert autograd.workspace(torch.device("cuda"), "auto") == (share, False)
    assert autograd.workspace(torch.device("cuda"), 64.0) == (64.0, True)


@pytest.mark.parametrize("word", ["256", "Auto", 0, -1, float("nan"), None, True, [256]])
def test_words_that_are_none(word):
    with pytest.raises(ValueError, match=r"workspace_mb: got .*'auto' or a number of megabytes"):
        GenericPerceptualLoss(19, workspace_mb=word)
