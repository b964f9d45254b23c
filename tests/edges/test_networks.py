"""Networks at the edges: graphs that must not share them, contexts of construction, pickles,
numbers of other kinds. (Other people's modules: test_network_modules.py.)"""

from __future__ import annotations

import copy
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from cases import agree, value_and_grad
from torch import nn
from torch._subclasses import FakeTensorMode

from gpl_fast import (
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    functional,
)
from gpl_fast.net import weights
from gpl_fast.net.structure import parse_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

C, H, W = 6, 8, 12
WIDTHS = (4, 6)


# --------------------------------------------------------------------- compiled losses and networks


def compiled(function, backend="eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def drawn(seed, backend):
    return GenericPerceptualLoss(C, "1", widths=WIDTHS, seed=seed, backend=backend)


def small_chain(seed, channels=C):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


def of_one_structure(kind, tmp_path):
    """Two networks that differ in their weights alone."""
    if kind == "drawn":
        return [LossNet.vgg(C, (1,), WIDTHS, seed=s) for s in range(2)]
    if kind == "adapter":
        return [LossNet.vgg(3, (1,), WIDTHS).with_input_adapter(C, seed=s) for s in range(2)]
    if kind == "mean":
        return [LossNet.from_sequential(small_chain(0), mean=m, std=1 + m) for m in (0, 0.5)]
    if kind == "module":
        return [LossNet.from_module(small_chain(s), ["2"]) for s in range(2)]
    nets = [LossNet.from_sequential(small_chain(s)) for s in range(2)]
    if kind == "loaded":
        for i, net in enumerate(nets):
            net.save(tmp_path / f"{i}.safetensors")
        nets = [LossNet.load(tmp_path / f"{i}.safetensors") for i in range(2)]
    return nets


@pytest.mark.parametrize("kind", ["drawn", "sequential", "loaded", "adapter", "mean", "module"])
def test_compiled_losses_do_not_share_weights(backend, kind, tmp_path):
    backend = "reference" if kind == "module" else backend
    nets = of_one_structure(kind, tmp_path)
    losses = [GenericPerceptualLoss(C, net, backend=backend) for net in nets]
    x, y = torch.randn(2, 2, C, H, W)
    got = [value_and_grad(compiled(loss), x, y) for loss in losses]
    want = [value_and_grad(loss, x, y) for loss in losses]
    assert abs(want[0][0] - want[1][0]) > 0.01 * want[0][0]
    for a, b in zip(got, want, strict=True):
        agree(a, b)


def test_looked_up_labels_do_not_share_weights(backend):
    """Of the walk that looks weights up, through AOTAutograd too."""
    x, y = torch.randn(2, C, H, W), torch.randint(C, (2, H, W))
    for seed in (0, 1):
        loss = drawn(seed, backend)
        agree(value_and_grad(compiled(loss, "aot_eager"), x, y), value_and_grad(loss, x, y))


def test_a_network_is_replaced_under_a_compiled_loss(backend):
    loss, (x, y) = drawn(0, backend), torch.randn(2, 2, C, H, W)
    run = compiled(loss)
    before = value_and_grad(run, x, y)
    loss.net = LossNet.vgg(C, (1,), WIDTHS, seed=5)
    agree(value_and_grad(run, x, y), value_and_grad(drawn(5, backend), x, y))
    loss.net = LossNet.vgg(C, (1,), WIDTHS, seed=0)
    agree(value_and_grad(run, x, y), before)


def test_one_compiled_function_of_any_loss(backend):
    x, y = torch.randn(2, 2, C, H, W)
    step = compiled(lambda loss, x, y: loss(x, y))
    first, other = drawn(0, backend), drawn(1, backend)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), copy.deepcopy(other)]
    for loss, seed in zip((first, other, *copies), (0, 1, 0, 0, 1), strict=True):
        want = value_and_grad(drawn(seed, backend), x, y)
        agree(value_and_grad(partial(step, loss), x, y), want)


