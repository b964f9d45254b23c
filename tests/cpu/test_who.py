"""Who runs each step: what `explain` says is called, and docs/architecture.md shows it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, TopK, ops
from gpl_fast.fast import policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
C, SIZE = 5, (32, 24)
X, T = torch.randn(2, C, *SIZE), torch.randn(2, C, *SIZE)
Y = torch.randint(0, C, (2, *SIZE))
SPARSE = TopK(*T.softmax(dim=1).topk(2, dim=1))
NET = LossNet.vgg(C, (1, 2), (8, 8))
AVERAGED = LossNet.vgg(C, (2, 1), (8, 8), pool="avg")
STRIDED = LossNet.vgg(C, (1, 1), (8, 8), pool="stride")
ADAPTED = LossNet.vgg(3, (1,), (8,)).with_input_adapter(C)

CASES = {
    "dense": (lambda: GenericPerceptualLoss(C, NET), (X, T)),
    "dense, levels": (lambda: GenericPerceptualLoss(C, NET, level_weights=(1, 1)), (X, T)),
    "labels": (lambda: GenericPerceptualLoss(C, AVERAGED), (X, Y)),
    "topk": (lambda: GenericPerceptualLoss(C, STRIDED), (X, SPARSE)),
    "labels, adapter": (lambda: GenericPerceptualLoss(C, ADAPTED), (X, Y)),
    "total": (lambda: SegmentationLoss(C, net=NET), (X, Y)),
    "taps": (lambda: PerceptualLoss(NET, {"conv1_1": 1.0, "relu2_1": 1.0}, {"pool2": 1.0}), (X, T)),
}  # fmt: skip


class Watched:
    """The operators, each call counted."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str):
        self.calls[name] += 1
        return getattr(ops, name)


@pytest.mark.skipif(ops.load() is not None, reason=str(ops.load()))
@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_called(case):
    make, (x, target) = CASES[case]
    loss, watched, x = make(), Watched(), x.clone().requires_grad_()
    with policy.injected(policy.named("cpu"), compiled=watched):
        found = loss.explain(x, target)
        loss(x, target).backward()
    said = [text for runs in found.who for text in (runs.forward, runs.backward)]
    assert set(re.findall(r"\b\w+_(?:fwd|bwd)\b", ", ".join(said))) == set(watched.calls)


def shown() -> list[tuple[str, str]]:
    """The page's examples: the lines that make a loss and call `explain`, and what they print."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    pairs = pairwise(blocks)
    return [(a, b) for (lang, a), (_, b) in pairs if lang == "python" and "architecture=" in a]


@pytest.mark.parametrize("example", [0, 1])
def test_the_page_shows_what_explain_prints(example, capsys):
    lines, printed = shown()[example]
    exec(lines, {})
    out = capsys.readouterr().out
    assert out[out.index("forward\n") :] == printed
