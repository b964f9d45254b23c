"""Every kind of call under every condition that training puts it in, against float64.

The truth is the reference in float64, made and called plainly; a case under a condition has to
give its value, and its gradient where the condition has one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, TopK

N, C, SIZE, SMALL = 2, 4, (40, 36), (20, 18)
_made = torch.Generator().manual_seed(7)


def randn(*shape, scale=2.0):
    return scale * torch.randn(*shape, generator=_made)


def labels(ignored=True):
    y = torch.randint(0, C, (N, *SIZE), generator=_made)
    if ignored:
        y[:, :5] = 255
    return y


X = randn(N, C, *SIZE)
MASK = torch.rand(N, *SIZE, generator=_made) > 0.3
OWN_MASK = torch.rand(N, *SMALL, generator=_made) > 0.3
PADDED = X.clone()
PADDED[:, :, -6:] = torch.finfo(torch.float32).min
HOLES = torch.where(OWN_MASK.unsqueeze(1), randn(N, C, *SMALL), torch.nan)
TEACHER = randn(N, C, *SIZE).softmax(dim=1)
SPARSE = TEACHER.topk(2, dim=1)


class Residual(nn.Module):
    """A tap that is overwritten in place, as in torchvision's residual blocks."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(C, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.last = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x.sum(dim=1, keepdim=True)
        return self.last(self.relu(y))