def test_two_losses_in_one_graph(backend):
    x, y = torch.randn(2, 2, C, H, W)
    a, b = drawn(0, backend), drawn(1, backend)

    def both(x, y):
        return a(x, y) + 3 * b(x, y)

    agree(value_and_grad(compiled(both), x, y), value_and_grad(both, x, y))


@pytest.mark.parametrize("family", ["segmentation", "perceptual"])
def test_the_other_losses_do_not_share_weights(backend, family):
    x, labels = torch.randn(2, C, H, W), torch.randint(C, (2, H, W))
    made = []
    for seed in range(2):
        net = LossNet.vgg(C, (1,), WIDTHS, seed=seed)
        if family == "segmentation":
            made.append((SegmentationLoss(C, gpl_weight=1, net=net, backend=backend), labels))
        else:
            loss = PerceptualLoss(net, {"relu1_1": 1.0}, {"pool1": 1.0}, backend=backend)
            made.append((loss, x.flip(0)))
    got = [value_and_grad(compiled(loss), x, y) for loss, y in made]
    for a, (loss, y) in zip(got, made, strict=True):
        agree(a, value_and_grad(loss, x, y))


def test_stored_features_of_a_loss_that_never_ran_compile(backend):
    """The fingerprint that they are held against is computed while the graph is traced."""
    x, y = torch.randn(2, 2, C, H, W)
    features = drawn(3, backend).encode(y)
    want = value_and_grad(drawn(3, backend), x, features)
    agree(value_and_grad(compiled(drawn(3, backend)), x, features), want)


def test_networks_of_one_identity_are_equal():
    nets = [LossNet.vgg(C, (1,), WIDTHS, seed=s) for s in range(20)]
    chain = small_chain(0)
    others = [
        LossNet.vgg(C, (1,), WIDTHS, pool="avg"),
        LossNet.vgg(C, (1,), WIDTHS).with_input_adapter(C),
        LossNet.from_sequential(chain),
        LossNet.from_sequential(chain, mean=0.5, std=2),
        *(LossNet.from_module(chain, ["0"]) for _ in range(2)),  # nobody compares their code
    ]
    identities = [net.identity for net in (*nets, *others)]
    assert len(set(identities)) == len(identities)
    assert all(isinstance(identity, str) for identity in identities)
    for net in (*nets, *others[:-2]):
        assert pickle.loads(pickle.dumps(net)).identity == net.identity == net.fingerprint()


# ------------------------------------------------------------------------------- shared weights


LAYOUT = weights.Layout(torch.device("cpu"), torch.bfloat16, True, False, ())


def test_equal_networks_share_what_is_made_of_their_weights():
    net = LossNet.vgg(C, (1,), WIDTHS, seed=31)
    equals = [LossNet.vgg(C, (1,), WIDTHS, seed=31), copy.deepcopy(net),
              pickle.loads(pickle.dumps(net))]  # fmt: skip
    packs = net.packs(LAYOUT)
    assert list(packs) == ["w.conv1_1", "table", "interior", "rest_table"]
    for other in equals:
        assert other.packs(LAYOUT) is packs
    assert weights.of(net.identity).packs(LAYOUT) is packs


def test_packs_live_as_long_as_a_network_of_theirs():
    net = LossNet.vgg(C, (1,), WIDTHS, seed=32)
    other, key = copy.copy(net), net.identity
    pack = weakref.ref(net.packs(LAYOUT)["w.conv1_1"])
    del net
    assert pack() is other.packs(LAYOUT)["w.conv1_1"]
    del other
    assert pack() is None
    with pytest.raises(RuntimeError, match=rf"{key[:12]}.*not in this process.*LossNet\.load"):
        weights.of(key)


def test_a_backward_outlives_its_network(backend):
    x, y = torch.randn(2, 2, C, H, W)
    x.requires_grad_()

    def value(seed):
        net = LossNet.vgg(C, (1,), WIDTHS, seed=seed)
        return functional.generic_perceptual_loss(x, y, net, backend=backend), net

    kept, _net = value(34)
    (want,) = torch.autograd.grad(kept, x)
    del _net, kept
    left = value(34)[0]
    assert torch.equal(torch.autograd.grad(left, x)[0], want)


