"""Other people's modules as networks: taps that are written over, hooks, threads, subclasses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import agree, value_and_grad
from torch import nn
from torch.nn.utils import prune

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def small_chain(seed, channels=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


# ---------------------------------------------------------------------- from_module: what a tap is


class Block(nn.Module):
    """torchvision's BasicBlock: the sum is written over what bn2 returned."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Sequential(Block(4), Block(4))
        self.fc = nn.Linear(4 * 16 * 16, 2)  # of one size of image only

    def forward(self, x):
        return self.fc(self.layer(self.stem(x)).flatten(1))

    def by_hand(self, x):
        out = {"stem": self.stem(x)}
        x = out["stem"]
        for i, b in enumerate(self.layer):
            out[f"layer.{i}.bn1"] = b.bn1(b.conv1(x))
            out[f"layer.{i}.bn2"] = b.bn2(b.conv2(out[f"layer.{i}.bn1"].relu()))
            x = out[f"layer.{i}"] = (out[f"layer.{i}.bn2"] + x).relu()
        return out


class DenseNet(nn.Module):
    """Concatenations of what came before, and a ReLU in place over them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.last = nn.BatchNorm2d(13)

    def forward(self, x):
        found = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            found.append(conv(F.relu(norm(torch.cat(found, 1)), inplace=True)))
        return F.relu_(self.last(torch.cat(found, 1))).mean(dim=(2, 3))

    def by_hand(self, x):
        found = [self.stem(x)]
        out = {"stem": found[0]}
        for i in range(3):
            out[f"norms.{i}"] = self.norms[i](torch.cat(found, 1))
            found.append(self.convs[i](out[f"norms.{i}"].relu()))
            out[f"convs.{i}"] = found[-1]
        out["last"] = self.last(torch.cat(found, 1))
        return out


class MobileNet(nn.Module):
    """Hardswish in place, squeeze and excitation in place, and one module that runs twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.Hardswish(inplace=True)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.gate = nn.Hardsigmoid(inplace=True)
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = F.hardtanh_(x, 0.1, 0.9)  # over the caller's input
        y = self.act(self.conv(x))
        gate = self.gate(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))
        y.mul_(gate)
        return F.relu_(self.twice(F.relu_(self.twice(y))))

    def by_hand(self, x):
        out = {"conv": self.conv(F.hardtanh(x, 0.1, 0.9))}
        out["act"] = F.hardswish(out["conv"])
        out["squeeze"] = self.squeeze(out["act"].mean(dim=(2, 3), keepdim=True))
        y = out["act"] * F.hardsigmoid(out["squeeze"])
        out["twice"] = self.twice(y)
        out["twice 1"] = self.twice(out["twice"].relu())
        return out


MODULES = {"resnet": ResNet, "densenet": DenseNet, "mobilenet": MobileNet}


def lively(make, dtype=torch.float32):
    """With running statistics that do something."""
    module = make().to(dtype)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.weight, 1, 0.3)
            nn.init.normal_(m.bias, std=0.3)
    return module


def all_taps(want):
    return {name: tuple([name.split()[0], *map(int, name.split()[1:])]) if " " in name else name
            for name in want}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_taps_are_what_the_submodules_returned(name, training):
    """Values and gradients in float64 against the module written out without in-place steps."""
    module = lively(MODULES[name], torch.float64).eval()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    want = module.by_hand(a := x.clone().requires_grad_())
    module.train(training)
    net = LossNet.from_module(module, all_taps(want))
    given = x.clone()
    got = net.features(b := given.requires_grad_(), net.layer_names)
    assert list(got) == list(want)
    assert module.training == training
    assert torch.equal(given.detach(), x)
    weights = {k: torch.randn_like(e) for k, e in want.items()}
    for k in want:
        torch.testing.assert_close(got[k], want[k], rtol=1e-12, atol=1e-12)
    sum((weights[k] * e).sum() for k, e in want.items()).backward()
    sum((weights[k] * e).sum() for k, e in got.items()).backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODULES)
