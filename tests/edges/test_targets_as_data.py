"""`TopK` and `TargetFeatures` as data: moved, indexed, joined, mapped over, sent, stored."""

from __future__ import annotations

import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.utils import _cast_forward_inputs
from torch.utils.data import DataLoader, default_collate
from torch.utils.data._utils.pin_memory import pin_memory

from gpl_fast import GenericPerceptualLoss, LossNet, TargetFeatures, TopK

pytestmark = pytest.mark.usefixtures("one_thread")

N, K, H, W = 3, 2, 9, 10
KINDS = ["topk", "features", "unmasked", "weights"]


def make(**options):
    return GenericPerceptualLoss(4, net="1,1", widths=(4, 6), **{"level_weights": (1, 1)} | options)


def sparse(n=N, k=K, rest="drop"):
    return TopK(*torch.randn(n, 4, H, W).softmax(1).topk(k, dim=1), rest)


def stored(n=N, masked=True):
    mask = torch.rand(n, H, W) < 0.7 if masked else None
    if masked == "weights":
        mask = mask * torch.rand(n, H, W)
    return make().encode(torch.randn(n, 4, H, W), mask)


def target(kind, n=N):
    masked = {"unmasked": False, "features": True, "weights": "weights"}
    return sparse(n) if kind == "topk" else stored(n, masked[kind])


def tensors(x):
    """Every tensor of it by name, in plain Python."""
    if isinstance(x, TopK):
        return {"values": x.values, "indices": x.indices}
    masks = {name: t for name, t in (("mask", x.mask), ("valid", x.valid)) if t is not None}
    return {**x.features, **masks}


def constant(x):
    return x.rest if isinstance(x, TopK) else x.settings


def same(a, b):
    a_tensors, b_tensors = tensors(a), tensors(b)
    assert type(a) is type(b)
    assert constant(a) == constant(b)
    assert list(a_tensors) == list(b_tensors)
    for name, t in a_tensors.items():
        assert t.dtype == b_tensors[name].dtype
        assert torch.equal(t, b_tensors[name])