def test_threads_make_one_of_all():
    start = threading.Barrier(4)

    def make(_):
        start.wait()
        net = LossNet.vgg(C, (1,), WIDTHS, seed=33)
        return (
            net,
            weights.of(net.identity),
            net.packs(LAYOUT),
            net.weights_on(LAYOUT.device, LAYOUT.dtype),
        )

    with ThreadPoolExecutor(4) as pool:
        nets, held, packs, casts = zip(*pool.map(make, range(4)), strict=True)
    assert len({id(x) for x in held}) == len({id(x) for x in packs}) == 1
    assert len({id(cast["conv1_1"]) for cast in casts}) == 1
    del nets


@pytest.mark.parametrize("made", [
    lambda: LossNet.from_module(small_chain(0), ["0"]),
    lambda: LossNet.from_sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2))),
])  # fmt: skip
def test_networks_without_a_chain_have_no_packs(made):
    net = made()
    assert net.chain == net.chain_obstacle()
    with pytest.raises(RuntimeError, match=re.escape(net.chain)):
        net.packs(LAYOUT)


# ------------------------------------------------------------------------- contexts of construction


class Context:
    """Sets a default and puts the old one back."""

    def __init__(self, set_default, value, back):
        self.set_default, self.value, self.back = set_default, value, back

    def __enter__(self):
        self.set_default(self.value)

    def __exit__(self, *_):
        self.set_default(self.back)


