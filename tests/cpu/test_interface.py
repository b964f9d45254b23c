"""The public interface is what its contract writes: signatures with their defaults, and calls."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
from torch import nn

import gpl_fast
from gpl_fast.loss import GenericWords

# As the contract writes them; what else there is stands behind, with defaults.
GENERIC = """in_channels, net="1,1,1,1,1", *, widths=(64, 128, 256, 512, 512), kernel_size=3,
    pool="max", init="he", seed=0, level_weights=None, activation="softmax",
    target_activation="auto", criterion="l2", temperature=1.0, ignore_index=None,
    reduction="mean", compute_dtype=None, backend="auto", workspace_mb="auto",
    normalize_features=False"""
SEGMENTATION = """num_classes, *, mode="multiclass", gpl_weight=0.1, ce_weight=1.0,
    ignore_index="auto", class_weight=None, pos_weight=None, label_smoothing=0.0,
    gpl_ignore="auto", return_parts=False"""
PERCEPTUAL = """net, feature_layers={"relu2_2": 1.0}, style_layers={}, tv_weight=0.0,
    reduction="mean", return_parts=False"""
LPIPS = """net, heads=None, *, eps=1e-10, eps_inside=False, normalize=False, spatial=False,
    reduction=None, compute_dtype=None, backend="auto", workspace_mb="auto" """  # None = "mean"
SIGNATURES = {
    "GenericPerceptualLoss": (gpl_fast.GenericPerceptualLoss, GENERIC),
    "its call": (gpl_fast.GenericPerceptualLoss.forward, "pred, target, mask=None"),
    "its encode": (gpl_fast.GenericPerceptualLoss.encode, "target, mask=None"),
    "SegmentationLoss": (gpl_fast.SegmentationLoss, SEGMENTATION),
    "its total": (
        gpl_fast.SegmentationLoss.forward,
        "logits, labels, teacher=None, mask=None, return_parts=None, normalizer=None",
    ),
    "suggest_weight": (
        gpl_fast.SegmentationLoss.suggest_weight,
        "logits, labels, teacher=None, mask=None, share=0.1",
    ),
    "PerceptualLoss": (gpl_fast.PerceptualLoss, PERCEPTUAL),
    "its value": (
        gpl_fast.PerceptualLoss.forward,
        "pred, target, style_target=None, mask=None, return_parts=None",
    ),
    "LPIPS": (gpl_fast.LPIPS, LPIPS),
    "its distance": (gpl_fast.LPIPS.forward, "pred, target, mask=None"),
    "vgg": (
        gpl_fast.LossNet.vgg,
        'in_channels, blocks=(1,1,1,1,1), widths=(64, 128, 256, 512, 512), kernel_size=3, '
        'pool="max", init="he", seed=0',
    ),
    "from_sequential": (gpl_fast.LossNet.from_sequential, "sequential, *, mean=None, std=None"),
}  # fmt: skip


def parameters(function) -> dict[str, object]:
    every = inspect.signature(function).parameters.values()
    return {
        p.name: (dict(p.default) if isinstance(p.default, typing.Mapping) else p.default)
        for p in every
        if p.name != "self" and p.kind is not p.VAR_KEYWORD
    }


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_as_written(name):
    function, text = SIGNATURES[name]
    namespace: dict[str, typing.Any] = {}
    exec(f"def written({text}): ...", namespace)
    want, got = parameters(namespace["written"]), parameters(function)
    assert {key: got.get(key, "missing") for key in want} == want
    assert all(got[key] is not inspect.Parameter.empty for key in got.keys() - want.keys())


def test_a_total_takes_everything_that_the_generic_loss_takes():
    generic = parameters(gpl_fast.GenericPerceptualLoss)
    assert set(generic) - {"in_channels", "ignore_index"} == set(
        typing.get_type_hints(GenericWords)
    )


# Each runs as it stands, with what `world` holds.
EXAMPLES = {
    "a loss": """
loss = gpl_fast.GenericPerceptualLoss(C, net="1,1", activation="softmax", criterion="l2")
value = loss(pred, target, mask=None)
feats = loss.encode(target, mask=None)
feats.save(folder / "features.safetensors")
again = gpl_fast.TargetFeatures.load(folder / "features.safetensors")
assert torch.equal(loss(pred, feats), loss(pred, again))
assert len(loss.fingerprint()) == 64
print(loss.explain(pred, target))
""",
    "targets": """
loss = gpl_fast.GenericPerceptualLoss(C, net="1,1")
for given in (target, labels, labels.unsqueeze(1), gpl_fast.TopK(top, indices, rest="renormalize"),
              loss.encode(target)):
    assert loss(pred, given).dim() == 0
assert loss(pred, target, mask=valid.unsqueeze(1)).isfinite()
""",
    "l1, channel weights, normalised features": """
w = torch.rand(8)
loss = gpl_fast.PerceptualLoss(net, feature_layers={"relu1_1": 1.0, "relu2_1": w}, criterion="l1")
value = loss(image, other)
loss = gpl_fast.GenericPerceptualLoss(3, net, level_weights=[0.5, list(w)], activation="none",
                                      normalize_features=True, compute_dtype="torch.bfloat16")
value = loss(image, other)
""",
    "floating masks": """
loss = gpl_fast.GenericPerceptualLoss(C, net="1,1")
assert torch.equal(loss(pred, target, mask=valid.float()), loss(pred, target, mask=valid))
total = gpl_fast.SegmentationLoss(C, net="1,1")
value = total(pred, labels, mask=torch.rand(labels.shape))
""",
    "the total": """
