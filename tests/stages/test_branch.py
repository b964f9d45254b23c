"""Which images' target is carried: the decisions of ATen's operators, which are the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import call_of
from torch import Tensor

from gpl_fast import LossNet
from gpl_fast.fast.branch import LOOKED_AT, NEAR, carry_target
from gpl_fast.fast.grid import grid_steps
from gpl_fast.stages import ACTIVATIONS

pytestmark = pytest.mark.needs("carry_target_fwd")

BF16 = torch.bfloat16
KINDS = ("dense", "resized", "labels", "topk", "topk and rest")
RAISED = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 9.0)  # of an image: from far to near


def regions(n: int, channels: int, h: int, w: int, size: int) -> Tensor:
    """Labels that are constant in squares."""
    coarse = torch.randint(channels, (n, -(-h // size), -(-w // size)))
    return coarse.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :h, :w].contiguous()


def peaked(labels: Tensor, channels: int, raised: Tensor) -> Tensor:
    """Logits that are raised at their label, by another number in each image."""
    hot = torch.nn.functional.one_hot(labels, channels).permute(0, 3, 1, 2)
    return torch.randn(hot.shape) + hot * raised.view(-1, 1, 1, 1)


def inputs(kind: str, shape: tuple[int, ...], masked: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Images that are ever nearer to their target; of the last two it is nowhere constant."""
    n, c, h, w = shape
    labels = regions(n, c, h, w, 12)
    labels[-2:] = torch.randint(c, (2, h, w))
    raised = torch.tensor([*RAISED, RAISED[-1], RAISED[-1]])[:n] + torch.tensor(c).log()
    x = peaked(labels, c, raised)
    target: dict[str, Tensor] = {"labels": labels}
    if kind in ("dense", "resized"):
        hot = torch.nn.functional.one_hot(labels, c).permute(0, 3, 1, 2).float()
        if kind == "resized":
            size = (2 * h - 1, 2 * w - 3)
            hot = torch.nn.functional.interpolate(hot, size, mode="nearest-exact")
        target = {"dense": 12 * hot}
    elif kind != "labels":
        values = torch.tensor([0.9, 0.07]).view(1, 2, 1, 1).expand(n, 2, h, w).contiguous()
        target = {"topk_values": values, "topk_indices": torch.stack([labels, (labels + 1) % c], 1)}
        if kind == "topk and rest":
            target["topk_rest"] = torch.full((n, h, w), 0.03 / max(c - 2, 1))
    if masked:
        target["valid"] = torch.rand(n, h, w) < 0.7
        x[:, 0][~target["valid"]] = float("nan")
    return x, target


def decided(stages, call, x: Tensor, target: dict[str, Tensor]) -> Tensor:
    n, _, h, w = x.shape
    from_target = torch.empty(n, dtype=torch.bool)
    stages.carry_target_fwd(
        x, activation=ACTIVATIONS[call.activation],
        target_activation=ACTIVATIONS[call.target_activation], temperature=call.temperature,
        step=grid_steps(h, w), near=NEAR, from_target=from_target,
        **{name: target[name] for name in LOOKED_AT if name in target},
    )  # fmt: skip
    return from_target