CONTEXTS = {
    "meta": lambda: torch.device("meta"),
    "default device": lambda: Context(torch.set_default_device, "meta", None),
    "bfloat16": lambda: Context(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": lambda: Context(torch.set_default_dtype, torch.float64, torch.float32),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}
SOURCE = small_chain(3, 3)


def networks(path):
    yield LossNet.vgg(C, (1, 1), WIDTHS, seed=3)
    yield LossNet.vgg(C, (2,), WIDTHS, init=("uniform", 0.1), pool="stride")
    yield LossNet.vgg(3, (1,), WIDTHS).with_input_adapter(C, seed=2)
    yield LossNet.from_sequential(SOURCE, mean=[0.5], std=[0.25]).with_input_adapter(C)
    yield LossNet.from_module(SOURCE, ["2"]).with_input_adapter(C)
    yield LossNet.load(path)


@pytest.mark.parametrize("context", CONTEXTS)
def test_networks_are_the_same_wherever_they_are_made(context, tmp_path):
    path = tmp_path / "net.safetensors"
    LossNet.from_sequential(small_chain(1)).save(path)
    want = list(networks(path))
    with CONTEXTS[context]():
        made = list(networks(path))
        pickled = pickle.dumps(made)
        unpickled, copied = pickle.loads(pickled), copy.deepcopy(made)
    x, y = torch.randn(2, 2, C, H, W)
    for nets in (made, unpickled, copied):
        for got, expected in zip(nets, want, strict=True):
            assert got.fingerprint() == expected.fingerprint()
            a, b = (GenericPerceptualLoss(C, net, backend="reference") for net in (got, expected))
            for one, other in zip(value_and_grad(a, x, y), value_and_grad(b, x, y), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("context", [c for c in CONTEXTS if c not in ("inference", "no_grad")])
def test_networks_are_the_same_wherever_they_are_called(context, tmp_path):
    path = tmp_path / "net.safetensors"
    LossNet.from_sequential(small_chain(1)).save(path)
    x = torch.randn(2, C, H, W)
    for got, expected in zip(networks(path), networks(path), strict=True):
        want = expected.features(expected.network_input(x, None), expected.layer_names)
        with CONTEXTS[context]():
            e = got.features(got.network_input(x, None), got.layer_names)
        assert all(torch.equal(e[k], want[k]) for k in want)


def test_networks_made_under_a_fake_mode_are_real(tmp_path):
    path, own = tmp_path / "net.safetensors", tmp_path / "own.safetensors"
    LossNet.from_sequential(small_chain(1)).save(path)
    want = list(networks(path))
    with FakeTensorMode():
        made = list(networks(path))
        copied = copy.deepcopy(made)
        drawn_again = pickle.loads(pickle.dumps(made[0]))
        fingerprints = [net.fingerprint() for net in made]
        loss = GenericPerceptualLoss(C, "1,1", widths=WIDTHS)
        made[0].save(own)
        kinds = {type(w) for net in made for w in net.weights.values()}
    assert fingerprints == [net.fingerprint() for net in want]
    assert kinds == {torch.Tensor}
    x, y = torch.randn(2, 2, C, H, W)
    pairs = [*zip(made, want, strict=True), *zip(copied, want, strict=True)]
    for got, expected in [*pairs, (drawn_again, want[0]), (LossNet.load(own), want[0])]:
        a, b = (GenericPerceptualLoss(C, net, backend="reference") for net in (got, expected))
        for one, other in zip(value_and_grad(a, x, y), value_and_grad(b, x, y), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(loss(x, y), GenericPerceptualLoss(C, "1,1", widths=WIDTHS)(x, y))


def test_a_pass_under_a_fake_mode_leaves_no_fake_weights():
    net = LossNet.from_module(SOURCE, ["2"])
    x = torch.rand(1, 3, 8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.features(torch.rand(1, 3, 8, 8), ["2"])
    got = net.features(x, ["2"])["2"]
    assert type(got) is torch.Tensor
    assert torch.equal(got, SOURCE(x))


def test_fake_weights_are_refused():
    pickled = [pickle.dumps(LossNet.from_sequential(SOURCE)),
               pickle.dumps(LossNet.from_module(SOURCE, ["2"]))]  # fmt: skip
    with FakeTensorMode():
        fake = small_chain(0)
        for make in (LossNet.from_sequential, partial(LossNet.from_module, taps=["0"])):
            with pytest.raises(ValueError, match=r"from_\w+: got .*load them"):
                make(fake)
        for data in pickled:
            with pytest.raises(ValueError, match=r"hold no values.*outside of FakeTensorMode"):
                pickle.loads(data)


# ---------------------------------------------------------------------------------------- pickles


def test_pickles_of_drawn_networks_are_small():
    loss = GenericPerceptualLoss(19, seed=4)
    data = pickle.dumps(loss)
    assert len(data) < 4096
    other = pickle.loads(data)
    assert other.fingerprint() == loss.fingerprint()
    behind = LossNet.vgg(3, (1, 1), (64, 128), seed=2).with_input_adapter(5, seed=7)
    data = pickle.dumps(behind)
    assert len(data) < 2048
    again = pickle.loads(data)
    assert again.fingerprint() == behind.fingerprint()
    assert again.in_channels == 5
    assert all(torch.equal(w, again.weights[k]) for k, w in behind.weights.items())


def test_pickles_say_when_weights_are_drawn_differently(monkeypatch):
    data = pickle.dumps(LossNet.vgg(3, (1,), WIDTHS, seed=4))
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: draw(*a, **k) * 1.5)
    with pytest.raises(ValueError, match=r"fingerprint .* expected .*LossNet\.save"):
        pickle.loads(data)


@pytest.mark.parametrize("adapter", [False, True])
def test_pickles_of_foreign_networks_hold_the_weights(adapter):
    net = LossNet.from_sequential(small_chain(0), mean=0.5, std=2)
    if adapter:
        net = net.with_input_adapter(9, seed=3)
    x = torch.rand(1, net.in_channels, 8, 8)
    want = net.features(net.network_input(x, None), net.layer_names)
    size = len(pickle.dumps(LossNet.from_sequential(small_chain(0), mean=0.5, std=2)))
    GenericPerceptualLoss(net.in_channels, net)(x, x)  # fills the caches
    data = pickle.dumps(net)
    assert len(data) < size + 2000
    other = pickle.loads(data)
    got = other.features(other.network_input(x, None), net.layer_names)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert (other.fingerprint(), other.mean, other.std) == (net.fingerprint(), net.mean, net.std)


def attributes(net, module=None, taps=()):
    """The state of a network in pickles of the version before `__getstate__` named its parts."""
    return {
        "layers": net.layers, "_weights": net.weights, "_names": net.weight_names,
        "mean": net.mean, "std": net.std, "_module": module, "_taps": dict(taps),
        "in_channels": net.in_channels, "_cast": {}, "_cast_module": {}, "_packs": {},
        "_fingerprint": None,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["drawn", "sequential", "module"])
@pytest.mark.parametrize("adapter", [False, True])
def test_pickles_of_attributes_are_read(kind, adapter):
    module, taps = small_chain(2, 3).eval(), {"a": "1", "b": "2"}
    net = {
        "drawn": lambda: LossNet.vgg(3, (1,), WIDTHS, seed=4),
        "sequential": lambda: LossNet.from_sequential(module, mean=0.5, std=[1.0, 2.0, 3.0]),
        "module": lambda: LossNet.from_module(module, taps, mean=0.5, std=2),
    }[kind]()
    net = net.with_input_adapter(C) if adapter else net
    state = attributes(net, module, taps) if kind == "module" else attributes(net)
    other = object.__new__(LossNet)
    other.__setstate__(pickle.loads(pickle.dumps(state)))
    again = pickle.loads(pickle.dumps(other))
    x = torch.rand(1, net.in_channels, 8, 8)
    for got in (other, again):
        assert got.fingerprint() == net.fingerprint()
        assert (got.layer_names, got.in_channels) == (net.layer_names, net.in_channels)
        a, b = (n.features(n.network_input(x, None), n.layer_names) for n in (got, net))
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_deepcopy_shares_weights():
    net = LossNet.vgg(3, (1, 1), WIDTHS)
    other = copy.deepcopy(net)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (n.weights_on(torch.device("cpu"), dtype)["conv1_1"] for n in (net, other))
        assert a is b
    loss = GenericPerceptualLoss(3, net)
    assert copy.deepcopy(loss).net is not net


def test_repr_shows_what_makes_networks_differ():
    text = repr(LossNet.vgg(3, (1, 1), WIDTHS, seed=4, init=("normal", 0.1), pool="avg"))
    for word in ("3", "(1, 1)", "(4, 6)", "seed=4", "('normal', 0.1)", "'avg'"):
        assert word in text
    assert "with_input_adapter(9, seed=5)" in repr(LossNet.vgg(3).with_input_adapter(9, 5))
    one, other = (LossNet.from_sequential(small_chain(s)) for s in range(2))
    assert repr(one) != repr(other)
    assert "Sequential" in repr(LossNet.from_module(small_chain(0), ["0"]))


# ------------------------------------------------------------------------ numbers of other kinds


def test_integers_may_be_numpys_or_tensors():
    want = LossNet.vgg(3, (1, 2), (4, 6), 5, seed=7, init=("normal", 0.5)).fingerprint()
    for make in (np.int64, np.uint8, torch.tensor):
        net = LossNet.vgg(
            make(3), [make(1), make(2)], [make(4), make(6)], make(5),
            seed=make(7), init=["normal", np.float64(0.5)],
        )  # fmt: skip
        assert net.fingerprint() == want
        assert pickle.loads(pickle.dumps(net)).fingerprint() == want
    arrays = LossNet.vgg(3, np.array([1, 2]), torch.tensor([4, 6]), 5, "max",
                         ("normal", torch.tensor(0.5)), 7)  # fmt: skip
    assert arrays.fingerprint() == want
    behind = LossNet.vgg(3, (1,), WIDTHS).with_input_adapter(np.int32(5), seed=torch.tensor(2))
    assert behind.fingerprint() == (
        LossNet.vgg(3, (1,), WIDTHS).with_input_adapter(5, seed=2).fingerprint()
    )


@pytest.mark.parametrize(
    "blocks", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), 2], "1, 2"]
)
def test_blocks_may_be_a_list(blocks):
    assert parse_blocks(blocks) == (1, 2)
    assert all(type(n) is int for n in parse_blocks(blocks))


@pytest.mark.parametrize("blocks", [[], [1, 0], [True], [1.0], 3, None, ["1"], {"vgg19": 1}])
def test_blocks_that_are_none_list_what_is_known(blocks):
    with pytest.raises(ValueError, match=r"net: got .*'vgg11'.*'1,1,1,1,1'"):
        parse_blocks(blocks)


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": True}, {"in_channels": np.bool_(True)}, {"in_channels": "3"},
        {"blocks": (True,)}, {"blocks": 2}, {"blocks": (1.0,)}, {"widths": (True,)},
        {"widths": 4}, {"widths": "44"}, {"kernel_size": True}, {"kernel_size": 3.0},
        {"kernel_size": "3"}, {"seed": True}, {"seed": 1.5}, {"seed": None}, {"seed": 2**64},
        {"seed": "0"}, {"init": ("normal", True)}, {"init": ("normal", "0.1")},
        {"init": ("normal", 0.1, 2)}, {"init": ("normal",)}, {"init": ("normal", 1e300)},
        {"init": ("uniform", 1e-300)}, {"init": 0.1}, {"init": None}, {"init": ["he"]},
        {"pool": None}, {"pool": ["max"]},
    ],
    ids=str,
)  # fmt: skip
def test_other_kinds_of_arguments_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"^{name}: got .*expected"):
        LossNet.vgg(**{"in_channels": 3, "blocks": (1,), **options})


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.5, 0.25), (np.float32(0.5), torch.tensor(0.25)), (np.array(0.5), np.array([0.25])),
        (torch.full((3,), 0.5), np.full(3, 0.25)), ((0.5,), (0.25,)),
        (torch.full((3, 1, 1), 0.5), [0.25] * 3), (torch.full((3,), 0.5), 0.25),
        (np.float64(0.5), [0.25] * 3), ([0.5], np.full(3, 0.25)),
    ],
)  # fmt: skip
def test_mean_and_std_may_be_one_number_or_arrays(mean, std):
    module = small_chain(0, 3)
    x = torch.rand(1, 3, 8, 8)
    net = LossNet.from_sequential(module, mean=mean, std=std)
    got = net.features(net.network_input(x, None), ["conv1_1"])["conv1_1"]
    want = module[0]((x - 0.5) / 0.25)
    torch.testing.assert_close(got, want.detach())


