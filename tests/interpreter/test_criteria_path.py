"""Absolute values, weights of channels and normalised features by Triton's kernels, against float64
and against the CPU's operators."""

from __future__ import annotations

import pytest
import torch
from cases import NARROW, agree, error, value_and_grad
from criteria import DTYPES, KINDS, MIXED, OPTIONS, C, agree_in_median, errors_by_image, loss_of
from policies import decided
from test_path import WIDE, kernel, launched, wide_tile

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss

SHAPE = (2, C, 9, 14)
ALL = {**OPTIONS, **MIXED}
TRITON = {"forward": "triton", "backward": "triton", "arch": 80, "tiles": wide_tile}


@pytest.fixture(autouse=True)
def triton_path(decide, monkeypatch, one_thread):
    """As tests/interpreter/test_path.py's."""
    decide(**TRITON)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for (name, attribute), wide in WIDE.items():
        monkeypatch.setattr(kernel(name), attribute, wide)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["triton"])
@pytest.mark.parametrize("option", OPTIONS)
def test_against_float64(option, by, dtype, kind):
    """Of a few images: what the stages round is held by tests/stages."""
    pred = 2 * torch.randn(7, C, 8, 8)
    draws = errors_by_image(OPTIONS[option], kind, DTYPES[dtype], pred, 1)
    agree_in_median(draws, DTYPES[dtype])


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["l1", "channels", "normalized", "l1-channels-normalized"])
def test_taps_of_every_kind(option, dtype, rows, decide):
    """In blocks, at their ends, beside style, in strips."""
    torch.manual_seed(1)
    net = LossNet.vgg(C, (2, 1), NARROW)
    words = {k: v for k, v in ALL[option].items() if k != "level_weights"}
    features = {"relu1_1": 1.0, "relu1_2": 0.5, "pool1": torch.rand(5), "pool2": torch.rand(8)}
    words |= {"activation": "softmax", "reduction": "none"}
    x, t = 2 * torch.randn(2, 2, C, 12, 10)
    computed, results = DTYPES[dtype], []
    decide(rows=rows)
    for backend, by in (("reference", torch.float64), ("reference", computed), ("fast", computed)):
        loss = PerceptualLoss(
            net, features, {"pool1": 1.0}, backend=backend, compute_dtype=by, **words
        )
        exact = by == torch.float64
        results.append(value_and_grad(loss, *((m.double() if exact else m) for m in (x, t))))
    truth, plain, got = results
    for which, slack in ((0, 1e-5), (1, 0.02)):
        ours, theirs = (error(r[which], truth[which]) for r in (got, plain))
        assert ours <= 2 * max(theirs, torch.finfo(computed).eps) + slack


@pytest.mark.parametrize("option", ALL)
def test_the_cpu_does_the_same(option):
    """True float32, from one dense target: but for the order of sums."""
    torch.manual_seed(2)
    words = {"level_weights": (1.0, 1.0), **ALL[option]}
    loss = GenericPerceptualLoss(C, "1,1", widths=NARROW, backend="fast", **words)
    x, t = torch.randn(2, *SHAPE)
    ours = value_and_grad(loss, x, t)
    with decided(forward="compiled", backward="compiled", arch=None):
        agree(ours, value_and_grad(loss, x, t), 1e-4)


@pytest.mark.parametrize("option", ["l2", *OPTIONS])
def test_who_is_launched(option, monkeypatch):
    """A block sums plain squares; the seed takes one launch a tap, and none without a backward."""
    launches = []
    for module in map(kernel, ("diff_reduce", "unit_diff")):
        shipped = module.launch

        def launch(function, *args, shipped=shipped, **meta):
            launches.append(function)
            return shipped(function, *args, **meta)

        monkeypatch.setattr(module, "launch", launch)
    forms = launched(monkeypatch)
    x, t = torch.randn(2, *SHAPE)
    value_and_grad(loss_of(ALL.get(option, {}), "dense", "fast", torch.bfloat16), x, t)
    assert len(forms) == (4 if option == "normalized" else 2)  # whose branches go one by one
    reduce = kernel("diff_reduce")._seeded_reduce_kernel
    want = {"l2": [], "normalized": 2 * [kernel("unit_diff")._unit_diff_fwd_kernel]}
    assert launches == want.get(option, 2 * [reduce])