# ----------------------------------------------------------------------------------- to, pin_memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.float16,), {}),
        (("cpu", torch.float16), {}),
        (("cpu", torch.float16, True, True), {}),
        ((torch.float16, False, True), {}),
        ((torch.empty(0, dtype=torch.float16),), {}),
        ((torch.empty(0, dtype=torch.float16), False, True), {}),
        ((), {"dtype": torch.float16}),
        ((), {"device": "cpu", "dtype": torch.float16, "non_blocking": True, "copy": True}),
        ((torch.float16,), {"memory_format": torch.channels_last}),
    ],
)
def test_a_dtype_is_for_floating_maps_alone(kind, args, kwargs):
    """Not for masks, whose numbers are the weights of pixels."""
    before = target(kind)
    after = before.to(*args, **kwargs)
    assert type(after) is type(before)
    assert constant(after) == constant(before)
    copied = kwargs.get("copy") or args[2:] in ((True,), (True, True)) or args[3:] == (True,)
    for name, t in tensors(before).items():
        got, changes = tensors(after)[name], t.is_floating_point() and t.dim() == 4
        assert torch.equal(got, t.to(torch.float16) if changes else t)
        assert got.dtype == (torch.float16 if changes else t.dtype)
        if not changes and "memory_format" not in kwargs:
            assert (got.data_ptr() != t.data_ptr()) == bool(copied)
        elif "memory_format" in kwargs and t.dim() == 4:
            assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_moves_every_tensor(kind):
    x = target(kind)
    for moved in (x.to("meta"), x.to(torch.empty(0, device="meta")), x.to(device="meta")):
        assert {t.device.type for t in tensors(moved).values()} == {"meta"}
        assert {n: t.dtype for n, t in tensors(moved).items()} == {
            n: t.dtype for n, t in tensors(x).items()
        }
    for kept in (x.to("cpu"), x.to(torch.float32), x.to()):
        assert all(t is tensors(x)[name] for name, t in tensors(kept).items())
    assert not any(t is tensors(x)[n] for n, t in tensors(x.to("cpu", copy=True)).items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_a_dtype_that_is_no_float_is_refused(kind, dtype):
    for how in ((dtype,), ("cpu", dtype), (torch.empty(0, dtype=dtype),)):
        with pytest.raises(TypeError, match=rf"\.to: got {dtype}, expected a device or one of"):
            target(kind).to(*how)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_loader_pins_every_tensor(kind, monkeypatch):
    """Without a GPU nothing can be pinned: the call is seen instead."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t.clone())
    x = target(kind)
    _image, got = pin_memory([torch.zeros(1), x])
    assert pinned[1:] == list(tensors(x).values())  # equality of lists is identity first
    same(got, x)
    assert not any(t is tensors(x)[name] for name, t in tensors(got).items())


# ------------------------------------------------------------------------------------------- images

IMAGES = [
    (0, [0]),
    (-1, [2]),
    (np.int32(1), [1]),
    (torch.tensor(2), [2]),
    (torch.tensor(2, dtype=torch.uint16), [2]),
    (slice(1, None), [1, 2]),
    (slice(None, None, 2), [0, 2]),
    (slice(2, 1), []),
    ([2, 0, 2], [2, 0, 2]),
    ([], []),
    (range(1, 3), [1, 2]),
    ([-1, -3], [2, 0]),
    (np.array([1, 0]), [1, 0]),
    (torch.tensor([1, 2, 0]), [1, 2, 0]),
    (torch.tensor([0, 1, 1], dtype=torch.uint8), [0, 1, 1]),  # torch takes it for booleans
    (torch.tensor([True, False, True]), [0, 2]),
    ([False, True, True], [1, 2]),
    (np.array([True, False, False]), [0]),
]


@pytest.mark.parametrize("kind", [*KINDS, "k = 0"])
@pytest.mark.parametrize(("index", "places"), IMAGES, ids=lambda x: str(x).replace("\n", ""))
def test_images_of_a_batch(kind, index, places):
    x = sparse(k=0) if kind == "k = 0" else target(kind)
    got = x[index]
    assert len(got) == len(places)
    assert constant(got) == constant(x)
    for name, t in tensors(x).items():
        rows = [t[i] for i in places]
        assert torch.equal(tensors(got)[name], torch.stack(rows) if rows else t[:0])


@pytest.mark.parametrize("kind", [*KINDS, "k = 0"])
@pytest.mark.parametrize("index", [N, -N - 1, 10**30, [0, N], [-N - 1], torch.tensor([N]),
                                   np.int64(N), torch.tensor(-N - 1)])  # fmt: skip
def test_images_that_there_are_not(kind, index):
    x = sparse(k=0) if kind == "k = 0" else target(kind)
    with pytest.raises(IndexError, match=rf"{type(x).__name__}: got image.*expected .* {N}"):
        x[index]


@pytest.mark.parametrize("kind", KINDS)
def test_indices_that_are_none(kind):
    x = target(kind)
    others = (True, None, ..., (0, 1), "0", 1.0, ["a"], [[0]], [0.5], np.bool_(True))
    wrong = (torch.tensor([0.5]), torch.tensor(True), torch.zeros(1, 1, dtype=torch.int64))
    for index in (*others, *wrong):
        with pytest.raises(TypeError, match=f"{type(x).__name__}: got (the|an) index"):
            x[index]
    for index in ([True], torch.ones(N + 1, dtype=torch.bool)):
        with pytest.raises(IndexError, match=rf"booleans, expected {N}, one for each image"):
            x[index]


@pytest.mark.parametrize("kind", KINDS)
def test_images_joined_again_are_the_batch(kind):
    x = target(kind)
    cat = type(x).cat
    assert len(x) == N
    same(cat([x[0], x[1:]]), x)
    same(cat(tuple(x)), x)  # iteration ends
    same(cat(x[i] for i in range(N)), x)  # looked at more than once
    same(cat([x]), x)
    same(cat([x[:0], x]), x)
    same(cat([x[2], x[0]]), x[[2, 0]])


def test_top_k_that_cannot_be_joined():
    x = sparse()
    for others, message in [
        ([sparse(rest="uniform")], r"rest: got drop and uniform"),
        ([sparse(k=3)], r"values \(k, H, W\): shape: got \(2, 9, 10\) and \(3, 9, 10\)"),
        ([TopK(x.values[..., :5], x.indices[..., :5], "drop")], r"got \(2, 9, 10\) and \(2, 9, 5"),
        ([x.to("meta")], r"device: got cpu and meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            TopK.cat([x, *others])
    with pytest.raises(ValueError, match="got nothing, expected TopK"):
        TopK.cat([])
    with pytest.raises(TypeError, match=r"got torch.float32 \(3, 2, 9, 10\), expected TopK alone"):
        TopK.cat([x, x.values])
    assert TopK.cat([x, x.to(torch.float64)]).values.dtype == torch.float64
    assert TopK.cat([sparse(k=0), sparse(k=0)]).values.shape == (2 * N, 0, H, W)


def test_masks_of_both_kinds_are_joined():
    """True, and no mask at all, are the weight 1."""
    x = [stored(masked=masked) for masked in (True, "weights", False)]
    got = TargetFeatures.cat(x)
    for name in ("mask", "valid"):
        want = [x[0].valid.float(), x[1].valid, torch.ones(N, H, W)]
        assert torch.equal(getattr(got, name), torch.cat(want))


def test_features_that_cannot_be_joined():
    x = stored()
    smaller = {name: t[:, :1] for name, t in x.features.items()}
    one = {"pool1": x.features["pool1"]}
    for other, message in [
        (make(temperature=2.0).encode(torch.randn(1, 4, H, W)), "temperature: got 1.0 and 2.0"),
        (make(seed=1).encode(torch.randn(1, 4, H, W)), "fingerprint: got"),
        (make().encode(torch.randn(1, 4, H, 8)), r"size: got \[9, 10\] and \[9, 8\]"),
        (TargetFeatures(x.features, {**x.settings, "new": 1}), "new: got None and 1"),
        (TargetFeatures(one, x.settings), "layers: got .*pool2.* and .*pool1"),
        (TargetFeatures(smaller, x.settings), r"pool1 \(C, H, W\): shape: got \(4, 4, 5\) and \(1"),
        (x.to("meta"), "device: got cpu and meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            TargetFeatures.cat([x, other])
    with pytest.raises(ValueError, match="got nothing, expected TargetFeatures of the same"):
        TargetFeatures.cat(iter([]))
    with pytest.raises(TypeError, match="got TopK, expected TargetFeatures alone"):
        TargetFeatures.cat([x, sparse()])
    other_order = TargetFeatures(dict(reversed(x.features.items())), x.settings, x.mask, x.valid)
    same(TargetFeatures.cat([x, other_order]), x[[0, 1, 2, 0, 1, 2]])


# ----------------------------------------------------------------------------------------- a loader


class Pairs(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return torch.full((3,), i), self.x[i]


def collate(samples):
    """As the docstrings write it."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), type(targets[0]).cat(targets)


@pytest.mark.parametrize("kind", KINDS)
def test_through_a_data_loader_of_processes(kind):
    x = target(kind)
    loader = DataLoader(Pairs(x), batch_size=2, collate_fn=collate, num_workers=1)
    for batch, (images, got) in enumerate(loader):
        same(got, x[2 * batch : 2 * batch + 2])
        assert images[0, 0] == 2 * batch
    with pytest.raises(TypeError, match=f"found .*{type(x).__name__}"):
        default_collate([x[0], x[1]])  # hence the docstrings' collate_fn


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    x = target(kind)
    for again in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        same(again, x)
        assert again is not x
    assert not any(t is tensors(x)[n] for n, t in tensors(copy.deepcopy(x)).items())


@pytest.mark.parametrize("kind", KINDS)
def test_comparison_is_by_identity(kind):
    x, y = target(kind), target(kind)
    assert (x == x, x == y, x != y) == (True, False, True)
    assert x in [y, x]
    assert y not in [x]
    assert len({x, y, x}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_repr_tells_shapes_and_no_values(kind):
    x = target(kind)
    text = repr(x)
    assert len(text) < 250
    for name, t in tensors(x).items():
        assert f"{name}={str(t.dtype)[6:]} {tuple(t.shape)}" in text
    assert "tensor(" not in text
    assert ("rest='drop'" if kind == "topk" else "size=[9, 10]") in text
    assert "float32 (3, 2, 9, 10) meta" in repr(sparse().to("meta"))


# --------------------------------------------------------------------------------- pytrees, tracing


@pytest.mark.parametrize("kind", KINDS)
def test_a_pytree_of_its_tensors(kind):
    x = target(kind)
    leaves, spec = pytree.tree_flatten({"a": [x]})
    assert all(a is b for a, b in zip(leaves, tensors(x).values(), strict=True))
    same(pytree.tree_unflatten(leaves, spec)["a"][0], x)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    moved = pytree.tree_map(lambda t: t.to("meta"), x)  # no None among what is mapped
    assert {t.device.type for t in tensors(moved).values()} == {"meta"}
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(x)[0]]
    assert paths[0] == (".values" if kind == "topk" else ".features['pool1']")
    assert len(paths) == len(leaves)
    other = target(kind).to(torch.float16)
    assert pytree.tree_structure(other) == pytree.tree_structure(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_may_be_mapped_to_anything(kind):
    x = target(kind)
    for anything in (None, "a", 1, torch.zeros(()), (3, 4)):
        assert repr(pytree.tree_map(lambda t, a=anything: a, x))
    shapes = pytree.tree_map(lambda t: tuple(t.shape), x)
    assert tensors(shapes) == {name: tuple(t.shape) for name, t in tensors(x).items()}


def test_trees_that_differ_in_what_is_constant_differ():
    a, b = (pytree.tree_structure(sparse(rest=rest)) for rest in ("drop", "uniform"))
    assert a != b
    c, d = (pytree.tree_structure(stored(masked=masked)) for masked in (True, False))
    assert c != d


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_models_cast_of_inputs(kind):
    x = target(kind)
    (got,), _ = _cast_forward_inputs(torch.bfloat16, x)
    if kind != "weights":
        same(got, x.to(torch.bfloat16))
        return
    # Weights too, unasked: they count as rounded, beside the mask as it was.
    for name, t in tensors(x).items():
        assert torch.equal(tensors(got)[name], t.to(torch.bfloat16))
    loss, pred = make(), torch.randn(N, 4, H, W)
    rounded = TargetFeatures(
        got.features, x.settings, *(t.bfloat16().float() for t in (x.mask, x.valid))
    )
    assert torch.equal(loss(pred, got, x.mask), loss(pred, rounded))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_images(kind):
    """The tensors in it have no batch dimension: nothing is checked where a tree is rebuilt."""
    x = target(kind)
    got = torch.func.vmap(lambda t: sum(p.double().sum() for p in tensors(t).values()))(x)
    want = sum(p.double().flatten(1).sum(1) for p in tensors(x).values())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors(kind):
    x = target(kind)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = pytree.tree_map(mode.from_tensor, x)
        for y in (fake[0], fake.to(torch.float16), type(x).cat([fake, fake]), copy.copy(fake)):
            assert repr(y)
        assert len(type(x).cat([fake, fake])) == 2 * N


@pytest.mark.parametrize("kind", ["topk", "features"])
@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_in_one_graph(kind, backend):
    """Given to a graph, and indexed, joined, moved, mapped over and made in it."""
    loss, x, data = make(backend=backend), torch.randn(N, 4, H, W), target(kind)

    def made(t):
        if isinstance(t, TopK):
            return TopK(t.values, t.indices, t.rest)
        return TargetFeatures(t.features, t.settings, t.mask, t.valid)

    def step(pred, t):
        joined = type(t).cat([made(t)[0], t[torch.tensor([1])], t[2:]])
        mapped = pytree.tree_map(lambda p: p.to("cpu"), joined)
        return loss(pred, mapped) * len(t), t.to(torch.float16)[-1:]

    torch._dynamo.reset()
    want, wanted = step(x, data)
    got, part = torch.compile(step, fullgraph=True, backend="aot_eager")(x, data)
    torch.testing.assert_close(got, want)
    same(part, wanted)


@pytest.mark.parametrize("kind", ["topk", "features"])
def test_exported(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 4, 1)
            self.loss = make(backend="reference")

        def forward(self, image, t):
            return self.loss(self.head(image), t)

    model, image, x = Model(), torch.randn(N, 3, H, W), target(kind)
    want = model(image, x)
    program = torch.export.export(model, (image, x))
    torch.testing.assert_close(program.module()(image, x), want)


# -------------------------------------------------------------------------------- what is not valid


def test_values_and_indices_on_two_devices():
    x = sparse()
    for values, indices in ((x.values, x.indices.to("meta")), (x.values.to("meta"), x.indices)):
        with pytest.raises(ValueError, match=r"values on .* and indices on .*indices.to\(values"):
            TopK(values, indices)


BAD_PARTS = {
    "list": (lambda t: t.tolist(), "got list.*torch.as_tensor"),
    "array": (lambda t: t.numpy(), "got ndarray.*torch.as_tensor"),
    "none": (lambda t: None, "got NoneType"),
    "sparse": (lambda t: t.to_sparse(), r"sparse.*to_dense"),
    "nested": (lambda t: torch.nested.nested_tensor([t[0], t[1]]), "nested.*to_padded_tensor"),
    "quantized": (
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        "quantized.*dequantize",
    ),
    "complex": (lambda t: t.to(torch.complex64), "got torch.complex64"),
    "bool": (lambda t: t.bool(), "got torch.bool"),
}


@pytest.mark.parametrize("part", ["values", "indices", "feature"])
@pytest.mark.parametrize(("change", "message"), BAD_PARTS.values(), ids=BAD_PARTS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*quantiz")
def test_parts_that_are_no_plain_tensors(part, change, message):
    if part == "feature":
        x = stored(masked=False)
        with pytest.raises(TypeError, match=rf"TargetFeatures: pool2: .*{message}"):
            TargetFeatures({**x.features, "pool2": change(x.features["pool2"])}, x.settings)
        return
    x = tensors(sparse())
    with pytest.raises(TypeError, match=rf"TopK: {part}: .*{message}"):
        TopK(**{**x, part: change(x[part])})


@pytest.mark.parametrize("rest", [True, None, 1, ["drop"], np.array(["drop", "uniform"])])
def test_rest_is_a_word(rest):
    with pytest.raises(ValueError, match=r"rest: got .*expected one of"):
        TopK(sparse().values, sparse().indices, rest)


def test_top_k_of_one_image_or_other_layouts():
    x = sparse()
    with pytest.raises(ValueError, match=r"expected both \(N, k, H, W\).*unsqueeze\(0\)"):
        TopK(x.values[0], x.indices[0])
    with pytest.raises(ValueError, match=r"as from topk\(k, dim=1\)"):
        TopK(x.values, x.indices.permute(0, 2, 3, 1))


def test_top_k_of_any_strides_is_the_same():
    x, loss = sparse(), make()
    pred = torch.randn(N, 4, H, W)
    last = TopK(x.values.contiguous(memory_format=torch.channels_last), x.indices, x.rest)
    flipped = TopK(x.values.flip(0).flip(0), x.indices.mT.contiguous().mT, x.rest)
    learned = TopK(x.values.clone().requires_grad_(), x.indices, x.rest)
    for y in (last, flipped, learned, last[0:], flipped.to(torch.float64).to(torch.float32)):
        assert torch.equal(loss(pred, y), loss(pred, x))
    assert learned.values.grad is None


SETTINGS = {"fingerprint": "ab", "activation": "softmax", "temperature": 1.0, "size": [H, W]}


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"features": {}}, ValueError, r"got none, expected features"),
        ({"features": [torch.rand(1, 1, 1, 1)]}, TypeError, "got list and dict"),
        ({"features": {0: torch.rand(1, 1, 1, 1)}}, TypeError, "name 0, expected text"),
        ({"features": {"a": torch.rand(1, 1, 1)}}, ValueError, r"a: got \(1, 1, 1\)"),
        ({"features": {"a": torch.ones(1, 1, 1, 1).long()}}, TypeError, "a: got torch.int64"),
        ({"features": {"a": torch.rand(1, 1, 1, 1), "b": torch.rand(2, 1, 1, 1)}}, ValueError,
         "N of the features: got 1 and 2"),
        ({"features": {"a": torch.rand(1, 1, 1, 1), "b": torch.rand(1, 1, 1, 1, device="meta")}},
         ValueError, "device: got cpu and meta"),
        ({"settings": {}}, ValueError, "no input size .*loss.encode"),
        ({"settings": None}, TypeError, "NoneType"),
        ({"settings": {**SETTINGS, "size": 9}}, ValueError, "no input size"),
        ({"settings": {**SETTINGS, "size": [9]}}, ValueError, "no input size"),
        ({"settings": {**SETTINGS, "size": [9, 0]}}, ValueError, r"\[9, 0\], expected positive"),
        ({"settings": {**SETTINGS, "size": [-9, 9]}}, ValueError, "expected positive"),
        ({"settings": {**SETTINGS, "size": [2**31, 9]}}, ValueError, "expected positive"),
        ({"settings": {**SETTINGS, "size": [True, 9]}}, ValueError, "got True, expected an int"),
        ({"settings": {**SETTINGS, "size": [9.0, 9]}}, ValueError, "no input size"),
        ({"settings": {**SETTINGS, "size": "99"}}, ValueError, "no input size"),
        ({"valid": torch.ones(1, H, W).int()}, TypeError, "valid: got torch.int32"),
        ({"valid": np.ones((1, H, W), bool)}, TypeError, "valid: got ndarray"),
        ({"valid": torch.ones(2, H, W).bool()}, ValueError, r"valid: got \(2, 9, 10\).*\(1, 9, 1"),
        ({"valid": torch.ones(1, 1, H, W).bool()}, ValueError, "valid: got"),
        ({"valid": torch.ones(1, H, W, device="meta").bool()}, ValueError, "got meta, expected c"),
        ({"mask": torch.ones(1, W, H).bool(), "valid": torch.ones(1, H, W).bool()}, ValueError,
         r"mask: got \(1, 10, 9\)"),
        ({"mask": torch.ones(1, H, W).bool()}, ValueError, "a mask but no valid"),
    ],
)  # fmt: skip
def test_features_made_by_hand(parts, error, message):
    good = {"features": {"a": torch.rand(1, 2, 3, 4)}, "settings": SETTINGS}
    TargetFeatures(**good)
    with pytest.raises(error, match=message):
        TargetFeatures(**{**good, **parts})