def test_one_of_mean_and_std_may_be_a_number(backend):
    """On both backends, against the chain written out; and through a file."""
    module, x, y = small_chain(0, 3), *torch.rand(2, 2, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), 0.5
    net = LossNet.from_sequential(module, mean=mean, std=std)
    loss = GenericPerceptualLoss(3, net, activation="none", backend=backend)
    with torch.no_grad():
        a, b = (module((z - mean.view(3, 1, 1)) / std) for z in (x, y))
    torch.testing.assert_close(loss(x, y), (a - b).square().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("0.5", "0.5"), (True, 1.0), ([0.5, "0", 0.5], [1.0] * 3), (0.5, float("nan")),
        (float("inf"), 1.0), (0.5, -1.0), ([[0.5] * 3], [1.0]), ({"r": 1}, 1.0),
        ([0.5] * 3, None), ([0.5] * 2, [1.0] * 2), ([], []),
    ],
    ids=str,
)  # fmt: skip
def test_other_normalisations_are_refused(mean, std):
    with pytest.raises(ValueError, match=r"mean, std: got .*expected"):
        LossNet.from_sequential(small_chain(0, 3), mean=mean, std=std)
    with pytest.raises(ValueError, match=r"mean, std: got .*expected"):
        LossNet.from_module(small_chain(0, 3), ["0"], mean=mean, std=std)


@pytest.mark.parametrize("name", ["fast", "reference"])
def test_a_graph_makes_no_copies_of_its_own(name):
    """What a trace packs is kept: real tensors, which eager calls and other graphs read too."""
    loss = GenericPerceptualLoss(6, "1,1", backend=name)
    x, y = torch.randn(1, 6, 32, 32), torch.randint(0, 6, (1, 32, 32))
    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(x, y)
    held = loss.net.cached_tensors()
    assert held
    assert all(type(t) is torch.Tensor for t in held)
    assert torch.equal(loss(x, y), value)
    assert [t.data_ptr() for t in loss.net.cached_tensors()] == [t.data_ptr() for t in held]