def wanted(call, x: Tensor, target: dict[str, Tensor]) -> Tensor:
    return carry_target(call, x, target, slice(0, len(x)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(10, 5, 37, 45), (10, 150, 20, 70)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_decisions_are_atens(stages, kind, shape, masked):
    x, target = inputs(kind, shape, masked)
    call = call_of(LossNet.vgg(shape[1], (1,)), dtype=BF16, kind=kind.split()[0])
    want = wanted(call, x, target)
    assert 0 < want[:8].sum() < 8
    assert kind == "resized" or not want[8:].any()  # twice as large, half of it is constant
    assert torch.equal(decided(stages, call, x, target), want)


@pytest.mark.parametrize("words", [("sigmoid", "sigmoid"), ("none", "none"), ("softmax", "none"),
                                   ("sigmoid", "none")])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
def test_activations_temperatures_layouts(stages, words, temperature, layout):
    n, c, h, w = shape = (8, 7, 40, 33)
    labels = regions(n, c, h, w, 9)
    target = torch.nn.functional.one_hot(labels, c).permute(0, 3, 1, 2).float()
    if words[1] != "none":
        target = 16 * temperature * (target - 0.5)
    most = 0.6 if words[0] == "none" else 9 * temperature
    x = target + torch.randn(shape) * torch.linspace(0, most, n).view(-1, 1, 1, 1)
    if words[0] == "softmax":
        x = temperature * peaked(labels, c, torch.linspace(0, 12, n))
    elif words == ("sigmoid", "none"):
        x += 16 * temperature * (target - 0.5) - target
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, x], dim=-1).flatten(3)[..., ::2]
        target = torch.cat([target, target], 2)[:, :, :h]
    call = call_of(LossNet.vgg(c, (1,)), dtype=BF16, activation=words[0],
                   target_activation=words[1], temperature=temperature)  # fmt: skip
    want = wanted(call, x, {"dense": target})
    assert 0 < want.sum() < n
    assert torch.equal(decided(stages, call, x, {"dense": target}), want)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_labels_of_elements(stages, masked, leave):
    """Where single ones leave, NaN is not looked at."""
    n, c, h, w = shape = (8, 7, 40, 33)
    labels = torch.nn.functional.one_hot(regions(n, c, h, w, 9), c).permute(0, 3, 1, 2).byte()
    labels = labels.contiguous()
    labels[:, 2, 5:20] = 2
    raised = torch.linspace(0, 9, n).view(-1, 1, 1, 1)
    x = torch.randn(shape) + raised * (2 * (labels == 1) - 1)
    target = {"dense": labels}
    if leave:
        target["elements"] = labels
        x[labels == 2] = float("nan")
    if masked:
        target["valid"] = torch.rand(n, h, w) < 0.7
        x.masked_fill_(~target["valid"].unsqueeze(1), float("nan"))
    call = call_of(LossNet.vgg(c, (1,)), dtype=BF16, activation="sigmoid",
                   target_activation="none")  # fmt: skip
    want = wanted(call, x, target)
    assert 0 < want.sum() < n
    assert torch.equal(decided(stages, call, x, target), want)


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float64])
def test_dtypes_of_logits_and_targets(stages, dtype):
    x, target = inputs("dense", (10, 19, 30, 41), False)
    x, target = (x if dtype == torch.float64 else x.to(dtype)), {"dense": target["dense"].to(dtype)}
    call = call_of(LossNet.vgg(19, (1,)), dtype=BF16)
    want = wanted(call, x, target)
    assert 0 < want.sum() < len(want)
    assert torch.equal(decided(stages, call, x, target), want)


def test_logits_without_numbers(stages):
    """Whatever is NaN is far; classes that are impossible are not."""
    x, target = inputs("dense", (10, 70, 20, 24), False)
    x, t = x[4:8], target["dense"][4:8]
    x[0, 3, 0, 0] = float("nan")
    x[1, :, 0, 0] = -float("inf")
    x[2:, 65:], t[2:, 65:] = -float("inf"), -float("inf")
    x[2:, :1], t[2:, :1] = -float("inf"), -float("inf")
    call = call_of(LossNet.vgg(70, (1,)), dtype=BF16)
    want = wanted(call, x, {"dense": t})
    assert want.tolist() == [False, False, True, True]
    assert torch.equal(decided(stages, call, x, {"dense": t}), want)


def test_classes_that_there_are_not(stages):
    x, target = inputs("labels", (10, 5, 33, 30), False)
    labels = target["labels"]
    labels[labels == 2] = -1
    labels[labels == 3] = 9
    lists = {"topk_values": torch.ones(10, 1, 33, 30), "topk_indices": labels.unsqueeze(1)}
    call = call_of(LossNet.vgg(5, (1,)), dtype=BF16, kind="labels")
    for given in ({"labels": labels}, lists):
        want = wanted(call, x, given)
        assert torch.equal(decided(stages, replace(call, kind="topk"), x, given), want)


def test_orders_agree(stages):
    x, target = inputs("labels", (10, 5, 37, 45), False)
    call = call_of(LossNet.vgg(5, (1,)), dtype=BF16, kind="labels")
    found = []
    for order in stages.orders.values():
        with order():
            found.append(decided(stages, call, x, target))
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 1, 1), (1, 1, 600, 3)])
def test_small_and_large_grids(stages, shape):
    x = torch.randn(shape)
    call = call_of(LossNet.vgg(shape[1], (1,)), dtype=BF16, activation="sigmoid")
    want = wanted(call, x, {"dense": x}) if len(x) else torch.empty(0, dtype=torch.bool)
    assert torch.equal(decided(stages, call, x, {"dense": x.clone()}), want)