total = gpl_fast.SegmentationLoss(
    C, gpl_weight=0.1, ce_weight=1.0, ignore_index="auto", class_weight=None, label_smoothing=0.0,
    gpl_ignore="auto", net="1,1")
value = total(pred, labels, teacher=None, mask=None, return_parts=False)
parts = total(pred, labels, teacher=target, return_parts=True)
assert list(parts) == ["loss_ce", "loss_gpl"]
assert torch.equal(sum(parts.values()), total(pred, labels, teacher=target))
""",
    "binary and multilabel": """
total = gpl_fast.SegmentationLoss(1, mode="binary", net="1,1", pos_weight=[2.0])
for given in (hot[:, 0], hot[:, :1], hot[:, 0].bool(), hot[:, 0].float()):
    value = total(pred[:, :1], given)
total = gpl_fast.SegmentationLoss(C, mode="multilabel", net="1,1", class_weight=torch.rand(C),
                                  label_smoothing=0.1, ignore_index=(255, 7))
value = total(pred, hot)
""",
    "normalizer": """
total = gpl_fast.SegmentationLoss(C, net="1,1", ignore_index=(255, 254))
value = total(pred, labels, normalizer=1000)
value = total(pred, labels, normalizer=(1000, torch.tensor(4)))
counts = sum(total.count(y) for y in labels.split(1))
halves = [total(x, y, normalizer=counts) for x, y in zip(pred.split(1), labels.split(1))]
torch.testing.assert_close(sum(halves), total(pred, labels))
""",
    "which weight": """
total = gpl_fast.SegmentationLoss(C, net="1,1")
total.gpl_weight = total.suggest_weight(pred, labels, teacher=None, mask=None, share=0.1)
found = total.explain(pred, labels, ratio=True)
assert abs(found.ratio["loss_gpl"] - 0.1) < 1e-3
print(found)
""",
    "the family": """
loss = gpl_fast.PerceptualLoss(net, feature_layers={"relu2_1": 1.0}, style_layers={"relu1_1": 1.0},
                               tv_weight=0.1, reduction="mean", return_parts=False)
value = loss(image, other, style_target=image[:1, :, 2:, 2:], mask=None)
assert list(loss(image, other, return_parts=True)) == ["loss_feature", "loss_style", "loss_tv"]
""",
    "LPIPS": """
heads = {"relu1_1": torch.rand(6), "relu2_1": torch.rand(8)}
loss = gpl_fast.LPIPS(net, heads, eps=1e-10, normalize=True, reduction="none")
assert loss(image, other, mask=None).shape == (2,)
loss.save(folder / "lpips.safetensors")
again = gpl_fast.LPIPS.load(folder / "lpips.safetensors")
assert torch.equal(again(image, other), loss(image, other))
assert not loss.state_dict() and not list(loss.parameters())
spatial = gpl_fast.LPIPS(net, heads, spatial=True, reduction="none")
assert spatial(image, other).shape == (2, 1, 16, 20)
""",
    "maps": """
loss = gpl_fast.GenericPerceptualLoss(C, net="1,1")
assert loss.distance_map(pred, target).shape == (2, 1, 16, 20)
""",
    "networks": """
net = gpl_fast.LossNet.vgg(3, blocks=(1, 1), widths=(4, 4), kernel_size=3, pool="max", init="he",
                           seed=0)
net = gpl_fast.LossNet.from_sequential(vgg_bn, mean=[0.4, 0.5, 0.4], std=[0.2, 0.3, 0.2])
net.save(folder / "net.safetensors")
net = gpl_fast.LossNet.load(folder / "net.safetensors")
net = net.with_input_adapter(in_channels=C, seed=0)
assert list(net.layer_names) == ["conv1_1", "relu1_1", "pool1"]
value = gpl_fast.GenericPerceptualLoss(C, net)(pred, target)
net = gpl_fast.LossNet.from_module(vgg_bn, taps={"first": "0", "last": "2"})
value = gpl_fast.PerceptualLoss(net, {"first": 1.0, "last": 0.5})(image, other)
""",
    "targets as data": """
top_k = gpl_fast.TopK(top, indices, rest="uniform")
assert len(top_k) == 2 and len(top_k[:1]) == 1
both = gpl_fast.TopK.cat([top_k[:1], top_k[1:]])
loss = gpl_fast.GenericPerceptualLoss(C, net="1,1")
assert torch.equal(loss(pred, both), loss(pred, top_k.to("cpu")))
""",
    "compiled": """
total = gpl_fast.SegmentationLoss(C, net="1,1", ignore_index=(255, 7))
step = torch.compile(total, fullgraph=True, backend="aot_eager")
assert torch.equal(step(pred, labels), total(pred, labels))
""",
}  # fmt: skip


@pytest.fixture
def world(tmp_path) -> dict[str, object]:
    c, size = 5, (16, 20)
    top, indices = torch.randn(2, c, *size).softmax(1).topk(2, dim=1)
    vgg_bn = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
    )
    return {
        "gpl_fast": gpl_fast, "torch": torch, "C": c, "folder": tmp_path,
        "pred": torch.randn(2, c, *size, requires_grad=True), "target": torch.randn(2, c, *size),
        "labels": torch.randint(c, (2, *size)), "hot": torch.randint(2, (2, c, *size)),
        "valid": torch.rand(2, *size) > 0.3, "top": top, "indices": indices,
        "image": torch.rand(2, 3, *size), "other": torch.rand(2, 3, *size),
        "net": gpl_fast.LossNet.vgg(3, (1, 1), (6, 8)), "vgg_bn": vgg_bn.eval(),
    }  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_as_written(name, world):
    exec(EXAMPLES[name], world)
    value = world.get("value")
    if isinstance(value, torch.Tensor):
        assert value.isfinite().all()
