"""What runs on a GPU from module to gradient: Triton's kernels forward, CUDA's backward.

The forward is interpreted (tests/interpreter), the shipped .cu files run on the CPU; they meet in
the saved tensors. The bounds are those of `test_path`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import test_path
import torch

ROOT = Path(__file__).resolve().parents[2]
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
fast_tests, triton_path = test_path.fast_tests, test_path.triton_path

pytestmark = [
    pytest.mark.usefixtures("one_thread", "triton_path"),
    # A GPU is silent on infinities and NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]


@pytest.fixture(autouse=True)
def launched(triton_path, emulated, decide):
    """Every layer that it can by `conv_block_bwd`; fills with the operators that were called."""
    called: list[str] = []

    class Recorder:
        def __getattr__(self, name):
            called.append(name)
            return getattr(emulated, name)

    decide(kernels=True, backward="emulated", stages={"emulated": Recorder()})
    return called


CHAINED = [
    "dense", "dense, float16, two convolutions", "dense, three levels", "dense, strips",
    "dense, average", "dense, stride", "dense, one class", "bfloat16 prediction", "resized",
    "labels", "labels, 19, 5 x 5", "labels, 150, 1 x 1", "topk, renormalize", "features",
]  # fmt: skip


@pytest.mark.parametrize("name", CHAINED)
def test_against_float64(name, launched):
    fast_tests.test_against_float64.hypothesis.inner_test(*test_path.DRAWN[name])
    assert set(launched) <= {"conv_block_bwd", "conv_block_logits_bwd"}
    assert "conv_block_logits_bwd" in launched


@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_tf32_within_the_bounds_of_float16(kind, launched, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    kind, case, how, _ = test_path.drawn(kind, None)
    for bound in ("ATOL", "ROUTED", "SLACK"):
        values = getattr(fast_tests, bound)
        monkeypatch.setattr(fast_tests, bound, {**values, FLOAT: values[HALF]})
    fast_tests.test_against_float64.hypothesis.inner_test(kind, case, how, None)
    assert "conv_block_logits_bwd" in launched


def test_true_float32_is_atens(launched):
    fast_tests.test_against_float64.hypothesis.inner_test(*test_path.drawn("dense", None))
    assert set(launched) == {"relu_pool_bwd", "softmax_bwd"}


@pytest.mark.parametrize(
    "total", test_path.TOTALS, ids=lambda t: f"{t.teacher}-{t.activation}-{t.dtype}"
)
def test_total_against_float64(total):
    fast_tests.test_total_against_float64.hypothesis.inner_test(total)


def test_bfloat16_holds_on_peaked_maps(launched):
    test_path.test_bfloat16_holds_on_peaked_maps(19, 8.0, "labels")
    assert "conv_block_logits_bwd" in launched


@pytest.mark.parametrize("c", [1, 3])
def test_a_confident_sigmoid_keeps_its_difference_to_labels(c, launched):
    fast_tests.test_a_confident_sigmoid_keeps_its_difference_to_labels(c, BF16)
    assert "conv_block_logits_bwd" in launched


@pytest.mark.parametrize("rows", [None, 8])
def test_whole_losses_with_a_halo(rows, emulated, launched, decide, monkeypatch):
    """`benchmarks/halo.py`'s stages forward: values and gradients are Triton's but for the order of
    sums, in strips too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from halo import Halo

    from gpl_fast import GenericPerceptualLoss, kernels

    loss = GenericPerceptualLoss(5, net="1,1", widths=(64, 128), compute_dtype=BF16)
    x, target = torch.randn(2, 5, 18, 20), torch.randn(2, 5, 18, 20)
    ran = []

    def operator(*given):
        ran.append(given)
        emulated.conv_block_fwd(*given)

    def found():
        mine = x.clone().requires_grad_()
        value = loss(mine, target)
        value.backward()
        return value.detach(), mine.grad

    decide(rows=rows)
    value, gradient = found()
    decide(forward="halo", stages={"halo": Halo(operator, kernels)})
    ours, of_ours = found()
    assert len(ran) >= 2
    torch.testing.assert_close(ours, value, rtol=5e-3, atol=0)
    assert torch.nn.functional.cosine_similarity(of_ours, gradient, dim=1).mean() > 0.99
    assert (of_ours - gradient).norm() < 0.05 * gradient.norm()
