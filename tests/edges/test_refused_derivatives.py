"""Derivatives that the fast path does not have are refused; the reference leaves them to torch."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from gpl_fast import GenericPerceptualLoss, PerceptualLoss, SegmentationLoss, TopK

X, T = torch.randn(2, 4, 32, 36, dtype=torch.float64), torch.randn(2, 4, 32, 36)
LABELS = torch.randint(0, 4, (2, 32, 36))


def losses(backend):
    gpl = GenericPerceptualLoss(4, backend=backend)
    total = SegmentationLoss(4, backend=backend)
    style = PerceptualLoss(gpl.net, {"relu2_1": 1.0}, {"relu1_1": 1.0}, backend=backend)
    probabilities = T.softmax(dim=1).topk(2, dim=1)
    return {
        "dense": lambda x: gpl(x, T),
        "labels": lambda x: gpl(x, LABELS),
        "topk": lambda x: gpl(x, TopK(probabilities.values, probabilities.indices)),
        "features": lambda x: gpl(x, gpl.encode(T)),
        "segmentation": lambda x: total(x, LABELS),
        "style": lambda x: style(x, T),
    }


NAMES = list(losses("reference"))


def by_dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


TRANSFORMS = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "forward_ad": by_dual,
    "grad": lambda f, x, v: torch.func.grad(f)(x),
    "vjp": lambda f, x, v: torch.func.vjp(f, x)[1](torch.ones(())),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, x + v])),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(lambda a: f(x + a * v))(torch.zeros(())),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_fast_path_refuses_transforms(name, transform, requires_grad):
    x = X.float().requires_grad_(requires_grad)
    f = losses("fast")[name]
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        TRANSFORMS[transform](f, x, torch.ones_like(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("transform", ["jvp", "forward_ad"])
def test_the_reference_has_forward_derivatives(name, transform):
    """A central difference in float64 says what they are."""
    f, v = losses("reference")[name], torch.randn_like(X)
    step = 1e-6
    want = (f(X + step * v) - f(X - step * v)) / (2 * step)
    torch.testing.assert_close(TRANSFORMS[transform](f, X, v), want, rtol=1e-4, atol=1e-9)


def test_the_reference_has_vmap():
    f, batch = losses("reference")["dense"], torch.stack([X, 2 * X])
    torch.testing.assert_close(torch.func.vmap(f)(batch), torch.stack([f(x) for x in batch]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["prediction", "incoming gradient"])
def test_a_second_backward_is_refused(name, by, backend):
    x = X.float().requires_grad_()
    g = torch.ones((), requires_grad=True)
    (dx,) = torch.autograd.grad(losses(backend)[name](x), x, g, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(dx.square().sum(), x if by == "prediction" else g)


@pytest.mark.parametrize("name", NAMES)
def test_a_first_backward_with_a_gradient_that_has_one_goes_on(name, backend):
    """Only its own derivative is refused: `create_graph=True` alone harms nobody."""
    x = X.float().requires_grad_()
    f = losses(backend)[name]
    (want,) = torch.autograd.grad(3 * f(x), x)
    (got,) = torch.autograd.grad(f(x), x, torch.tensor(3.0, requires_grad=True), create_graph=True)
    torch.testing.assert_close(got, want)


def test_a_functional_call_of_a_model_is_no_transform(backend):
    model = torch.nn.Conv2d(4, 4, 1)
    loss = GenericPerceptualLoss(4, backend=backend)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    value = loss(torch.func.functional_call(model, weights, X.float()), T)
    grads = torch.autograd.grad(value, list(weights.values()))
    want = torch.autograd.grad(loss(model(X.float()), T), list(model.parameters()))
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_transform_is_refused_or_right():
    f = losses("fast")["dense"]
    x = X.float()

    def directional(x):
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    with pytest.raises(Exception, match="reference") as caught:
        torch.compile(directional, backend="aot_eager")(x)
    assert "backend='reference'" in str(caught.value)