def test_the_callers_dictionaries_stay_the_callers():
    features, settings = {"a": torch.rand(1, 2, 3, 4)}, {**SETTINGS, "size": (np.int64(H), W)}
    x = TargetFeatures(features, settings)
    features["b"] = torch.rand(2, 2, 3, 4)
    settings["temperature"] = 3.0
    assert list(x.features) == ["a"]
    assert x.settings == SETTINGS
    assert settings["size"] == (H, W)


# -------------------------------------------------------------------------------------------- files


def test_a_file_of_the_first_release(tmp_path):
    """Its layout, written out: tensors ``feature.<layer>``, masks, one JSON entry."""
    x = stored()
    parts = {f"feature.{name}": t for name, t in x.features.items()}
    parts = {
        k: t.contiguous().clone() for k, t in {**parts, "mask": x.mask, "valid": x.valid}.items()
    }
    header = json.dumps({"settings": x.settings, "layers": list(x.features)})
    path = tmp_path / "f.safetensors"
    save_file(parts, path, {"gpl_fast.features": header})
    same(TargetFeatures.load(path), x)


class Path:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return os.fspath(self.path)


@pytest.mark.parametrize("kind", ["features", "unmasked"])
def test_files_and_what_the_umask_allows(tmp_path, kind):
    x, path = target(kind), tmp_path / "f.safetensors"
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            x.save(Path(path))
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode
    for given in (path, str(path), os.fsencode(path), Path(path)):
        same(TargetFeatures.load(given), x)
    x.to(torch.bfloat16)[1:].save(path)
    same(TargetFeatures.load(path), x.to(torch.bfloat16)[1:])
    x[:0].save(path)
    same(TargetFeatures.load(path), x[:0])


