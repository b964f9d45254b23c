"""Every block of docs/coming_from.md: `theirs`, the real package's, and `ours` give one value and
one gradient, in float64 and in float32, there on the fast path but for `from_module` networks."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming_from.md").read_text()
Names = dict[str, Any]
Step = tuple[Tensor, Tensor]  # value and gradient
DRAWS = 3


def blocks() -> dict[str, list[str]]:
    """Python by section, the page's own first under ""."""
    sections = re.split(r"^## (.*)$", PAGE, flags=re.M)
    titles = ["", *sections[1::2]]
    return {
        title: re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
        for title, text in zip(titles, sections[::2], strict=True)
    }


BLOCKS = blocks()
CASES = [
    pytest.param(title, i, id=f"{title} {i + 1}")
    for title, of_section in BLOCKS.items()
    for i in range(len(of_section))
    if title
]


def run(title: str, number: int) -> Names:
    """What the section's block defines, after the page's and the section's before it."""
    names: Names = {}
    exec(BLOCKS[""][0], names)
    # Theirs are buffers of float32.
    names["imagenet"] = {k: torch.tensor(v).tolist() for k, v in names["imagenet"].items()}
    for block in BLOCKS[title][: number + 1]:
        names.pop("theirs", None)
        exec(block, names)
    return names


# ------------------------------------------------------------------------------ what they are given


def images(names: Names) -> tuple[Tensor, Tensor]:
    """Prediction and target in [0, 1], float64."""
    size = (names.get("H", 48), names.get("W", 40))
    target = torch.rand(2, 3, *size, dtype=torch.float64)
    return (target + 0.2 * torch.randn_like(target)).clamp(0, 1), target


def signed_images(names: Names) -> tuple[Tensor, Tensor]:
    pred, target = images(names)
    return 2 * pred - 1, 2 * target - 1


def bytes_of_images(names: Names) -> tuple[Tensor, Tensor]:
    pred, target = images(names)
    return 255 * pred, 255 * target


def segmentation(names: Names) -> tuple[Tensor, Tensor]:
    """Logits and labels of three classes."""
    logits = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    return logits, torch.randint(0, 3, (2, 40, 48))


def ignoring(names: Names) -> tuple[Tensor, Tensor]:
    logits, labels = segmentation(names)
    return logits, labels.masked_fill(torch.rand(labels.shape) < 0.2, 255)


def elements(names: Names) -> tuple[Tensor, Tensor]:
    """Labels of 0 and 1 for each of three classes."""
    logits, _ = segmentation(names)
    return logits, torch.randint(0, 2, logits.shape)


def binary(names: Names) -> tuple[Tensor, Tensor]:
    logits, labels = ignoring(names)
    return logits[:, :1], labels.where(labels == 255, labels % 2)


INPUTS: dict[str, Callable[[Names], tuple[Tensor, Tensor]]] = {
    "torch.nn 1": ignoring,
    "torch.nn 3": elements,
    "lpips, torchmetrics 1": signed_images,
    "MONAI 1": signed_images,
    "MONAI 3": segmentation,
    "mmsegmentation 1": ignoring,
    "mmsegmentation 2": ignoring,
    "mmsegmentation 3": segmentation,
    "mmsegmentation 4": binary,
    "pytorch/examples, Johnson's Lua 1": bytes_of_images,
}


# ------------------------------------------------------------------------------- without a package


def fast_neural_style(names: Names) -> Callable[[Tensor, Tensor], Tensor]:
    """Of pytorch/examples: mean squares of the features at relu2_2, and of Gram matrices over C H W
    at four layers; the target is content and style."""
    trunk = names["trunk"]

    def features(x: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(v, dtype=x.dtype).view(-1, 1, 1) for v in IMAGENET)
        x, found = (x / 255 - mean) / std, []
        for first, last in ((0, 4), (4, 9), (9, 16), (16, 23)):
            x = trunk[first:last](x)
            found.append(x)
        return found

    def gram(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        rows = x.reshape(n, c, h * w)
        return rows @ rows.mT / (c * h * w)

    def value(pred: Tensor, target: Tensor) -> Tensor:
        mine, wanted = features(pred), features(target)
        style = [F.mse_loss(gram(a), gram(b)) for a, b in zip(mine, wanted, strict=True)]
        return 1e5 * F.mse_loss(mine[1], wanted[1]) + 1e10 * torch.stack(style).sum()

    return value


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
FORMULAS = {"pytorch/examples, Johnson's Lua": fast_neural_style}


# -------------------------------------------------------------------------------------- the page


def step(loss: Callable[..., Any], pred: Tensor, target: Tensor) -> Step:
    """Value and gradient; a pair of parts, one of which may be None, is a sum."""
    x = pred.clone().requires_grad_()
    value = loss(x, target)
    if isinstance(value, tuple):
        value = sum(part for part in value if part is not None)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach().sum(), grad


def to(dtype: torch.dtype, names: Names) -> None:
    """Every module of theirs."""
    for found in names.values():
        if isinstance(found, nn.Module) and not type(found).__module__.startswith("gpl_fast"):
            for module in found.modules():
                nn.Module.to(module, dtype)


def as_given(target: Tensor, dtype: torch.dtype) -> Tensor:
    return target.to(dtype) if target.is_floating_point() else target


@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")
@pytest.mark.parametrize(("title", "number"), CASES)
def test_theirs_and_ours_are_one_loss(title, number, basicsr, mmseg):
    names = run(title, number)
    theirs = names.get("theirs") or FORMULAS[title](names)
    draw = INPUTS.get(f"{title} {number + 1}", images)
    inputs = [draw(names) for _ in range(DRAWS)]
    single = [step(theirs, p.float(), as_given(t, torch.float32)) for p, t in inputs]
    fast = [step(names["ours"], p.float(), as_given(t, torch.float32)) for p, t in inputs]
    to(torch.float64, names)
    truth = [step(theirs, *pair) for pair in inputs]
    value, grad = truth[0]
    exact_value, exact_grad = step(names["ours"], *inputs[0])
    # Some means are not rounded to float32 on both sides, and their sigmoids are float32's.
    words = ("mean=", "resnet50", "use_sigmoid")
    single_inside = any(word in BLOCKS[title][number] for word in words)
    rounded = 1e-6 if single_inside else 1e-10
    assert float(value) > 0
    assert float(exact_value) == pytest.approx(float(value), rel=rounded)
    assert (exact_grad - grad).norm() <= rounded * grad.norm()
    for ours, peers, least in zip(
        errors(fast, truth), errors(single, truth), (1e-6, 1e-5), strict=True
    ):
        assert ours <= 2 * peers + least


def errors(found: list[Step], truth: list[Step]) -> tuple[float, float]:
    """Of the value, relative, and 1 - cosine of the gradient: medians of the draws, since a winner
    of a max pool that rounding decides moves a draw's gradient at once."""
    values = [abs(float(v.double() / t) - 1) for (v, _), (t, _) in zip(found, truth, strict=True)]
    angles = [
        1 - float(F.cosine_similarity(g.double().flatten(), t.flatten(), dim=0))
        for (_, g), (_, t) in zip(found, truth, strict=True)
    ]
    return statistics.median(values), statistics.median(angles)
