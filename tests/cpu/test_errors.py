"""Wrong calls: a ValueError or TypeError that names what was got, what is expected, the way out.

Each case lists words that its message must hold.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import NARROW
from torch import nn

from gpl_fast import (
    BackendUnavailable,
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    TargetFeatures,
    TopK,
)

N, C, H, W = 2, 5, 37, 45
USER_ERRORS = (ValueError, TypeError)


def gpl(**options):
    return GenericPerceptualLoss(C, **{"widths": NARROW, "ignore_index": 255, **options})


def seg(**options):
    return SegmentationLoss(C, **{"widths": NARROW, **options})


LOSSES = {"gpl": gpl, "seg": seg}


def good():
    """Logits and labels that are right."""
    return torch.randn(N, C, H, W), torch.randint(C, (N, H, W))


def raises(words, call, *args, kind=USER_ERRORS, **kwargs):
    """The call ends in a user error that holds all of `words`."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


# ---------------------------------------------------------------------------- inputs of both losses

_x, _y = torch.zeros(N, C, H, W), torch.zeros(N, H, W, dtype=torch.int64)
_one_hot = F.one_hot(_y, C).permute(0, 3, 1, 2)
_outside = _y.clone()
_outside[0, :2, :3] = 7
_mask = torch.ones(N, H, W, dtype=torch.bool)