def test_loaded_tensors_outlive_the_file(tmp_path):
    x, path = stored(), tmp_path / "f.safetensors"
    x.save(path)
    loaded = TargetFeatures.load(path)
    with path.open("r+b") as f:
        f.write(bytes(path.stat().st_size))
    same(loaded, x)
    x.save(path)
    with torch.inference_mode():
        loaded = TargetFeatures.load(path)
    pred = torch.randn(N, 4, H, W, requires_grad=True)
    make()(pred, loaded).backward()
    assert pred.grad.abs().sum() > 0


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        stored().save(tmp_path / "absent" / "f.safetensors")
    with pytest.raises(FileNotFoundError, match=r"f\.safetensors"):
        TargetFeatures.load(tmp_path / "f.safetensors")


def test_names_of_layers_of_other_modules(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1 = nn.Sequential(nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()))

        def forward(self, x):
            return self.layer1(x)

    net = LossNet.from_module(Block(), taps={"layer1.0.1": "layer1.0.1"}, in_channels=4)
    loss = GenericPerceptualLoss(4, net)
    image = torch.randn(1, 4, H, W)
    x, path = loss.encode(image), tmp_path / "f.safetensors"
    x.save(path)
    same(TargetFeatures.load(path), x)
    assert list(x.features) == ["layer1.0.1"]
    odd = ["layer1.0.relu", "a,b+c;d", "größe 大", "mask", "feature.mask", "", '"\\', "a\nb", "0"]
    x = TargetFeatures({name: torch.rand(1, 1, 2, 2) for name in odd}, SETTINGS)
    x.save(path)
    same(TargetFeatures.load(path), x)
    same(TargetFeatures.cat([x[:0], x]), x)