def test_each_tap_alone_is_the_same(name):
    module = lively(MODULES[name]).eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        want = module.by_hand(x)
    net = LossNet.from_module(module, all_taps(want))
    for k, e in want.items():
        torch.testing.assert_close(net.features(x, [k])[k], e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_modules_that_write_in_place_compile(cold):
    module = lively(MobileNet).eval()
    taps = all_taps(module.by_hand(torch.rand(1, 3, 16, 16)))
    net = LossNet.from_module(module, taps)
    loss = PerceptualLoss(net, dict.fromkeys(net.layer_names, 1.0))
    x, y = torch.rand(2, 2, 3, 16, 16)
    want = None if cold else value_and_grad(loss, x, y)
    got = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), x, y)
    agree(got, want or value_and_grad(loss, x, y))


class Fails(nn.Module):
    def forward(self, x):
        raise AssertionError("nothing here should run")


def test_a_pass_ends_at_its_last_tap():
    module = ResNet().eval()
    x = torch.rand(1, 3, 12, 20)  # of which the head says a size that does not fit
    want = module.by_hand(x)
    net = LossNet.from_module(module, ["stem", "layer.0.bn2", "layer.1"])
    for k, e in net.features(x, net.layer_names).items():
        torch.testing.assert_close(e, want[k])
    module.layer[1], module.fc = Fails(), Fails()
    net = LossNet.from_module(module, ["stem", "layer.0.bn2", "layer.1"])
    got = net.features(x, ["stem", "layer.0.bn2"])  # what a loss uses, not all that there is
    for k, e in got.items():
        torch.testing.assert_close(e, want[k])