# name: (words of the message, prediction, labels, mask)
WRONG_INPUTS = {
    "channels": (["(2, 7, 37, 45)", "(N, 5, H, W)", "in_channels"], torch.zeros(N, 7, H, W), _y),
    "rank": (["(5, 37, 45)", "(N, 5, H, W)", "unsqueeze(0)"], _x[0], _y[0]),
    "not a tensor": (["prediction", "list", "torch.Tensor"], [[0.0]], _y),
    "integer logits": (["prediction", "torch.int64", "float32", "argmax"], _x.long(), _y),
    "float8 logits": (["prediction", "float8", "float32"], _x.to(torch.float8_e4m3fn), _y),
    "complex logits": (["prediction", "complex64"], _x + 0j, _y),
    "16 x 16": (
        ["16 x 16", "at least 32 x 32", "fewer blocks"],
        _x[..., :16, :16],
        _y[..., :16, :16],
    ),
    "one side too small": (["37 x 31", "32 x 32"], _x[..., :31], _y[..., :31]),
    "empty image": (["0 x 45", "32 x 32"], _x[:, :, :0], _y[:, :0]),
    "float labels": (["torch.float32", "(N, H, W)", "labels.long()"], _x, _y.float()),
    "float labels, one channel": (["torch.float32", "labels.long()"], _x, _y.float()[:, None]),
    "complex labels": (["complex64", "integer", ".long()"], _x, _y + 0j),
    "labels of another size": (["labels", "(30, 45)", "(37, 45)", "nearest"], _x, _y[:, :30]),
    "one-hot labels": (["(2, 5, 37, 45)", "one-hot", "argmax(dim=1)"], _x, _one_hot),
    "labels of rank 2": (["(37, 45)", "(N, H, W)", "unsqueeze(0)"], _x, _y[0]),
    "labels of two channels": (["(2, 2, 37, 45)", "(N, 1, H, W)"], _x, _one_hot[:, :2]),
    "labels of another batch": (["labels", "got 1 images", "expected 2", "expand"], _x, _y[:1]),
    "labels elsewhere": (["labels", "meta", "cpu", ".to("], _x, _y.to("meta")),
    "labels missing": (["NoneType", "integer"], _x, None),
    "class out of range": (["6 pixels", "[7]", "[0, 4]", "ignore_index", "mask"], _x, _outside),
    "negative class": (["[-1]", "[0, 4]", "ignore_index"], _x, _y - 1),
    "mask of another size": (
        ["mask", "(2, 30, 45)", "(2, 37, 45)", "nearest"],
        _x,
        _y,
        _mask[:, :30],
    ),
    "mask of another batch": (["mask", "(1, 37, 45)", "(2, 37, 45)"], _x, _y, _mask[:1]),
    "mask of C channels": (["mask", "(2, 5, 37, 45)", "(2, 1, 37, 45)"], _x, _y, _x > 0),
    "integer mask": (["mask", "torch.int32", "torch.bool", "mask > 0"], _x, _y, _mask.int()),
    "negative mask": (["mask", "-1.0", "finite ones >= 0", "clamp"], _x, _y, -_mask.float()),
    "infinite mask": (["mask", "inf", "finite ones >= 0"], _x, _y, _mask / 0.0),
    "unknown mask": (["mask", "nan", "finite ones >= 0"], _x, _y, _mask * float("nan")),
    "mask elsewhere": (["mask", "meta", "cpu", ".to("], _x, _y, _mask.to("meta")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_INPUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_inputs(loss, name):
    words, pred, labels, *mask = WRONG_INPUTS[name]
    raises(words, LOSSES[loss](), pred, labels, mask=mask[0] if mask else None)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_call_after_a_wrong_one_works(loss):
    loss = LOSSES[loss]()
    raises(["7"], loss, _x, _outside)
    assert loss(*good()).isfinite()


def test_ignore_index_is_named_where_there_is_one():
    raises(["7", "ignore_index=255"], gpl(), _x, _outside)
    raises(["pass ignore_index="], gpl(ignore_index=None), _x, _outside)
    raises(["[255]", "ignore_index"], gpl(ignore_index=None), _x, _y + 255)


def test_masked_labels_may_be_anything():
    assert gpl()(_x, _outside, mask=_outside < 5).isfinite()


def test_one_channel_labels_are_masks():
    loss = GenericPerceptualLoss(1, widths=NARROW, activation="sigmoid")
    raises(["[2]", "[0, 1]"], loss, _x[:, :1], _y + 2)


# ----------------------------------------------------------------------------- targets and teachers

WRONG_TARGETS = {
    "other classes": (["(2, 7, 37, 45)", "(N, 5, h, w)", "teacher"], torch.zeros(N, 7, H, W)),
    "another batch": (["got 3 images", "expected 2"], torch.zeros(3, C, H, W)),
    "elsewhere": (["meta", "cpu", ".to("], torch.zeros(N, C, H, W, device="meta")),
    "empty": (["empty", "(2, 5, 0, 45)"], torch.zeros(N, C, 0, W)),
    "rank 5": (["(2, 5, 37, 45, 1)", "(N, 5, h, w)"], torch.zeros(N, C, H, W, 1)),
    "complex": (["complex64", "floating"], torch.zeros(N, C, H, W) + 0j),
    "a string": (["str", "TopK", "TargetFeatures"], "labels"),
    "labels of another size": (["(30, 45)", "(37, 45)"], _y[:, :30]),
    "labels out of range": (["[7]", "[0, 4]"], _outside),
    "top-k of another size": (
        ["TopK", "(30, 45)", "(37, 45)"],
        TopK(_x[:, :2, :30].abs(), _x[:, :2, :30].long()),
    ),
    "top-k of another batch": (["TopK", "1 images"], TopK(_x[:1, :2].abs(), _x[:1, :2].long())),
    "top-k out of range": (
        ["TopK", "indices", "[5]", "[0, 4]", "mask"],
        TopK(_x[:, :2].abs(), _x[:, :2].long() + 5),
    ),
    "top-k negative": (["TopK", "values", ">= 0", "mask"], TopK(_x[:, :2] - 1, _x[:, :2].long())),
    "top-k not finite": (
        ["TopK", "values", "finite"],
        TopK(torch.full((N, 2, H, W), float("nan")), _x[:, :2].long()),
    ),
    "top-k above one": (
        ["TopK", "sums up to 2", "renormalize"],
        TopK(torch.ones(N, 2, H, W), _x[:, :2].long(), "drop"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TARGETS)
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_targets(loss, name):
    words, target = WRONG_TARGETS[name]
    pred, labels = good()
    if loss == "gpl":
        raises(words, gpl(), pred, target)
    else:
        raises(words, seg(ignore_index=None), pred, labels, teacher=target)


def test_wrong_topk():
    values, indices = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    raises(["values", "torch.int64", "topk"], TopK, indices, indices, kind=TypeError)
    raises(["indices", "torch.float32", "topk"], TopK, values, values, kind=TypeError)
    raises(["(1, 2, 4, 4)", "(1, 1, 4, 4)"], TopK, values, indices[:, :1], kind=ValueError)
    raises(["'keep'", "renormalize", "uniform", "drop"], TopK, values, indices, "keep")


def test_encode_refuses_the_same_targets():
    raises(["(2, 7, 37, 45)", "(N, 5, h, w)"], gpl().encode, torch.zeros(N, 7, H, W))
    raises(["TargetFeatures", "encoded already"], gpl().encode, gpl().encode(_x - 1))
    raises(["16 x 16", "32 x 32"], gpl().encode, _x[..., :16, :16] - 1)


# ---------------------------------------------------------------------------------- stored features

OTHER_SETTINGS = {
    "fingerprint": ({"seed": 1}, ["fingerprint"]),
    "structure": ({"net": "1,1,1,1,2"}, ["fingerprint"]),
    "activation": ({"activation": "sigmoid"}, ["activation", "'softmax'", "'sigmoid'"]),
    "target activation": ({"target_activation": "none"}, ["activation", "'softmax'", "'none'"]),
    "temperature": ({"temperature": 2.0}, ["temperature", "1.0", "2.0"]),
    "levels": ({"level_weights": (0, 0, 1, 0, 1)}, ["level", "pool3", "pool5"]),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_features_of_other_settings(loss, name):
    options, words = OTHER_SETTINGS[name]
    stored = LOSSES[loss]().encode(torch.randn(N, C, H, W))
    pred, labels = good()
    other = LOSSES[loss](**options)
    args = (pred, stored) if loss == "gpl" else (pred, labels, stored)
    assert LOSSES[loss]()(*args).isfinite()
    raises([*words, "target features", "encode"], other, *args, kind=ValueError)


def test_features_of_another_size_batch_or_mask():
    stored = gpl().encode(torch.randn(N, C, H, W))
    raises(["37 x 45", "40 x 45", "encode"], gpl(), torch.randn(N, C, 40, W), stored)
    raises(["2 images", "expected 1"], gpl(), torch.randn(1, C, H, W), stored)
    raises(["mask", "encode"], gpl(), _x, stored, mask=_mask)
    raises(["meta", "cpu"], gpl(), _x, stored.to("meta"))


def test_features_files_that_are_broken(tmp_path):
    path = tmp_path / "features.safetensors"
    gpl().encode(torch.randn(N, C, H, W)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    raises(["features.safetensors", "truncated"], TargetFeatures.load, path, kind=ValueError)
    torch.save({"a": torch.zeros(1)}, path)
    raises(["not safetensors", "pickle"], TargetFeatures.load, path, kind=ValueError)
    LossNet.vgg(3, (1,), (4,)).save(path)
    raises(["foreign", "TargetFeatures.save"], TargetFeatures.load, path, kind=ValueError)


def test_weights_files_that_are_broken(tmp_path):
    path = tmp_path / "net.safetensors"
    LossNet.vgg(3, (1, 1), (4, 6)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    raises(["net.safetensors", "truncated"], LossNet.load, path, kind=ValueError)
    path.write_bytes(whole.replace(b"[6,4,3,3]", b"[4,6,3,3]"))
    raises(["conv2_1", "(6, 4, 3, 3)", "(4, 6, 3, 3)"], LossNet.load, path, kind=ValueError)
    torch.save(nn.Conv2d(3, 4, 3).state_dict(), path)
    raises(["not safetensors", "pickle"], LossNet.load, path, kind=ValueError)
    gpl().encode(_x - 1).save(path)
    raises(["foreign", "LossNet.save"], LossNet.load, path, kind=ValueError)
    with pytest.raises(FileNotFoundError):
        LossNet.load(tmp_path / "missing.safetensors")


# ------------------------------------------------------------------------------------------ options

# option: (value, words); an unknown word is answered with the known ones.
WRONG_OPTIONS = {
    "net word": ("net", "resnet50", ["'resnet50'", "vgg11", "vgg19", "'1,1,1,1,1'", "from_module"]),
    "net numbers": ("net", "1,0,1", ["'1,0,1'", "vgg11"]),
    "net type": ("net", nn.Identity(), ["Identity", "LossNet"]),
    "widths short": ("widths", (8, 8), ["(8, 8)", "5 integers"]),
    "widths number": ("widths", 8, ["widths", "8", "each block"]),
    "kernel_size": ("kernel_size", 4, ["4", "(1, 3, 5, 7)"]),
    "pool": ("pool", "sum", ["'sum'", "max", "avg", "stride"]),
    "init word": (
        "init",
        "kaiming",
        ["'kaiming'", "he", "xavier_normal", "('normal', std)", "('uniform', a)"],
    ),
    "init alone": ("init", "normal", ["'normal'", "('normal', std)"]),
    "init number": ("init", ("normal", -1.0), ["-1.0", "positive"]),
    "init short": ("init", ("normal",), ["('normal',)", "('normal', std)"]),
    "init text": ("init", ("normal", "x"), ["'x'", "('normal', std)"]),
    "seed": ("seed", "zero", ["seed", "'zero'", "integer"]),
    "level_weights count": ("level_weights", (1, 1), ["got 2", "expected 5", "pool5"]),
    "level_weights zero": ("level_weights", (0,) * 5, ["level_weights", "not all 0"]),
    "level_weights negative": ("level_weights", (0, 0, 0, -1, 1), ["-1", ">= 0"]),
    "level_weights nan": ("level_weights", (0, 0, 0, 0, float("nan")), ["nan", "finite"]),
    "level_weights text": ("level_weights", "five!", ["'five!'", "5 numbers", "None"]),
    "level_weights number": ("level_weights", 1.0, ["1.0", "5 numbers", "None"]),
    "activation": ("activation", "relu", ["'relu'", "softmax", "sigmoid", "none"]),
    "target_activation": ("target_activation", "relu", ["'relu'", "same", "softmax", "none"]),
    "temperature zero": ("temperature", 0, ["temperature", "0", "> 0"]),
    "temperature nan": ("temperature", float("nan"), ["temperature", "nan", "> 0"]),
    "temperature text": ("temperature", "hot", ["temperature", "'hot'"]),
    "ignore_index": ("ignore_index", 1.5, ["ignore_index", "1.5", "None"]),
    "ignore_index word": ("ignore_index", "none", ["ignore_index", "'none'", "None"]),
    "reduction": ("reduction", "batchmean", ["'batchmean'", "mean", "sum", "none"]),
    "compute_dtype": ("compute_dtype", torch.int8, ["torch.int8", "bfloat16", "None"]),
    "compute_dtype text": ("compute_dtype", "bf16", ["'bf16'", "torch.bfloat16"]),
    "backend": ("backend", "triton", ["'triton'", "auto", "fast", "reference"]),
    "workspace_mb zero": ("workspace_mb", 0, ["workspace_mb", "> 0"]),
    "workspace_mb text": ("workspace_mb", "1G", ["workspace_mb", "'1G'", "megabytes"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_options(loss, name):
    option, value, words = WRONG_OPTIONS[name]
    raises([option.split("_")[0], *words], LOSSES[loss], **{option: value})


SEGMENTATION_OPTIONS = {
    "gpl_weight": (-0.1, ["gpl_weight", "-0.1", ">= 0"]),
    "ce_weight": (float("inf"), ["ce_weight", "inf", ">= 0"]),
    "label_smoothing": (1.5, ["label_smoothing", "1.5", "[0, 1]"]),
    "gpl_ignore": ("yes", ["gpl_ignore", "'yes'", "auto", "True", "False"]),
    "class_weight": ([1.0, 2.0], ["class_weight", "(2,)", "(5,)"]),
}


@pytest.mark.parametrize("option", SEGMENTATION_OPTIONS)
def test_wrong_segmentation_options(option):
    value, words = SEGMENTATION_OPTIONS[option]
    raises(words, seg, **{option: value}, kind=ValueError)


def test_wrong_class_weights():
    raises(["class_weight", "'heavy'", "5 numbers"], seg, class_weight="heavy")
    raises(["class_weight", "-1.0", ">= 0"], seg, class_weight=[-1, 1, 1, 1, 1])


def test_unknown_keywords_are_type_errors():
    raises(["weigth"], gpl, weigth=1, kind=TypeError)
    raises(["weigth"], seg, weigth=1, kind=TypeError)
    net = LossNet.vgg(3, (1,), (4,))
    raises(["weigth"], PerceptualLoss, net, {"pool1": 1.0}, weigth=1, kind=TypeError)


@pytest.mark.parametrize("channels", [0, -3, 2.0, "5", None])
def test_wrong_channels(channels):
    raises(["in_channels", repr(channels), ">= 1"], GenericPerceptualLoss, channels)


def test_one_channel_with_softmax():
    for options in ({}, {"activation": "none", "target_activation": "softmax"}):
        raises(["softmax", "1", "'sigmoid'", "'none'"], GenericPerceptualLoss, 1, **options)
    for activation in ("sigmoid", "none"):
        GenericPerceptualLoss(1, activation=activation)
    raises(["num_classes", "1", ">= 2", "GenericPerceptualLoss", "sigmoid"], SegmentationLoss, 1)


def test_automatic_ignore_index_ends_at_255_classes():
    small = {"widths": (4,), "net": "1"}
    assert SegmentationLoss(255, **small)
    raises(["ignore_index", "'auto'", "256", "None"], SegmentationLoss, 256, **small)
    for explicit in (None, -1, 65535):
        assert SegmentationLoss(256, ignore_index=explicit, **small)


def test_a_loss_net_brings_its_own_structure():
    net = LossNet.vgg(3)
    raises(["in_channels", "150", "3", "with_input_adapter(150)"], GenericPerceptualLoss, 150, net)
    raises(["kernel_size", "LossNet"], GenericPerceptualLoss, 3, net, kernel_size=5)
    raises(["adapter", "already", "without"], net.with_input_adapter(9).with_input_adapter, 9)


# ----------------------------------------------------------------------------------- PerceptualLoss


def test_wrong_perceptual_options():
    net = LossNet.vgg(3, (1, 1), (4, 6))
    raises(["str", "LossNet.vgg", "from_sequential"], PerceptualLoss, "vgg16", kind=TypeError)
    raises(["relu9_9", "relu2_1", "pool2"], PerceptualLoss, net, {"relu9_9": 1.0})
    raises(["style_layers", "relu9_9", "relu2_1"], PerceptualLoss, net, {}, {"relu9_9": 1.0})
    raises(["feature_layers", "list", "dict"], PerceptualLoss, net, ["relu2_1"], kind=TypeError)
    raises(["feature_layers", "-1", ">= 0"], PerceptualLoss, net, {"relu2_1": -1.0})
    raises(["tv_weight", "-1", ">= 0"], PerceptualLoss, net, {"relu2_1": 1.0}, tv_weight=-1)
    raises(["feature_layers", "style_layers", "tv_weight"], PerceptualLoss, net, {}, {})
    raises(["'median'", "mean"], PerceptualLoss, net, {"relu2_1": 1.0}, reduction="median")


def test_wrong_perceptual_inputs():
    loss = PerceptualLoss(LossNet.vgg(3, (1, 1), (4, 6)), {}, {"relu2_1": 1.0})
    x = torch.zeros(3, 3, 20, 20)
    raises(["style_target", "2 images", "1 or 3"], loss, x, x, x[:2])
    raises(["(3, 4, 20, 20)", "(N, 3, h, w)"], loss, x, x, torch.zeros(3, 4, 20, 20))
    raises(["style_target", "meta", "cpu"], loss, x, x, x.to("meta"))
    raises(["3 x 20", "at least 4 x 4"], loss, x, x, x[:, :, :3])
    raises(["(3, 4, 20, 20)", "(N, 3, H, W)"], loss, torch.zeros(3, 4, 20, 20), x)


# ----------------------------------------------------------------------------------------- backends


def module_net():
    return LossNet.from_module(nn.Sequential(nn.Conv2d(C, 4, 3)), taps={"out": "0"})


@pytest.mark.parametrize("loss", LOSSES)
def test_fast_where_it_cannot_run_gives_the_reason(loss):
    pred, labels = good()
    fast = LOSSES[loss](backend="fast")
    for call in (fast, fast):  # the choice is made anew at each forward
        raises(["float64", "float32", "auto"], call, pred.double(), labels, kind=BackendUnavailable)
    own = {"gpl": GenericPerceptualLoss, "seg": SegmentationLoss}[loss]
    of_module = own(C, net=module_net(), backend="fast")
    words = ["from_module", "reference", "auto"]
    raises(words, of_module, pred, labels, kind=BackendUnavailable)
    assert issubclass(BackendUnavailable, RuntimeError)
    assert own(C, net=module_net())(pred, labels).isfinite()  # auto goes on with the reference
    assert LOSSES[loss]()(pred.double(), labels).dtype == torch.float64


def test_environment_overrides_auto(monkeypatch):
    pred, labels = good()
    auto = gpl()
    monkeypatch.setenv("GPL_FAST_BACKEND", "reference")
    assert auto.explain(pred, labels).backend == "reference"
    assert "asked" in auto.explain(pred, labels).reason
    monkeypatch.setenv("GPL_FAST_BACKEND", "fast")
    raises(["float64"], auto, pred.double(), labels, kind=BackendUnavailable)
    assert gpl(backend="reference")(pred.double(), labels).isfinite()  # only "auto" is overridden
    monkeypatch.setenv("GPL_FAST_BACKEND", "cuda")
    words = ["GPL_FAST_BACKEND", "'cuda'", "auto", "fast", "reference", "unset"]
    raises(words, auto, pred, labels, kind=ValueError)
    assert gpl(backend="reference")(pred, labels).isfinite()


def test_wrong_networks():
    raises(["Conv2d", "nn.Sequential", "from_module"], LossNet.from_sequential, nn.Conv2d(3, 4, 3))
    strided = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))
    raises(["position 0", "stride 1", "from_module"], LossNet.from_sequential, strided)
    raises(["empty"], LossNet.from_sequential, nn.Sequential())
    raises(["'9'", "'0'"], LossNet.from_module, strided, taps={"out": "9"})
    raises(["str", "Module"], LossNet.from_module, "resnet18", taps={}, kind=TypeError)
    raises(["in_channels="], LossNet.from_module, nn.Sequential(nn.ReLU()), taps=["0"])
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    raises(["mean", "std", "both"], LossNet.from_sequential, chain, mean=(0.5,) * 3)
    raises(["2 values", "expected 3"], LossNet.from_sequential, chain, mean=(0, 0), std=(1, 1))
    flat = LossNet.from_module(nn.Sequential(nn.Conv2d(C, 4, 3), nn.Flatten()), taps={"out": "1"})
    raises(["'out'", "(N, C, H, W)"], GenericPerceptualLoss(C, flat), *good())