def crafted(path, header=None, settings=None, **more):
    features = {"feature.a": torch.rand(1, 2, 3, 4)}
    made = {"settings": {**SETTINGS, **(settings or {})}, "layers": ["a"], **(header or {})}
    made["settings"] = {k: v for k, v in made["settings"].items() if v is not ...} if isinstance(
        made["settings"], dict) else made["settings"]  # fmt: skip
    parts = {k: v for k, v in {**features, **more}.items() if v is not None}
    save_file(parts, path, {"gpl_fast.features": json.dumps(made)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"layers": None}}, "layers: got None"),
        ({"header": {"layers": "a"}}, "layers: got 'a', expected a list"),
        ({"header": {"layers": {"a": 1}}}, "layers: got"),
        ({"header": {"layers": [["a"]]}}, "layers: got"),
        ({"header": {"layers": ["a", "a"]}}, "each once"),
        ({"header": {"layers": ["a", "b"]}}, r"got 1 of the layers \['a', 'b'\]"),
        ({"header": {"layers": ["b" * 10**6]}}, "got 0 of the layers"),
        ({"header": {"settings": None}}, "settings: got None"),
        ({"header": {"settings": [1]}}, "settings: got"),
        ({"settings": {"size": [H]}}, "no input size"),
        ({"settings": {"size": ...}}, "no input size"),
        ({"settings": {"size": [True, W]}}, "got True"),
        ({"settings": {"size": [-H, W]}}, "expected positive"),
        ({"settings": {"size": [10**30, W]}}, "expected positive"),
        ({"settings": {"size": [float("nan"), W]}}, "no input size"),
        ({"settings": {"size": [[[[]]], W]}}, "no input size"),
        ({"settings": {"size": {"0": H, "1": W}}}, "no input size"),
        ({"settings": {"fingerprint": ...}}, "fingerprint: got None"),
        ({"settings": {"fingerprint": 3}}, "fingerprint: got 3"),
        ({"settings": {"activation": ...}}, "activation: got None"),
        ({"settings": {"activation": ["softmax"]}}, "activation: got"),
        ({"settings": {"temperature": ...}}, "temperature: got None"),
        ({"settings": {"temperature": True}}, "temperature: got True"),
        ({"settings": {"temperature": float("nan")}}, "temperature: got nan"),
        ({"settings": {"temperature": -1.0}}, "temperature: got -1.0"),
        ({"feature.a": torch.rand(2, 3, 4)}, r"a: got \(2, 3, 4\)"),
        ({"feature.a": torch.ones(1, 2, 3, 4).int()}, "a: got torch.int32"),
        ({"feature.a": torch.rand(1, 2, 3, 4).to(torch.float8_e5m2)}, "a: got torch.float8"),
        ({"feature.a": None, "feature.b": torch.rand(1, 2, 3, 4)}, "got 0 of the layers"),
        ({"feature.b": torch.rand(1, 2, 3, 4)}, r"tensors of no layer, \['feature.b'\]"),
        ({"valid": torch.ones(1, H, W).int()}, "valid: got torch.int32"),
        ({"valid": torch.ones(1, H, W).to(torch.uint8)}, "valid: got torch.uint8"),
        ({"valid": torch.ones(1, W, H).bool()}, r"valid: got \(1, 10, 9\)"),
        ({"valid": torch.ones(2, H, W).bool()}, r"valid: got \(2, 9, 10\)"),
        ({"mask": torch.ones(1, H, W).bool()}, "a mask but no valid"),
    ],
)
def test_crafted_files_are_refused_with_path_and_reason(tmp_path, change, message):
    path = tmp_path / "given.safetensors"
    crafted(path)
    assert len(TargetFeatures.load(path)) == 1
    crafted(path, **change)
    with pytest.raises(ValueError, match=rf"given.safetensors: .*({message})") as error:
        TargetFeatures.load(path)
    assert len(str(error.value)) < 600


