"""Every kind of target: labels of any dtype, TopK's rules, stored features, masks, resizing."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import NARROW, value_and_grad
from safetensors.torch import save_file

from gpl_fast import GenericPerceptualLoss, TargetFeatures, TopK
from gpl_fast.targets import Target, resolve, topk, values
from gpl_fast.targets.data import Batch
from gpl_fast.targets.data.topk import RESTS

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32]
SHAPE = (2, 4, 9, 10)


def make(channels=4, **options):
    options = {"net": "1,1", "widths": NARROW, "backend": "reference", **options}
    return GenericPerceptualLoss(channels, **options)


def pred():
    return torch.randn(SHAPE)


def labels():
    return torch.randint(0, 4, (2, 9, 10))


def sparse(rest="renormalize", **parts):
    values = parts.get("values", torch.full((2, 2, 9, 10), 0.4))
    indices = parts.get("indices", torch.randint(0, 4, (2, 2, 9, 10)))
    return TopK(values, indices, rest)


# -------------------------------------------------------------------------------------------- kinds


class Everywhere(Batch):
    """One class at all pixels of an image: classes (N,)."""

    def __init__(self, classes):
        self.classes = classes


@dataclass(frozen=True)
class EverywhereTarget(Target):
    kind = "everywhere"
    classes: torch.Tensor
    channels: int

    @classmethod
    def takes(cls, given):
        return isinstance(given, Everywhere)

    @classmethod
    def resolve(cls, given, channels, o, *, mask, pred, what):
        return cls(tuple(pred.shape[2:]), mask, given.classes, channels)

    @property
    def data(self):
        return self.classes

    def map(self, activation, temperature, dtype):
        y = F.one_hot(self.classes, self.channels).to(dtype)[:, :, None, None]
        y = y.expand(-1, -1, *self.size)
        return y if self.valid is None else y * self.valid.unsqueeze(1)


def test_a_new_kind_is_a_class_and_a_place_in_the_list(monkeypatch):
    """On the reference; the fast path has to know its word and its tensors besides."""
    monkeypatch.setattr(resolve, "KINDS", (EverywhereTarget, *resolve.KINDS))
    classes, mask = torch.tensor([3, 1]), torch.rand(2, 9, 10) < 0.6
    for given in (None, mask):
        got = value_and_grad(make(), x := pred(), Everywhere(classes), given)
        want = value_and_grad(make(), x, classes.view(2, 1, 1).expand(2, 9, 10), given)
        assert all(map(torch.equal, got, want))


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("dtype", [*SIGNED, *UNSIGNED])
@pytest.mark.parametrize("channel", [False, True], ids=["NHW", "N1HW"])
def test_labels_of_every_integer_dtype(dtype, channel):
    loss, x, y = make(ignore_index=-1 if dtype in SIGNED else 200), pred(), labels()
    y[0, :3] = loss.options.ignore_index
    want = value_and_grad(loss, x, y)
    y = y.to(dtype)
    copy = y.clone()
    got = value_and_grad(loss, x, y.unsqueeze(1) if channel else y)
    assert all(map(torch.equal, got, want))
    assert torch.equal(y, copy)


@pytest.mark.parametrize("dtype", [torch.bool, *SIGNED, *UNSIGNED])
@pytest.mark.parametrize("channel", [False, True], ids=["NHW", "N1HW"])
def test_one_channel_integer_masks_are_the_map_itself(dtype, channel):
    loss = make(1, activation="sigmoid", target_activation="none")
    x, y = torch.randn(2, 1, 9, 10), torch.rand(2, 9, 10) < 0.5
    want = value_and_grad(loss, x, y.unsqueeze(1).float())
    y = y.to(dtype)
    got = value_and_grad(loss, x, y.unsqueeze(1) if channel else y)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(("channels", "bad"), [(4, 4), (4, 255), (4, -1), (1, 2), (1, -1)])
def test_labels_out_of_range_name_the_value_and_the_count(channels, bad):
    loss = make(channels, activation="sigmoid")
    x, y = torch.randn(2, channels, 9, 10), torch.zeros(2, 9, 10, dtype=torch.int64)
    y[1, 2, 3:6] = bad
    last = max(channels, 2) - 1
    with pytest.raises(ValueError, match=rf"got 3 pixels outside \[0, {last}\], such as \[{bad}\]"):
        loss(x, y)
    with pytest.raises(ValueError, match="ignore_index=7"):
        make(channels, activation="sigmoid", ignore_index=7)(x, y)


def test_masked_labels_may_hold_anything():
    loss, x, y, mask = make(), pred(), labels(), torch.rand(2, 9, 10) < 0.6
    want = value_and_grad(loss, x, y, mask)
    for anything in (4, -1, 2**62, -(2**62)):
        got = value_and_grad(loss, x, torch.where(mask, y, anything), mask.unsqueeze(1))
        assert all(map(torch.equal, got, want))


def test_a_class_may_be_the_ignored_one():
    y = labels()
    got = value_and_grad(make(ignore_index=2), x := pred(), y)
    want = value_and_grad(make(), x, y, y != 2)
    assert all(map(torch.equal, got, want))


def test_looking_at_values_is_free_on_the_cpu_and_asked_for_elsewhere(monkeypatch):
    """GPL_FAST_CHECK: a device tensor is read only when the variable is 1."""
    monkeypatch.delenv("GPL_FAST_CHECK", raising=False)
    here, nowhere = torch.empty(1), torch.empty(1, device="meta")
    elsewhere = SimpleNamespace(device=torch.device("cuda"), is_meta=False)
    assert values.may_look(here)
    assert not values.may_look(elsewhere)
    monkeypatch.setenv("GPL_FAST_CHECK", "0")
    assert not values.may_look(elsewhere)
    monkeypatch.setenv("GPL_FAST_CHECK", "1")
    assert values.may_look(elsewhere)
    assert not values.may_look(nowhere)  # which holds no values


def test_unseen_values_out_of_range_count_as_ignored(monkeypatch):
    """What CUDA does without GPL_FAST_CHECK: such a pixel leaves both branches."""
    monkeypatch.setattr(values, "may_look", lambda t: False)
    loss, x, y, mask = make(ignore_index=99), pred(), labels(), torch.rand(2, 9, 10) < 0.7
    got = value_and_grad(loss, x, torch.where(mask, y, 12345))
    assert all(map(torch.equal, got, value_and_grad(loss, x, y, mask)))
    t = sparse()
    wild = torch.where(mask.unsqueeze(1), t.indices, -5)
    indices, valid = topk.check_topk(t.values, wild, None, 4, "drop")
    assert torch.equal(valid, mask)
    assert indices.min() >= 0


# --------------------------------------------------------------------------------------------- TopK


@pytest.mark.parametrize("dtype", [torch.uint8, *SIGNED])
@pytest.mark.parametrize("values", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_topk_of_every_dtype(dtype, values):
    t = sparse(values=torch.rand(2, 2, 9, 10).to(values) / 2)
    got = make()(x := pred(), TopK(t.values, t.indices.to(dtype)))
    wide = torch.float64 if values == torch.float64 else torch.float32
    torch.testing.assert_close(got, make()(x, TopK(t.values.to(wide), t.indices)))


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_topk_values_that_are_none(rest, bad):
    t = sparse(rest)
    t.values[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="values: got 1 that are negative or not finite"):
        make()(pred(), t)
    mask = torch.ones(2, 9, 10, dtype=torch.bool)
    mask[0, 2, 3] = False
    assert make()(pred(), t, mask).isfinite()


@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_topk_indices_out_of_range(bad):
    t = sparse()
    t.indices[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match=rf"indices: got 1 outside \[0, 3\], such as \[{bad}\]"):
        make()(pred(), t)
    mask = torch.ones(2, 9, 10, dtype=torch.bool)
    mask[0, 2, 3] = False
    assert make()(pred(), t, mask).isfinite()


@pytest.mark.parametrize("rest", RESTS)
def test_only_renormalize_takes_sums_above_one(rest):
    t = sparse(rest, values=torch.full((2, 2, 9, 10), 0.6))
    if rest == "renormalize":
        half = sparse(values=t.values / 1.2, indices=t.indices)
        torch.testing.assert_close(make()(x := pred(), t), make()(x, half))
    else:
        with pytest.raises(ValueError, match=r"sums up to 1.2, expected at most 1 .*renormalize"):
            make()(pred(), t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_probabilities_are_no_sum_above_one(dtype):
    p = torch.softmax(torch.randn(2, 150, 32, 32), dim=1).to(dtype)
    loss = make(150)
    for rest in RESTS:
        top = p.topk(150, dim=1)
        assert loss(torch.randn(2, 150, 32, 32), TopK(top.values, top.indices, rest)).isfinite()


def test_with_all_classes_listed_uniform_is_drop():
    p = 0.8 * torch.softmax(pred(), dim=1)
    top = p.topk(4, dim=1)
    x = pred()
    values = [make()(x, TopK(top.values, top.indices, rest)) for rest in ("uniform", "drop")]
    assert torch.equal(*values)
    torch.testing.assert_close(values[0], make(target_activation="none")(x, p))


@pytest.mark.parametrize("rest", RESTS)
def test_duplicates_add_up(rest):
    index = torch.randint(0, 4, (2, 1, 9, 10))
    share = torch.rand(2, 2, 9, 10) / 2
    twice = TopK(share, index.expand(-1, 2, -1, -1), rest)
    once = TopK(share.sum(dim=1, keepdim=True), index, rest)
    torch.testing.assert_close(make()(x := pred(), twice), make()(x, once))


def test_a_listed_sum_of_zero_is_a_zero_pixel_under_renormalize():
    t = sparse(values=torch.zeros(2, 2, 9, 10))
    zero = torch.zeros(SHAPE)
    assert torch.equal(make()(x := pred(), t), make(target_activation="none")(x, zero))


@pytest.mark.parametrize(
    ("values", "indices", "rest", "error", "message"),
    [
        ((2, 2, 3, 3), (2, 2, 3, 3), "spread", ValueError, "rest: got 'spread', expected one of"),
        ((2, 2, 3, 3), (2, 1, 3, 3), "drop", ValueError, "expected both"),
        ((2, 3, 3), (2, 3, 3), "drop", ValueError, r"expected both \(N, k, H, W\)"),
        (None, (2, 2, 3, 3), "drop", TypeError, "values: got torch.int64"),
        ((2, 2, 3, 3), None, "drop", TypeError, "indices: got torch.float32"),
    ],
)
def test_topk_is_checked_when_it_is_made(values, indices, rest, error, message):
    floats = torch.zeros(2, 2, 3, 3).long() if values is None else torch.zeros(values)
    integers = torch.zeros(2, 2, 3, 3) if indices is None else torch.zeros(indices).long()
    with pytest.raises(error, match=message):
        TopK(floats, integers, rest)


# ----------------------------------------------------------------------------- dense maps and masks


@pytest.mark.parametrize("size", [(5, 6), (18, 20), (9, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dense_targets_of_another_size(size, dtype):
    target = torch.randn(2, 4, *size).to(dtype)
    wide = target if dtype == torch.float64 else target.float()
    resized = F.interpolate(wide, size=(9, 10), mode="bilinear", align_corners=False)
    x = pred()
    assert torch.equal(make()(x, target), make()(x, resized))


@pytest.mark.parametrize("channel", [False, True], ids=["NHW", "N1HW"])
def test_the_mask_may_be_the_predictions_size_whatever_the_targets(channel):
    loss, x, target = make(), pred(), torch.randn(2, 4, 5, 5)
    mask = torch.rand(2, 9, 10) < 0.5
    _, grad = value_and_grad(loss, x, target, mask.unsqueeze(1) if channel else mask)
    assert not grad.masked_select(~mask.unsqueeze(1)).any()
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 5, 6\).*the prediction's size"):
        loss(x, target, mask[:, :5, :6])
    with pytest.raises(TypeError, match=r"mask: got torch.uint8.*torch.bool"):
        loss(x, target, mask.byte())


@pytest.mark.parametrize("target", ["same", "none", "sigmoid", "softmax"])
def test_target_activation_and_temperature(target):
    """The temperature divides before every activation; beside one, "none" takes a map as it is."""
    x, y = pred(), pred()
    act = {"none": lambda z: 2 * z, "sigmoid": torch.sigmoid, "softmax": lambda z: z.softmax(1)}
    loss = make(activation="sigmoid", target_activation=target, temperature=2.0)
    want = make(activation="none")(torch.sigmoid(x / 2), act.get(target, torch.sigmoid)(y / 2))
    torch.testing.assert_close(loss(x, y), want)


# ---------------------------------------------------------------------------------- stored features


@pytest.fixture
def stored():
    return make(level_weights=(1, 1)).encode(pred(), torch.rand(2, 9, 10) < 0.7)


def equal(a: TargetFeatures, b: TargetFeatures) -> None:
    assert dict(a.settings) == dict(b.settings)
    assert list(a.features) == list(b.features)
    assert all(torch.equal(a.features[k], b.features[k]) for k in a.features)
    for s, t in ((a.mask, b.mask), (a.valid, b.valid)):
        assert (s is None) == (t is None)
        assert s is None or torch.equal(s, t)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_save_and_load(tmp_path, kind, masked):
    loss = make(level_weights=(0.5, 1), temperature=1.7, ignore_index=255)
    y = labels()
    y[0, 0] = 255
    target = {"dense": pred(), "labels": y, "topk": sparse()}[kind]
    mask = torch.rand(2, 9, 10) < 0.7 if masked else None
    features = loss.encode(target, mask)
    features.save(tmp_path / "f.safetensors")
    loaded = TargetFeatures.load(tmp_path / "f.safetensors")
    equal(loaded, features)
    assert not any(e.requires_grad for e in features.features.values())
    x = pred()
    want = value_and_grad(loss, x, target, mask)
    for f, m in ((features, None), (loaded, mask)):
        for got, expected in zip(value_and_grad(loss, x, f, m), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_cat_and_indexing(stored):
    assert len(stored) == 2
    equal(TargetFeatures.cat([stored[0], stored[1]]), stored)
    equal(TargetFeatures.cat(list(islice(stored, 9))), stored)  # iteration ends
    equal(stored[-1], stored[1])
    equal(stored[1:], stored[torch.tensor([1])])
    equal(stored[torch.tensor([1, 0])], TargetFeatures.cat([stored[1:], stored[:1]]))
    x = pred()
    loss = make(level_weights=(1, 1), reduction="none")
    torch.testing.assert_close(loss(x[1:], stored[1]), loss(x, stored)[1:])
    for index in (2, -3):
        with pytest.raises(IndexError, match="expected one of 2"):
            stored[index]


def test_cat_fills_masks_that_are_missing(stored):
    plain = make(level_weights=(1, 1)).encode(pred())
    both = TargetFeatures.cat([plain, stored])
    assert both.valid[:2].all()
    assert torch.equal(both.valid[2:], stored.valid)
    assert TargetFeatures.cat([plain, plain]).mask is None


def test_cat_wants_the_same_settings(stored):
    others = [make(level_weights=(1, 1), temperature=2.0), make(level_weights=(0, 1)),
              make(level_weights=(1, 1), seed=1)]  # fmt: skip
    for other in others:
        with pytest.raises(ValueError, match="the same settings"):
            TargetFeatures.cat([stored, other.encode(pred())])
    with pytest.raises(ValueError, match="the same settings"):
        TargetFeatures.cat([])


def test_to(stored):
    half = stored.to(torch.float16)
    assert all(e.dtype == torch.float16 for e in half.features.values())
    assert half.valid.dtype == torch.bool
    x, loss = pred(), make(level_weights=(1, 1))
    torch.testing.assert_close(loss(x, half), loss(x, stored), rtol=1e-2, atol=1e-4)
    meta = stored.to("meta")
    assert meta.mask.device.type == meta.valid.device.type == "meta"
    assert meta.settings == stored.settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "fingerprint: got"),
        ({"pool": "avg"}, "fingerprint: got"),
        ({"activation": "sigmoid"}, "activation: got 'softmax', expected 'sigmoid'"),
        ({"target_activation": "none"}, "activation: got 'softmax', expected 'none'"),
        ({"temperature": 3.0}, "temperature: got 1.0, expected 3.0"),
    ],
)
def test_features_of_another_loss(stored, options, message):
    with pytest.raises(ValueError, match=rf"{message}.*encode the target again"):
        make(level_weights=(1, 1), **options)(pred(), stored)


def test_features_of_fewer_levels_size_batch_or_another_mask(stored):
    last, x = make().encode(pred()), pred()
    with pytest.raises(ValueError, match=r"got levels \['pool2'\], expected also \['pool1'\]"):
        make(level_weights=(1, 1))(x, last)
    assert make()(x, stored).isfinite()  # more levels than needed will do
    with pytest.raises(ValueError, match="a 9 x 10 target, expected 10 x 9"):
        make()(x.transpose(2, 3), last)
    with pytest.raises(ValueError, match="got 2 images, expected 1"):
        make()(x[:1], last)
    for features, mask in ((stored, ~stored.mask), (last, stored.mask)):
        with pytest.raises(ValueError, match="mask: got one that differs"):
            make()(x, features, mask)
    assert torch.equal(make()(x, stored, stored.mask), make()(x, stored))
    with pytest.raises(TypeError, match="encoded already"):
        make().encode(last)


@pytest.mark.parametrize("keep", [0, 8, 100, -1])
def test_truncated_feature_files(stored, tmp_path, keep):
    path = tmp_path / "f.safetensors"
    stored.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not safetensors or is truncated"):
        TargetFeatures.load(path)


def test_files_that_are_not_features(stored, tmp_path):
    path = tmp_path / "f.safetensors"
    make().net.save(path)
    with pytest.raises(ValueError, match=r"foreign safetensors.*TargetFeatures.save"):
        TargetFeatures.load(path)
    path.write_bytes(pickle.dumps({"features": 1}))
    with pytest.raises(ValueError, match="pickles are never read"):
        TargetFeatures.load(path)
    size = '"settings": {"size": [9, 10]}'
    for header, message in [
        ("[]", "malformed"),
        ("{", "malformed"),
        ('{"layers": ["pool1"], ' + size + "}", "malformed"),
        ('{"layers": ["a"]}', "malformed"),
        ('{"layers": ["a"], "settings": {}}', "no input size"),
        ('{"layers": [], ' + size + "}", "expected features"),
    ]:
        save_file(
            {"feature.a": torch.rand(1, 2, 3, 4)}, path, metadata={"gpl_fast.features": header}
        )
        with pytest.raises(ValueError, match=message):
            TargetFeatures.load(path)
