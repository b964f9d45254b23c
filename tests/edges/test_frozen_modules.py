"""Other people's modules, frozen: hooks that compute, what a stopped pass leaves, gradients that
are off inside, complex weights, fingerprints. (Taps: test_network_modules.py.)"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import warnings
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpl_fast import GenericPerceptualLoss, LossNet

pytestmark = pytest.mark.usefixtures("one_thread")


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))


def features(module, x, tap=""):
    net = LossNet.from_module(module, {"tap": tap}, in_channels=3)
    return net.features(x, ["tap"])["tap"]


def level_loss(module, *taps):
    net = LossNet.from_module(module, taps, in_channels=3)
    return GenericPerceptualLoss(3, net, level_weights=[1.0] * len(taps), activation="none")


@pytest.fixture(autouse=True)
def no_modes_leak():
    yield
    leaked = not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    assert not leaked


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------- paths


def test_a_second_path_of_a_module_is_refused(x):
    relu = nn.ReLU()
    module = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu, relu)
    for path, call in (("3", 1), ("4", 2)):
        words = rf"'{path}' is the same module as '1'; ask for its n-th call: \('1', {call}\)"
        for taps in ({"a": path}, {"a": (path, 1)}, ["1", path]):
            with pytest.raises(ValueError, match=words):
                LossNet.from_module(module, taps)
    net = LossNet.from_module(module, {"first": "1", "second": ("1", 1)})
    got = net.features(x, net.layer_names)
    assert torch.equal(got["first"], module[:2](x))
    assert torch.equal(got["second"], module(x))


def test_a_path_through_a_shared_block_is_refused():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    module = nn.ModuleDict({"a": block, "b": block})
    with pytest.raises(ValueError, match=r"'b\.1' is the same module as 'a\.1'.*\('a\.1', 1\)"):
        LossNet.from_module(module, ["b.1"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_modules_say_the_way_out(how, x):
    given = chain().eval()
    scripted = torch.jit.trace(given, x) if how == "trace" else torch.jit.script(given)
    part = nn.Sequential(scripted, nn.Conv2d(4, 4, 1))
    for module, path in ((scripted, "1"), (scripted, ""), (part, "0.1"), (part, "0")):
        with pytest.raises(ValueError, match=rf"'{path}' is a scripted .*pass the module"):
            LossNet.from_module(module, [path])
    net = LossNet.from_module(part, ["1"])  # beside a scripted part
    assert torch.equal(net.features(x, ["1"])["1"], part(x))


# ------------------------------------------------------------------------------------------- hooks


class Watches(nn.Module):
    """Collects the outputs of its parts with hooks of its own, and computes with them."""

    def __init__(self, how):
        super().__init__()
        self.body, self.out = chain(), nn.Identity()
        self.seen = {}
        if how == "method":
            self.body[0].register_forward_hook(self.keep)
        elif how == "partial":
            self.body[0].register_forward_hook(functools.partial(self.keep_as, "a"))
        elif how == "kwargs":
            self.body[0].register_forward_hook(self.keep_with, with_kwargs=True, always_call=True)
        self.body.register_forward_pre_hook(self.double)
        self.body.register_forward_pre_hook(self.plus, with_kwargs=True, prepend=True)

    def keep(self, module, args, out):
        self.seen["a"] = out

    def keep_as(self, name, module, args, out):
        self.seen[name] = out

    def keep_with(self, module, args, kwargs, out):
        assert kwargs == {}
        self.seen["a"] = out

    def double(self, module, args):
        return (args[0] * 2,)

    def plus(self, module, args, kwargs):
        return (args[0] + 1,), kwargs

    def forward(self, x):
        self.seen.clear()
        self.body(x)
        return self.out(self.seen["a"] * 3)


@pytest.mark.parametrize("how", ["method", "partial", "kwargs"])
def test_hooks_that_are_methods_of_the_module_compute_in_the_copy(how, x):
    module = Watches(how).eval()
    with torch.no_grad():
        want = module.body[0]((x + 1) * 2) * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = LossNet.from_module(module, ["out", "body.0"])
    module.seen = None  # a hook that is bound to the module itself would fail
    with torch.no_grad():
        for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            got = other.features(x, ["out"])["out"]
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(other.features(x, ["body.0"])["body.0"] * 3, want)
        double = net.features(x.double(), ["out"])["out"]
        torch.testing.assert_close(double.float(), want)


def test_taps_replace_no_hooks_in_a_process_that_counts_them_anew(x, monkeypatch):
    module = Watches("method").eval()
    (key,) = module.body[0]._forward_hooks
    net = pickle.loads(pickle.dumps(LossNet.from_module(module, ["body.0", "out"])))
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", key)
    got = net.features(x, ["body.0", "out"])
    torch.testing.assert_close(got["out"], got["body.0"] * 3)
    torch.testing.assert_close(got["out"], module.body[0]((x + 1) * 2) * 3)


class HomeMade:
    """A weight made before each call, as torch.nn.utils does."""

    def __call__(self, module, args):
        module.weight = module.raw / module.raw.norm()


def home_made():
    module = chain()
    conv = module[0]
    conv.raw = nn.Parameter(conv.weight.detach())
    del conv.weight
    conv.weight = conv.raw.detach()
    conv.register_forward_pre_hook(HomeMade())
    return module


def hooked(register, hook):
    module = chain()
    getattr(module[0], register)(hook)
    return module


OTHER_HOOKS = {
    "forward": lambda: hooked("register_forward_hook", lambda m, a, out: out * 5),
    "pre": lambda: hooked("register_forward_pre_hook", lambda m, a: (a[0] * 5,)),
    "home-made weight": home_made,
    "method of a stranger": lambda: hooked("register_forward_hook", Watches("method").keep),
}


@pytest.mark.parametrize("kind", OTHER_HOOKS)
def test_hooks_that_are_left_out_are_named(kind):
    module = OTHER_HOOKS[kind]()
    module.register_forward_hook(lambda *a: None)
    with pytest.warns(UserWarning, match="from_module") as caught:
        LossNet.from_module(module, ["0"])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for words in ("['the module', '0']", "move what computes into forward", "only watch"):
        assert words in str(caught[0].message)


class Fivefold(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 5


def test_the_advice_of_from_sequential_leads_to_the_same_values(x):
    module = OTHER_HOOKS["forward"]()
    with torch.no_grad():
        want = module(x)
    with pytest.raises(ValueError, match=r"only watch.*into a forward, for LossNet\.from_module"):
        LossNet.from_sequential(module)
    moved = Fivefold(3, 4, 3, padding=1)
    moved.load_state_dict(module[0].state_dict())
    module[0] = moved
    with pytest.raises(ValueError, match="from_module"):
        LossNet.from_sequential(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(features(module, x, "2"), want)


# ----------------------------------------------------------------------------------- stopped passes


class Switches(nn.Module):
    """Switches gradients and autocast by hand, around a part that may be tapped, or may fail."""

    def __init__(self):
        super().__init__()
        self.first, self.inside = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.first(x)
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        if x.shape[2] == 7:
            raise RuntimeError("boo")
        mean = self.inside(x).mean()
        torch.set_autocast_enabled("cpu", False)
        torch.set_grad_enabled(True)
        return x - mean


def test_modes_are_the_callers_after_a_stop(x):
    module = Switches()
    net = LossNet.from_module(module, ["inside", "first"])
    with torch.no_grad():
        net.features(x, ["inside"])
        assert not torch.is_grad_enabled()
    net.features(x, ["inside"])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError, match="boo"):
        net.features(x[:, :, :7], ["inside"])
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_modes_are_the_callers_after_a_stop_in_a_graph(x):
    class GradientsOff(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            out = self.conv(x)
            torch.set_grad_enabled(False)
            return self.conv(out)

    loss = level_loss(GradientsOff(), "conv")
    want = loss(x, x.flip(0))
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, x.flip(0))
    assert torch.is_grad_enabled()
    torch.testing.assert_close(got, want)


class UNet(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.up = nn.Conv2d(8, 4, 1)
        self.skips, self.constants = make(), [2.0]

    def forward(self, x):
        x = self.down(x)
        if isinstance(self.skips, dict):
            self.skips[len(self.skips)] = x
        else:
            (self.skips.add if isinstance(self.skips, set) else self.skips.append)(x)
        x = self.middle(x) * self.constants[0]
        skip = self.skips.popitem()[1] if isinstance(self.skips, dict) else self.skips.pop()
        return self.up(torch.cat([x, skip], 1))


@pytest.mark.parametrize("make", [list, dict, set, deque, OrderedDict])
def test_what_a_stopped_pass_has_kept_is_let_go(make, x):
    module = UNet(make)
    with torch.no_grad():
        middle, out = module.middle(module.down(x)), module(x)
    net = LossNet.from_module(module, ["middle", "up"])
    for taps in (["middle"], ["middle"], ["up"], ["middle", "up"]):
        got = net.features(x.clone().requires_grad_(), taps)
        want = {"middle": middle, "up": out}
        for name in taps:
            torch.testing.assert_close(got[name].detach(), want[name])
        (running,) = vars(net._cast_modules).values()
        assert not running.module.skips
        assert running.module.constants == [2.0]


def test_what_a_stopped_pass_has_kept_is_let_go_in_a_graph(x):
    loss = level_loss(UNet(list), "middle")
    graphs = []
    run = torch.compile(loss, fullgraph=True, backend=lambda gm, _: graphs.append(gm) or gm)
    for _ in range(3):
        torch.testing.assert_close(run(x, x.flip(0)), loss(x, x.flip(0)))
    assert len(graphs) == 1
    (running,) = vars(loss.net._cast_modules).values()
    assert not running.module.skips


STORED, STOPPED = threading.Event(), threading.Event()


class Remembers(nn.Module):
    """A dict that is filled once and read by every thread."""

    def __init__(self):
        super().__init__()
        self.conv, self.factors = nn.Conv2d(3, 3, 1), {}

    def forward(self, x):
        if x.shape[0] not in self.factors:
            self.factors[x.shape[0]] = 3.0
        if x.shape[0] == 1:
            STORED.set()
            assert STOPPED.wait(20)
        return self.conv(x * self.factors[x.shape[0]])


def test_a_stop_takes_nothing_from_another_thread(x):
    module = Remembers()
    net = LossNet.from_module(module, ["conv"])
    net.features(x, ["conv"])  # makes the copy
    got = []
    thread = threading.Thread(target=lambda: got.append(net.features(x[:1], ["conv"])["conv"]))
    thread.start()
    assert STORED.wait(20)
    net.features(x, ["conv"])
    STOPPED.set()
    thread.join()
    torch.testing.assert_close(got[0], module.conv(x[:1] * 3))


# --------------------------------------------------------------------------------------- gradients


class Off(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.conv, self.how, self.out = nn.Conv2d(3, 3, 1), how, nn.Identity()
        self.constant = nn.Parameter(torch.rand(1, 3, 8, 8))

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.out(self.conv(x))
        if self.how == "inference_mode":
            with torch.inference_mode():
                return self.out(self.conv(x))
        if self.how == "detach":
            return self.out(self.conv(x).detach())
        if self.how == "checkpoint":
            return checkpoint(lambda z: self.out(self.conv(z)), x, use_reentrant=True)
        if self.how == "integers":
            return self.out(self.conv(x).sign().argmax(1, keepdim=True).float())
        return self.out(self.constant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "how", ["no_grad", "inference_mode", "detach", "checkpoint", "integers", "constant"]
)
def test_a_tap_without_a_gradient_is_named(how, x):
    loss = level_loss(Off(how), "out")
    words = r"tap 'out' \(out\): got an output without a gradient.*no_grad.*use_reentrant=False"
    with pytest.raises(ValueError, match=words):
        loss(x.clone().requires_grad_(), x)
    loss(x, x)  # nothing asks for a gradient
    loss.encode(x.clone().requires_grad_())
    with torch.no_grad():
        loss(x.clone().requires_grad_(), x)
    with torch.inference_mode():
        loss(x, x)


def test_taps_with_a_gradient_pass_in_graphs_and_checkpoints(x):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return checkpoint(lambda z: self.conv(z), x, use_reentrant=False)

    for module in (Checkpointed(), chain()):
        loss = level_loss(module, "conv" if isinstance(module, Checkpointed) else "2")
        a, b = (x.clone().requires_grad_() for _ in range(2))
        loss(a, x.flip(0)).backward()
        torch.compile(loss, backend="aot_eager")(b, x.flip(0)).backward()
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(torch.func.grad(loss)(x, x.flip(0)), a.grad)  # of the chain


# ------------------------------------------------------------------------------- complex and others


class Fourier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Identity()
        self.filter = nn.Parameter(torch.randn(4, 8, 5, dtype=torch.complex64))
        self.register_buffer("shift", torch.randn(4, 1, 1, dtype=torch.complex64))

    def forward(self, x):
        e = torch.fft.rfft2(self.conv(x)) * self.filter + self.shift
        return self.out(torch.fft.irfft2(e, s=x.shape[2:]))


@pytest.mark.filterwarnings("error")
def test_complex_weights_keep_their_imaginary_part(x):
    torch.manual_seed(3)
    module = Fourier()
    wide = copy.deepcopy(module)
    wide.conv.double()
    wide.filter.data = wide.filter.data.to(torch.complex128)
    wide.shift = wide.shift.to(torch.complex128)
    with torch.no_grad():
        want = wide(x.double())
    torch.testing.assert_close(features(module, x.double(), "out"), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(features(module, x, "out").double(), want, rtol=1e-4, atol=1e-5)


def test_what_a_pass_has_left_in_containers_is_copied(x):
    module = chain()
    out = module[0](x)
    module.left = {"a": [out, (out * 2,)]}
    module.left["self"] = module.left  # a circle
    module.register_buffer("last", out.mean(), persistent=False)
    net = LossNet.from_module(module, ["2"])
    assert torch.equal(net.features(x, ["2"])["2"], module(x))
    assert torch.equal(net._module.left["a"][1][0], (out * 2).detach())


def test_what_cannot_be_copied_is_said():
    class Holder:
        pass

    module = chain()
    module.held = Holder()
    module.held.out = module[0](torch.rand(1, 3, 4, 4))
    for held in (module.held, threading.Lock()):
        module.held = held
        with pytest.raises(ValueError, match=r"got a Sequential that .*remove the attribute"):
            LossNet.from_module(module, ["2"])


# ------------------------------------------------------------------------------------ fingerprints


def filled(inplace):
    """A module whose numbers no generator draws."""
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace),
        nn.Sequential(nn.Dropout(0.25, inplace=inplace), nn.LeakyReLU(0.1, inplace=inplace)),
    )  # fmt: skip
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p) / 64)
    return module


def test_fingerprints_of_modules_stay():
    """Files of features hold them: these are of the first version that had `from_module`."""
    for inplace in (False, True):
        net = LossNet.from_module(filled(inplace), {"a": "2", "b": "3"})
        assert net.fingerprint() == (
            "ea27f49d465481defe3aaa9f3caf6e4b24b24bcefca87f879aa7948bcec80a38"
        )
        assert all(m.inplace == inplace for m in net._module.modules() if hasattr(m, "inplace"))


class Scaled(nn.Module):
    def __init__(self, *factors):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        nn.init.ones_(self.conv.weight)
        nn.init.ones_(self.conv.bias)
        self.hold(*(torch.full((1,), factor) for factor in factors))

    def hold(self, factor):
        self.factor = factor

    def forward(self, x):
        return self.conv(x)


class InLists(Scaled):
    def hold(self, a, b):
        self.factors = [a, {"b": (b,)}]


@pytest.mark.parametrize(("kind", "one", "other"), [
    (Scaled, (1.0,), (2.0,)), (InLists, (1.0, 2.0), (2.0, 2.0)), (InLists, (1.0, 2.0), (1.0, 1.0)),
])  # fmt: skip
def test_tensors_that_are_plain_attributes_count(kind, one, other):
    a, b, c = (LossNet.from_module(kind(*k), [""]).fingerprint() for k in (one, one, other))
    assert a == b != c


def test_parameters_in_plain_lists_count_once():
    """As those of nn.LSTM, whose fingerprint they would change."""
    plain, listed = chain(), chain()
    listed.all = [listed[0].weight, *listed.buffers()]
    a, b = (LossNet.from_module(m, ["2"]).fingerprint() for m in (plain, listed))
    assert a == b


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_made_before_each_call_do_not_count():
    def network(factor):
        module = chain()
        nn.utils.weight_norm(module[0])
        with torch.no_grad():
            module[0].weight_g.mul_(factor)
            module(torch.rand(1, 3, 4, 4))  # leaves a weight
            module[0].weight_g.fill_(1)
        return LossNet.from_module(module, ["2"])

    assert network(1).fingerprint() == network(2).fingerprint()


class Shows(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), lambda x: x
        nn.init.ones_(self.conv.weight)
        nn.init.ones_(self.conv.bias)

    def forward(self, x):
        return self.function(self.conv(x))

    def extra_repr(self):
        return repr(self.function)


def test_addresses_do_not_count():
    modules = [Shows() for _ in range(2)]
    assert repr(modules[0]) != repr(modules[1])
    a, b = (LossNet.from_module(m, [""]) for m in modules)
    assert a.fingerprint() == b.fingerprint()


BUFFERS = {
    "sparse": lambda k: (k * torch.eye(3)).to_sparse(),
    "quantised": lambda k: torch.quantize_per_tensor(k * torch.eye(3), 0.5, 0, torch.qint8),
    "conjugate": lambda k: (torch.ones(3) + 1j * k).conj(),
    "empty": lambda k: torch.zeros(k, 0),
    "number": lambda k: torch.tensor(k),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_any_layout_have_fingerprints(kind, x):
    def network(k):
        module = chain()
        module.register_buffer("extra", BUFFERS[kind](k))
        return LossNet.from_module(module, ["2"])

    a, b, c = (network(k) for k in (1, 1, 2))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert a.fingerprint()[:12] in repr(a)
    assert torch.equal(a.features(x, ["2"])["2"], chain()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_weights_that_are_packed_away_count():
    def network(value):
        conv = torch.ao.nn.quantized.Conv2d(3, 4, 1)
        weight = torch.full((4, 3, 1, 1), value)
        conv.set_weight_bias(torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), None)
        return LossNet.from_module(nn.Sequential(conv), ["0"], in_channels=3)

    a, b, c = (network(value).fingerprint() for value in (1.0, 1.0, 2.0))
    assert a == b != c


class MadeAnew(nn.Module):
    """Its copies are in training mode, as those of torchvision's feature extractors are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))

    def __deepcopy__(self, memo):
        new = MadeAnew()
        new.load_state_dict(self.state_dict())
        return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_that_train_are_in_eval_mode(dtype, x):
    module = MadeAnew()
    module(x.float())  # running statistics of its own
    expected = copy.deepcopy(module).eval().to(dtype)(x.to(dtype))
    torch.testing.assert_close(features(module, x.to(dtype), "norm"), expected)