class Catches(nn.Module):
    """Catches every exception of its inner module."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 4, 1)
        self.after = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        try:
            x = self.inner(x)
        except Exception as error:
            raise AssertionError("the module saw how a pass ends") from error
        return self.after(x)


def test_the_end_of_a_pass_is_no_exception_that_modules_catch():
    module = Catches()
    x = torch.rand(1, 3, 4, 4)
    got = LossNet.from_module(module, ["inner"]).features(x, ["inner"])["inner"]
    assert torch.equal(got, module.inner(x))


def test_threads_get_their_own_outputs():
    module = lively(DenseNet).eval()
    with torch.no_grad():
        inputs = [torch.rand(1, 3, 8 + i % 5, 16) for i in range(160)]
        net = LossNet.from_module(module, ["stem", "norms.1", "last"])
        serial = [net.features(x, net.layer_names) for x in inputs]

        def call(i):
            with torch.no_grad():
                return net.features(inputs[i], net.layer_names)

        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(call, range(len(inputs))))
    for a, b in zip(together, serial, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)


def test_threads_get_their_own_gradients():
    module = lively(ResNet).eval()
    net = LossNet.from_module(module, ["layer.0.bn2", "layer.1"])
    loss = GenericPerceptualLoss(3, net, level_weights=(1, 1), activation="none")
    pairs = [torch.rand(2, 1, 3, 8 + i % 3, 12) for i in range(64)]
    serial = [value_and_grad(loss, *pair) for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda pair: value_and_grad(loss, *pair), pairs))
    for a, b in zip(together, serial, strict=True):
        agree(a, b, 1e-6)


def test_the_copy_has_none_of_the_users_hooks():
    seen = []
    module = ResNet().eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        want = module.by_hand(x)["layer.1"]
    generator = torch.Generator()  # which no deepcopy takes
    handles = [
        module.stem.register_forward_hook(lambda m, a, out: seen.append(generator) or out * 2),
        module.layer[0].register_forward_pre_hook(lambda m, a: seen.append(1) or (a[0] * 2,)),
        module.layer.register_forward_pre_hook(
            lambda m, a, k: seen.append(2), with_kwargs=True, prepend=True
        ),
        module.layer[0].bn1.register_full_backward_hook(lambda *a: seen.append(3)),
        module.layer[1].register_full_backward_pre_hook(lambda *a: seen.append(4)),
        module.register_forward_hook(lambda *a: seen.append(5), always_call=True),
    ]
    with pytest.warns(UserWarning, match=r"no hooks of \['the module', 'stem', 'layer', 'layer.0'"):
        net = LossNet.from_module(module, ["layer.1"])
    got = net.features(x.requires_grad_(), ["layer.1"])["layer.1"]
    got.sum().backward()
    assert not seen
    torch.testing.assert_close(got.detach(), want)
    with torch.no_grad():
        module(x)
    assert seen  # the module itself keeps them
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [
    nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
    lambda m: prune.random_unstructured(m, "weight", 0.5),
], ids=["weight_norm", "spectral_norm", "new weight_norm", "new spectral_norm", "pruned"]
)  # fmt: skip
def test_what_makes_a_weight_stays_in_the_copy(make):
    module = nn.Sequential(make(nn.Conv2d(3, 4, 3)), nn.ReLU(inplace=True))
    x = torch.rand(1, 3, 6, 6)
    module(x)  # leaves a weight that deepcopy refuses
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)  # which the weight of the last pass does not know of
    got = LossNet.from_module(module, ["0"]).features(x, ["0"])["0"]
    with torch.no_grad():
        want = module.eval()[0](x)
    torch.testing.assert_close(got, want)


def test_taps_that_do_not_run_are_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.used(x)

    x = torch.rand(1, 3, 4, 4)
    net = LossNet.from_module(Unused(), {"a": "used", "b": "idle", "c": ("used", 1)})
    with pytest.raises(ValueError, match=r"tap 'b' \(idle\): got 0 calls.*expected at least 1"):
        net.features(x, ["a", "b"])
    with pytest.raises(ValueError, match=r"tap 'c' \(used\): got 1 calls.*expected at least 2"):
        PerceptualLoss(net, {"c": 1.0})(x, x)
    assert net.features(x, ["a"])["a"].shape == (1, 4, 4, 4)  # after the failures too


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        ("0", "taps"),
        ({"a": ("0", -1)}, "expected >= 0"),
        ({"a": ("0", 1.5)}, "an integer >= 0"),
        ({"a": ("0", True)}, "an integer >= 0"),
        ({"a": ("0", 0, 0)}, r"\(path, call\)"),
        ([("0", 1)], r"\(path, call\)"),
        ([["0", 1]], r"\(path, call\)"),
        ({"a": 3}, r"\(path, call\)"),
        ({3: "0"}, r"\(path, call\)"),
        (None, "taps: got none"),
        (3, "taps: got none"),
        ({"a": ("9", 1)}, r"\['9'\]"),
    ],
)
def test_malformed_taps(taps, words):
    with pytest.raises(ValueError, match=rf"from_module.*{words}"):
        LossNet.from_module(small_chain(0), taps)


def test_modules_without_values_are_refused():
    with torch.device("meta"):
        empty = small_chain(0)
    for module in (empty, nn.Sequential(nn.LazyConv2d(4, 3))):
        with pytest.raises(ValueError, match=r"from_module: got weights of '0'.*load them"):
            LossNet.from_module(module, ["0"], in_channels=3)


def test_fingerprints_of_modules_tell_buffers_and_calls_apart():
    module = MobileNet()
    module.register_buffer("hidden", torch.zeros(2), persistent=False)
    one, second = (LossNet.from_module(module, {"t": ("twice", i)}) for i in (0, 1))
    module.hidden += 1
    other = LossNet.from_module(module, {"t": "twice"})
    assert len({net.fingerprint() for net in (one, second, other)}) == 3


# ------------------------------------------------------------------------------- from_sequential


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std(dim=(1, 2, 3), keepdim=True), self.bias)


class OwnInner(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class Called(nn.ReLU):
    def __call__(self, x):
        return x.tanh()


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class Named(nn.Conv2d):
    """Computes what Conv2d does."""

    def __init__(self, c, k):
        super().__init__(c, c, k, padding=k // 2)


def conv(c=4):
    return nn.Conv2d(c, c, 3, padding=1)


def replaced(name, m):
    setattr(m, name, lambda x: x)
    return m


def hooked(register):
    m = conv()
    getattr(m, register)(lambda *args: None)
    return m


ALTERED = {
    "skip": (lambda: Skip(conv()), "forward"),
    "standardised": (lambda: Standardised(4, 4, 3, padding=1), "forward"),
    "_conv_forward": (lambda: OwnInner(4, 4, 3, padding=1), "_conv_forward"),
    "__call__": (Called, "__call__"),
    "__iter__": (lambda: Reversed(conv(), nn.ReLU()), "__iter__"),
    "forward of an instance": (lambda: replaced("forward", conv()), "forward"),
    "forward of a nested one": (lambda: replaced("forward", nn.Sequential(conv())), "forward"),
    "forward hook": (lambda: hooked("register_forward_hook"), "hooks"),
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), "hooks"),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "hooks"),
    "old weight_norm": (lambda: nn.utils.weight_norm(conv()), "hooks"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(conv()), "hooks"),
    "pruned": (lambda: prune.random_unstructured(conv(), "weight", 0.5), "hooks"),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(conv()), "parametriz"),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(conv()), "parametriz"),
    "lazy": (lambda: nn.LazyConv2d(4, 3, padding=1), "run the module once"),
    "quantised": (lambda: torch.ao.nn.quantized.Conv2d(4, 4, 3, padding=1), "from_module"),
    "in training for it": (
        lambda: torch.ao.nn.qat.Conv2d(
            4, 4, 3, padding=1, qconfig=torch.ao.quantization.get_default_qat_qconfig()
        ),
        "forward",
    ),
    "norm": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "from_module"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("why", ALTERED)
def test_modules_that_compute_something_else_are_refused(why):
    make, word = ALTERED[why]
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), make())
    with pytest.raises(ValueError, match=rf"at position 1\b.*{word}") as error:
        LossNet.from_sequential(flat)
    assert "from_module" in str(error.value) or "run the module once" in str(error.value)
    nested = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Sequential(make())))
    with pytest.raises(ValueError, match=rf"at position 1\.1\.0\b.*{word}"):
        LossNet.from_sequential(nested)


def test_the_outer_sequential_is_looked_at_too():
    for module in (Skip(conv()), replaced("forward", nn.Sequential(conv()))):
        with pytest.raises(ValueError, match=r"from_sequential: got .* forward of its own"):
            LossNet.from_sequential(module)
    module = nn.Sequential(conv())
    handle = module.register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(ValueError, match=r"from_sequential: got .* hooks"):
        LossNet.from_sequential(module)
    handle.remove()
    x = torch.rand(1, 4, 6, 6)
    got = LossNet.from_sequential(module).features(x, ["conv1_1"])["conv1_1"]
    assert torch.equal(got, module(x))


def test_subclasses_that_compute_the_same_and_repeated_modules_are_taken():
    relu = nn.ReLU(inplace=True)
    module = nn.Sequential(Named(3, 3), relu, nn.MaxPool2d(2), Named(3, 5), relu)
    x = torch.rand(1, 3, 8, 8)
    got = LossNet.from_sequential(module).features(x, ["pool1", "relu2_1"])
    with torch.no_grad():
        assert torch.equal(got["pool1"], module[:3](x))
        assert torch.equal(got["relu2_1"], module(x))


def test_weights_that_are_not_what_the_module_says():
    cut = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    cut[0].weight = nn.Parameter(cut[0].weight[:2].detach())  # pruned by hand
    with pytest.raises(ValueError, match=r"conv1_1: got \(2, 3, 3, 3\).*expected \(4, 3, 3, 3\)"):
        LossNet.from_sequential(cut)
    complex_ = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex64 weights .* position 0"):
        LossNet.from_sequential(complex_)
    with torch.device("meta"):
        empty = small_chain(0)
    with pytest.raises(ValueError, match=r"weights on meta at position 0.*load them"):
        LossNet.from_sequential(empty)
    broken = small_chain(0)
    broken[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="conv1_1: got weights that are not finite"):
        LossNet.from_sequential(broken)