def test_nesting_beyond_every_parser(tmp_path):
    path = tmp_path / "given.safetensors"
    for depth in (10**5, 900, 300):
        deep = "[" * depth + "]" * depth
        for header in (deep, f'{{"layers": {deep}}}', f'{{"layers": ["a"], "settings": {deep}}}',
                       f'{{"layers": ["a"], "settings": {{"size": [{deep}, 4]}}}}'):  # fmt: skip
            save_file({"feature.a": torch.rand(1, 2, 3, 4)}, path, {"gpl_fast.features": header})
            with pytest.raises(ValueError, match=r"given\.safetensors: "):
                TargetFeatures.load(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 50, 300, -1])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "given.safetensors"
    stored().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"given\.safetensors: .*truncated"):
        TargetFeatures.load(path)


def test_values_that_are_not_finite_stay_and_show(tmp_path):
    """A float16 feature may be infinite: it is loaded as it is, and no loss hides it."""
    x, path = stored(masked=False), tmp_path / "f.safetensors"
    for value in (torch.inf, torch.nan):
        broken = {name: t.clone() for name, t in x.features.items()}
        broken["pool2"][0, 0, 0, 0] = value
        TargetFeatures(broken, x.settings).save(path)
        loaded = TargetFeatures.load(path)
        assert not loaded.features["pool2"].isfinite().all()
        for backend in ("fast", "reference"):
            got = make(backend=backend, reduction="none")(torch.randn(N, 4, H, W), loaded)
            assert got.isfinite().tolist() == [False, True, True]