torch.manual_seed(3)
RESIDUAL = LossNet.from_module(Residual(), ["bn", "last"])
CHAIN = LossNet.vgg(C, (1, 2), (8, 8))
NORMALISED = LossNet.from_sequential(
    nn.Sequential(nn.Conv2d(C, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    mean=(0.1, 0.2, 0.3, 0.4),
    std=(0.7, 0.8, 0.9, 1.1),
)


def gpl(**options):
    return lambda **o: GenericPerceptualLoss(C, **options, **o)


def total(**options):
    return lambda **o: SegmentationLoss(C, **options, **o)


def wide(x):
    """A floating input in float64, for the truth."""
    if isinstance(x, TopK):
        return TopK(x.values.double(), x.indices, x.rest)
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


# How the loss is made, and its inputs after the prediction; the prediction is X unless it is named.
CASES = {
    "logits": (gpl(), (randn(N, C, *SIZE),)),
    "probabilities": (gpl(target_activation="none"), (TEACHER,)),
    "labels": (gpl(ignore_index=255, seed=1), (labels(),)),
    "another seed": (gpl(ignore_index=255, seed=2), (labels(),)),
    "topk": (gpl(), (TopK(SPARSE.values, SPARSE.indices),)),
    "topk of nothing": (gpl(), (TopK(SPARSE.values[:, :0], SPARSE.indices[:, :0], "uniform"),)),
    "holes of another size": (gpl(), (HOLES, OWN_MASK)),
    "padding": (gpl(temperature=3.0), (randn(N, C, *SIZE), MASK), PADDED),
    "cold": (gpl(temperature=0.3), (randn(N, C, *SIZE),)),
    "taps in place": (lambda **o: GenericPerceptualLoss(C, RESIDUAL, level_weights=[1, 1], **o),
                      (randn(N, C, *SIZE),)),
    "normalised": (lambda **o: GenericPerceptualLoss(C, NORMALISED, ignore_index=255, **o),
                   (labels(),)),
    "segmentation": (total(class_weight=[1.0, 0.0, 2.0, 1.0], label_smoothing=0.1), (labels(),)),
    "weights of 0": (total(class_weight=[0.0] * C, label_smoothing=0.1), (labels(),)),
    "warm teacher": (total(temperature=2.0), (labels(), randn(N, C, *SIZE))),
    "label teacher": (total(), (labels(False), labels())),
    "no cross-entropy": (total(ce_weight=0), (labels(),)),
    "style": (lambda **o: PerceptualLoss(CHAIN, {"relu1_1": 1.0}, {"relu2_1": 5.0}, 0.1, **o),
              (randn(N, C, *SIZE),)),
}  # fmt: skip


def inputs(case):
    _, rest, *pred = CASES[case]
    return (pred[0] if pred else X), rest


def step(loss, x, rest):
    x = x.clone().requires_grad_()
    value = loss(x, *rest)
    (dx,) = torch.autograd.grad(value, x)
    return value.detach(), dx


@pytest.fixture(scope="module")
def truths():
    found = {}
    for case in CASES:
        x, rest = inputs(case)
        loss = CASES[case][0](backend="reference")
        found[case] = step(loss, x.double(), tuple(wide(t) for t in rest))
    return found


def made(case, backend):
    """A module's network has no fast kernels: there "auto" is the reference."""
    return CASES[case][0](backend="auto" if case == "taps in place" else backend)


def check(found, truth, loose=False):
    (value, dx), (want, dwant) = found, truth
    torch.testing.assert_close(value.double(), want, rtol=5e-2 if loose else 2e-5, atol=1e-9)
    if dx is None:
        return
    assert dx.isfinite().all()
    scale = dwant.norm()
    if scale == 0:
        assert (dx == 0).all()
    else:
        cosine = (dx.double() * dwant).sum() / (dx.double().norm() * scale)
        # Padding is constant: rounding may pick another winner among the ties of a pool.
        assert cosine > (0.95 if loose else 1 - 1e-3)


@pytest.mark.parametrize("case", CASES)
class TestEveryCase:
    def test_plainly(self, case, backend, truths):
        check(step(made(case, backend), *inputs(case)), truths[case])

    def test_compiled(self, case, backend, truths):
        loss = made(case, backend)
        x, rest = inputs(case)
        if case == "taps in place":
            loss(x, *rest)  # the copy of the module is made outside of the graph
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        check(step(compiled, x, rest), truths[case])

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, case, backend, context, truths):
        loss = made(case, backend)
        x, rest = inputs(case)
        with context():
            check((loss(x, *rest), None), truths[case])
        check(step(loss, x, rest), truths[case])  # nothing of that mode stays behind

    def test_under_autocast(self, case, backend, truths):
        x, rest = inputs(case)
        with torch.autocast("cpu", torch.bfloat16):
            found = step(made(case, backend), x, rest)
        check(found, truths[case], loose=True)

    @pytest.mark.parametrize("construction", ["meta", "default dtype", "inference mode"])
    def test_made_elsewhere(self, case, backend, construction, truths):
        contexts = {
            "meta": lambda: torch.device("meta"),
            "default dtype": nullcontext,
            "inference mode": torch.inference_mode,
        }
        before = torch.get_default_dtype()
        try:
            if construction == "default dtype":
                torch.set_default_dtype(torch.bfloat16)
            with contexts[construction]():
                loss = made(case, backend)
        finally:
            torch.set_default_dtype(before)
        check(step(loss, *inputs(case)), truths[case])

    def test_called_under_a_default_dtype(self, case, backend, truths):
        loss, before = made(case, backend), torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = step(loss, *inputs(case))
        finally:
            torch.set_default_dtype(before)
        check(found, truths[case])

    def test_from_several_threads(self, case, backend, truths):
        loss = made(case, backend)  # cold: the threads meet at its caches
        x, rest = inputs(case)
        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(step, loss, x, rest) for _ in range(8)]
        for run in runs:
            check(run.result(), truths[case])


def test_all_cases_at_once_from_several_threads(backend, truths):
    losses = {case: made(case, backend) for case in CASES}
    with ThreadPoolExecutor(4) as pool:
        runs = {
            (case, i): pool.submit(step, losses[case], *inputs(case))
            for i in range(2)
            for case in CASES
        }
    for (case, _), run in runs.items():
        check(run.result(), truths[case])


def test_all_cases_compiled_in_one_process(backend, truths):
    """Each keeps its own network: the graphs of one module's code are told apart by it."""
    compiled = {}
    for case in ("labels", "another seed", "logits"):
        compiled[case] = torch.compile(made(case, backend), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for case, loss in compiled.items():
            check(step(loss, *inputs(case)), truths[case])
