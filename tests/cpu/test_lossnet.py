"""The frozen network: names, weights that are the same everywhere, other people's nets, files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import NARROW
from safetensors.torch import load_file, save_file
from torch import nn

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
# The default net for 19 classes. A change of this constant makes every stored TargetFeatures
# useless: it needs an entry in the changelog.
DEFAULT = "a6a538447155ad98af414e0c05c32e9cb34de1151870ad0c8246d7b3ab880c7b"
STRUCTURES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
    "1,1,1,1,1": (1, 1, 1, 1, 1),
    "3,3,4,4,4": (3, 3, 4, 4, 4),
    "2": (2,),
}
REFUSED = {  # a layer that a chain cannot hold, and why
    "stride": nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "no padding": nn.Conv2d(4, 4, 3),
    "even kernel": nn.Conv2d(4, 4, 2, padding=1),
    "dilation": nn.Conv2d(4, 4, 3, padding=1, dilation=2),
    "groups": nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "oblong kernel": nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    "channels": nn.Conv2d(5, 4, 1),
    "pool of 3": nn.MaxPool2d(3, 2),
    "overlapping pool": nn.MaxPool2d(2, 1),
    "ceil": nn.MaxPool2d(2, ceil_mode=True),
    "padded pool": nn.AvgPool2d(2, padding=1),
    "norm": nn.GroupNorm(2, 4),
    "strided pool": nn.MaxPool2d(3, 2, 1),
    "linear": nn.Linear(4, 4),
}


def features_of(net, x):
    return net.features(net.network_input(x, None), net.layer_names)


def same_net(a, b, channels=3):
    x = torch.rand(1, channels, 16, 16)
    fa, fb = features_of(a, x), features_of(b, x)
    assert list(fa) == list(fb)
    assert all(torch.equal(fa[k], fb[k]) for k in fa)
    assert a.fingerprint() == b.fingerprint()


def chain():
    """Like torchvision's VGG .features: biases, in-place ReLUs, a rest after the last pool."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AvgPool2d(2, 2),
        nn.Conv2d(5, 3, 5, padding=2), nn.ReLU(),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_names_and_levels(structure, pool):
    blocks = STRUCTURES[structure]
    net = GenericPerceptualLoss(2, structure, widths=NARROW, pool=pool).net
    down = "down" if pool == "stride" else "pool"
    names = []
    for b, count in enumerate(blocks, start=1):
        for i in range(1, count + 1):
            names += [f"conv{b}_{i}", f"relu{b}_{i}"]
        names.append(f"{down}{b}")
    assert net.layer_names == tuple(names)
    assert net.levels == tuple(f"{down}{b}" for b in range(1, len(blocks) + 1))
    with_weights = [n for n in names if n.startswith(("conv", "down"))]
    assert list(net.weights) == with_weights
    assert all(w.dtype == torch.float32 for w in net.weights.values())
    assert net.weights["conv1_1"].shape == (NARROW[0], 2, 3, 3)


def test_default_widths_are_the_papers():
    shapes = LossNet.vgg(150).shapes(512, 512)
    assert [shapes[f"pool{b}"] for b in range(1, 6)] == [
        (64, 256, 256), (128, 128, 128), (256, 64, 64), (512, 32, 32), (512, 16, 16)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 0}, {"in_channels": 2.0}, {"blocks": ()}, {"blocks": (1, 0)},
        {"widths": (4,), "blocks": (1, 1)}, {"widths": (4, 4)},
        {"widths": (4, 4, 4, 4, 0)}, {"kernel_size": 2},
        {"kernel_size": 9}, {"pool": "mean"}, {"init": "kaiming"}, {"init": "normal"},
        {"init": ("he", 1.0)}, {"init": ("normal", 0.0)}, {"init": ("uniform", float("nan"))},
    ],
    ids=str,
)  # fmt: skip
def test_unknown_structures_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name}: got .*expected"):
        LossNet.vgg(**{"in_channels": 3, **options})


@pytest.mark.parametrize("text", ["vgg12", "", "1,,1", "1,0", "-1", "1;1"])
def test_unknown_net_names_list_the_known_ones(text):
    with pytest.raises(ValueError, match=r"net: got .*'vgg11'.*'1,1,1,1,1'"):
        GenericPerceptualLoss(3, text)


def test_inputs_smaller_than_the_down_sampling():
    net = LossNet.vgg(1, widths=NARROW)
    assert net.shapes(32, 63)["pool5"] == (9, 1, 1)
    with pytest.raises(ValueError, match="got 31 x 64, expected at least 32 x 32"):
        net.shapes(31, 64)
    with pytest.raises(ValueError, match="expected at least 32 x 32"):
        GenericPerceptualLoss(3)(torch.rand(1, 3, 40, 31), torch.zeros(1, 40, 31).long())


# ------------------------------------------------------------------------------------------ weights


def test_fingerprint_of_the_default_net():
    assert LossNet.vgg(19).fingerprint() == DEFAULT
    assert GenericPerceptualLoss(19).fingerprint() == DEFAULT


DIGEST = """
import hashlib, torch
from gpl_fast import LossNet
strided = LossNet.vgg(19, pool="stride", seed=3, init="xavier_normal")
nets = [strided.with_input_adapter(150, seed=5),
        LossNet.vgg(2, (2, 1), init=("uniform", 0.1)), LossNet.vgg(19)]
digest = hashlib.sha256()
for net in nets:
    for w in net.weights.values():
        digest.update(w.numpy().tobytes())
result = [digest.hexdigest(), *(net.fingerprint() for net in nets)]
"""


@pytest.mark.parametrize("capability", ["default", None], ids=["scalar code", "this machine's"])
def test_weights_are_the_same_in_another_process(capability):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    if capability:
        env["ATEN_CPU_CAPABILITY"] = capability
    code = [sys.executable, "-c", DIGEST + "print(*result)"]
    other = subprocess.run(code, env=env, capture_output=True, text=True, check=True)
    here: dict = {}
    exec(DIGEST, here)
    assert other.stdout.split() == here["result"]
    assert here["result"][-1] == DEFAULT


def test_the_global_generator_is_neither_read_nor_advanced():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = LossNet.vgg(3, (1, 1), NARROW).with_input_adapter(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    same_net(a, LossNet.vgg(3, (1, 1), NARROW).with_input_adapter(5), channels=5)


def test_fingerprint_tells_nets_apart():
    base = {"in_channels": 3, "blocks": (1, 2), "widths": (4, 4)}
    others = [{}, {"seed": 1}, {"pool": "avg"}, {"pool": "stride"}, {"kernel_size": 1},
              {"blocks": (2, 1)}, {"widths": (4, 5)}, {"in_channels": 4},
              {"init": ("normal", 0.1)}]  # fmt: skip
    nets = [LossNet.vgg(**{**base, **other}) for other in others]
    plain = chain()
    nets += [
        nets[0].with_input_adapter(5),
        nets[0].with_input_adapter(5, seed=1),
        LossNet.from_sequential(plain),
        LossNet.from_sequential(plain, mean=[0.5] * 3, std=[1.0] * 3),
        LossNet.from_sequential(plain, mean=[0.5] * 3, std=[2.0] * 3),
        LossNet.from_module(plain, ["1"]),
        LossNet.from_module(plain, ["3"]),
    ]
    assert len({net.fingerprint() for net in nets}) == len(nets)


@pytest.mark.parametrize(
    ("init", "std"),
    [
        ("he", (2 / (9 * 96)) ** 0.5),
        ("xavier_normal", (2 / (9 * 96 + 9 * 128)) ** 0.5),
        (("normal", 1.0), 1.0),
        (("normal", 0.01), 0.01),
        (("uniform", 0.1), 0.1 / 3**0.5),
    ],
    ids=str,
)
def test_statistics_of_the_initialisations(init, std):
    w = LossNet.vgg(3, (1, 1), (96, 128), init=init).weights["conv2_1"]  # 110592 numbers
    assert w.std().item() == pytest.approx(std, rel=0.015)
    assert abs(w.mean().item()) < 0.015 * std
    if init[0] == "uniform":
        assert w.abs().max() <= 0.1
    else:
        assert 4 * std < w.abs().max() < 6 * std


@pytest.mark.parametrize(
    ("init", "low", "high"),
    [("he", 0.5, 2.0), (("normal", 1.0), 1e20, float("inf")), (("normal", 0.01), 0, 1e-10)],
    ids=str,
)
def test_only_he_keeps_features_alive_over_16_convolutions(init, low, high):
    """The second moment of what enters a convolution, after 16 of them without pooling."""
    ratios = []
    for seed in range(4):
        net = LossNet.vgg(128, (16,), (128,), kernel_size=1, init=init, seed=seed)  # no border
        e = net.features(torch.randn(1, 128, 12, 12, dtype=torch.float64).relu(), ["relu1_16"])
        ratios.append(e["relu1_16"].square().mean() / 0.5)
    assert low <= torch.stack(ratios).mean() <= high


def test_weights_are_copies():
    net = LossNet.vgg(2, (1,), NARROW)
    before = net.fingerprint()
    for w in net.weights.values():
        w.zero_()
    net.weights.clear()
    assert net.weights["conv1_1"].any()
    same_net(net, LossNet.vgg(2, (1,), NARROW), channels=2)
    assert net.fingerprint() == before
    source = chain()
    net = LossNet.from_sequential(source)
    source[0].weight.data.zero_()
    source[0].bias.data.fill_(7)
    assert net.weights["conv1_1"].any()
    assert not (net.weights["conv1_1.bias"] == 7).any()
    assert not any(w.requires_grad for w in net.weights.values())


def test_losses_hold_no_parameters_and_no_buffers():
    for loss in (
        GenericPerceptualLoss(3),
        PerceptualLoss(LossNet.from_module(chain(), ["8"]), {"8": 1}),
    ):
        assert not loss.state_dict()
        assert not list(loss.parameters())
        assert not list(loss.buffers())


# ------------------------------------------------------------------------------ other people's nets


def test_from_sequential_is_the_module_bit_for_bit():
    module = chain()
    net = LossNet.from_sequential(module)
    names = ("conv1_1", "relu1_1", "conv1_2", "relu1_2", "pool1", "conv2_1", "relu2_1", "pool2",
             "conv3_1", "relu3_1")  # fmt: skip
    assert net.layer_names == names
    assert net.levels == ("pool1", "pool2", "relu3_1")
    assert [n for n in net.weights if n.endswith(".bias")] == [
        "conv1_1.bias", "conv2_1.bias", "conv3_1.bias"
    ]  # fmt: skip
    x = torch.rand(2, 3, 13, 14)
    got = features_of(net, x)
    with torch.no_grad():
        assert torch.equal(got["relu3_1"], module(x))
        assert torch.equal(got["pool1"], module[:4](x))
        assert torch.equal(got["conv2_1"], module[:5](x))
    assert {k: tuple(e.shape[1:]) for k, e in got.items()} == net.shapes(13, 14)
    GenericPerceptualLoss(3, net, level_weights=(1, 2, 3))
    with pytest.raises(ValueError, match="level_weights: got 2 values, expected 3"):
        GenericPerceptualLoss(3, net, level_weights=(1, 2))


def test_mean_and_std_act_before_the_first_padding():
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net = LossNet.from_sequential(module, mean=mean, std=std)
    x = torch.rand(1, 3, 5, 6)
    normal = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(features_of(net, x)["conv1_1"], module(normal).detach())


@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.5] * 3, None), (None, [1.0] * 3), ([0.5] * 3, [1.0] * 2), ([0.5] * 3, [0.0] * 3),
     ([0.5] * 2, [1.0] * 2)],
)  # fmt: skip
def test_half_a_normalisation_is_refused(mean, std):
    with pytest.raises(ValueError, match="mean, std: got"):
        LossNet.from_sequential(chain(), mean=mean, std=std)


@pytest.mark.parametrize("why", REFUSED)
def test_layers_that_a_chain_cannot_hold(why):
    for position, before in ((1, []), (2, [nn.ReLU()])):
        module = nn.Sequential(nn.Conv2d(3, 4, 1), *before, REFUSED[why])
        with pytest.raises(ValueError, match=rf"at position {position}.*LossNet.from_module"):
            LossNet.from_sequential(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(),
        nn.Sequential(nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.ReLU()),
    ],
)
def test_chains_that_are_none(module):
    with pytest.raises(ValueError, match="from_sequential"):
        LossNet.from_sequential(module)


def test_from_sequential_and_from_module_take_modules():
    with pytest.raises(TypeError, match=r"from_sequential: got Conv2d.*from_module"):
        LossNet.from_sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="from_module: got str"):
        LossNet.from_module("resnet", ["x"])


class Residual(nn.Module):
    """Not a chain: batch norm, a skip, in-place ReLUs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.head((x + self.body(x)).mean(dim=(2, 3)))


TAPS = [{"low": "stem", "high": "body"}, ["stem", "body"], ("stem", "body")]


@pytest.mark.parametrize("taps", TAPS, ids=str)
def test_from_module_with_taps(taps):
    module = Residual().train()
    module.stem[1].running_mean.fill_(0.3)
    net = LossNet.from_module(module, taps)
    names = tuple(taps)
    assert net.layer_names == net.levels == names
    assert not net.is_chain
    assert net.in_channels == 3
    assert module.training
    x = torch.rand(2, 3, 8, 10)
    module.eval()
    low = module.stem(x)  # before the in-place ReLU that follows
    high = module.body(torch.relu(low))
    got = net.features(x, names)
    assert torch.equal(got[names[0]], low)
    assert torch.equal(got[names[1]], high)
    loss = GenericPerceptualLoss(3, net, level_weights=(1, 0.5), activation="none")
    pred = torch.rand(2, 3, 8, 10, requires_grad=True)
    value = loss(pred, x)
    value.backward()
    expected = sum(
        w * nn.functional.mse_loss(a, b)
        for w, a, b in zip((1, 0.5), net.features(pred, names).values(), got.values(), strict=True)
    )
    torch.testing.assert_close(value, expected)
    assert pred.grad.any()
    assert module.stem[0].weight.grad is None


def test_from_module_never_writes_to_its_input():
    net = LossNet.from_module(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 3, 1)), ["1"])
    x = -torch.rand(1, 2, 4, 4)
    PerceptualLoss(net, {"1": 1.0})(x, x + 1)
    assert (x < 0).all()


def test_from_module_errors():
    with pytest.raises(ValueError, match=r"taps: got \['nowhere'\]"):
        LossNet.from_module(Residual(), ["body", "nowhere"])
    with pytest.raises(ValueError, match="taps: got none"):
        LossNet.from_module(Residual(), [])
    with pytest.raises(ValueError, match="in_channels"):
        LossNet.from_module(nn.Sequential(nn.ReLU()), ["0"])
    assert LossNet.from_module(nn.Sequential(nn.ReLU()), ["0"], in_channels=7).in_channels == 7
    net = LossNet.from_module(Residual(), ["head"])
    with pytest.raises(ValueError, match=r"tap 'head'.*expected one \(N, C, H, W\)"):
        net.features(torch.rand(1, 3, 8, 8), ["head"])
    with pytest.raises(ValueError, match="from_module"):
        net.save("unused.safetensors")


def test_input_adapter():
    inner = LossNet.from_sequential(chain(), mean=[0.5] * 3, std=[0.2] * 3)
    net = inner.with_input_adapter(150, seed=1)
    assert (net.in_channels, inner.in_channels) == (150, 3)
    w = net.weights["adapter"]
    assert w.shape == (3, 150, 1, 1)
    assert w.std().item() == pytest.approx((2 / 150) ** 0.5, rel=0.1)
    assert "adapter" not in inner.weights
    x = torch.rand(1, 150, 8, 9)
    got = features_of(net, x)["pool1"]
    assert torch.equal(got, features_of(inner, nn.functional.conv2d(x, w))["pool1"])
    assert GenericPerceptualLoss(150, net)(x, x) == 0
    with pytest.raises(ValueError, match="adapter already"):
        net.with_input_adapter(4)
    with pytest.raises(ValueError, match="in_channels: got 0"):
        inner.with_input_adapter(0)
    with pytest.raises(ValueError, match=r"with_input_adapter\(150\)"):
        GenericPerceptualLoss(150, inner)
    module = LossNet.from_module(Residual(), ["body"]).with_input_adapter(5)
    assert module.features(module.network_input(torch.rand(1, 5, 8, 8), None), ["body"])


def test_a_net_given_fixes_its_own_options():
    with pytest.raises(ValueError, match=r"kernel_size, seed: fixed by the LossNet"):
        GenericPerceptualLoss(3, LossNet.vgg(3, (1,)), kernel_size=5, seed=2)
    with pytest.raises(TypeError, match="net: got int"):
        GenericPerceptualLoss(3, 5)


# -------------------------------------------------------------------------------------------- files


def nets():
    yield LossNet.vgg(3, (1, 2), NARROW, pool="stride", seed=4)
    yield LossNet.from_sequential(chain(), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    yield LossNet.from_sequential(chain(), mean=[0.1], std=[1.5]).with_input_adapter(4)


@pytest.mark.parametrize("net", [*nets()], ids=["vgg", "sequential", "adapter"])
def test_save_and_load(net, tmp_path):
    net.save(tmp_path / "net.safetensors")
    loaded = LossNet.load(tmp_path / "net.safetensors")
    same_net(net, loaded, net.in_channels)
    assert (loaded.mean, loaded.std, loaded.levels) == (net.mean, net.std, net.levels)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    LossNet.from_sequential(chain()).save(path)
    return path


def rewrite(path, edit):
    """Edit the tensors and the structure of a saved net in place."""
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    tensors = load_file(path)
    structure = json.loads(header["__metadata__"]["gpl_fast.lossnet"])
    edit(tensors, structure)
    save_file(tensors, path, metadata={"gpl_fast.lossnet": json.dumps(structure)})


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not safetensors or is truncated"):
        LossNet.load(saved)


def test_a_foreign_safetensors_file(saved):
    save_file({"conv1_1": torch.rand(4, 3, 3, 3)}, saved)
    with pytest.raises(ValueError, match="foreign safetensors"):
        LossNet.load(saved)


class Explosive:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "unpickled"))


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_pickles_are_never_read(saved, write, tmp_path):
    write({"conv1_1": Explosive(tmp_path / "trace")}, saved)
    with pytest.raises(ValueError, match="pickles are never read"):
        LossNet.load(saved)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, s: t.update(conv1_1=torch.rand(4, 3, 5, 5)), "conv1_1: got"),
        (lambda t, s: t.update(conv1_1=t["conv1_1"].half()), "float16, expected"),
        (lambda t, s: t.update({"conv1_1.bias": torch.rand(5)}), r"conv1_1.bias: got \(5,\)"),
        (lambda t, s: t.pop("conv2_1"), r"\['conv2_1'\] are missing"),
        (lambda t, s: t.update(conv9_9=torch.rand(1)), "'conv9_9' that no layer has"),
        (lambda t, s: t.update(adapter=torch.rand(2, 5, 1, 1)), "adapter: got"),
        (lambda t, s: t.update(adapter=torch.rand(3)), "adapter: got"),
        (lambda t, s: s.pop("layers"), "malformed"),
        (lambda t, s: s["layers"].clear(), "empty chain"),
        (lambda t, s: s["layers"][0].pop("kind"), "malformed"),
        (lambda t, s: s.update(mean=[0.5]), "mean, std"),
        (lambda t, s: s.update(mean=5, std=5), "malformed"),
        (lambda t, s: s["layers"][1].update(kind="gelu"), "malformed"),
        (lambda t, s: s["layers"][2].update(in_channels=9), "got|malformed"),
    ],
)
def test_files_of_another_shape(saved, edit, message):
    rewrite(saved, edit)
    with pytest.raises(ValueError, match=message):
        LossNet.load(saved)


# ------------------------------------------------------------------------------ copies and contexts


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("net", [*nets(), LossNet.from_module(Residual(), ["body"])],
                         ids=["vgg", "sequential", "adapter", "module"])  # fmt: skip
def test_copies_compute_the_same(net, clone):
    x = torch.rand(1, net.in_channels, 16, 16)
    before = features_of(net, x)
    assert net.cached_tensors()
    other = clone(net)
    assert net.is_chain or not other.cached_tensors()
    after = features_of(other, x)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert other.fingerprint() == net.fingerprint()
    loss = clone(GenericPerceptualLoss(net.in_channels, net))
    assert loss(x, x) == 0


def test_casts_are_made_once():
    net = LossNet.vgg(2, (1,), NARROW)
    device = torch.device("cpu")
    a, b = (net.weights_on(device, torch.bfloat16)["conv1_1"] for _ in range(2))
    assert a is b
    assert a.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_sum_of_a_kernels_taps(dtype):
    net = LossNet.vgg(19, (1, 1), (32, 16))
    device = torch.device("cpu")
    exact, short = (net.weights_on(device, d) for d in (torch.float32, dtype))
    for name, w in exact.items():
        got = short[name]
        assert got.dtype == dtype
        one_error = torch.finfo(dtype).eps * (w.abs().amax(dim=(2, 3)) + 1e-4)
        assert ((got.double() - w).sum(dim=(2, 3)).abs() <= one_error).all()
        assert ((got.double() - w).abs().amax(dim=(2, 3)) <= 2 * one_error).all()
        plain = (w.to(dtype).double() - w).sum(dim=(2, 3))
        assert (got.double() - w).sum(dim=(2, 3)).norm() < plain.norm() / 2
    pointwise = LossNet.vgg(3, (1,), NARROW).with_input_adapter(40)
    adapter = pointwise.weights_on(device, dtype)["adapter"]
    assert torch.equal(adapter, pointwise.weights["adapter"].to(dtype))


def test_nets_made_and_used_under_inference_mode_train_later():
    with torch.inference_mode():
        made = [LossNet.vgg(3, (1, 1), NARROW), LossNet.from_sequential(chain()),
                LossNet.from_module(Residual(), ["body"]),
                LossNet.vgg(3, (1,), NARROW).with_input_adapter(3)]  # fmt: skip
        losses = [GenericPerceptualLoss(3, net, compute_dtype=torch.bfloat16) for net in made]
        teacher, mask = torch.rand(1, 3, 16, 16), torch.rand(1, 16, 16) < 0.8
        for loss in losses:
            loss(teacher, teacher)  # fills the caches
        stored = [loss.encode(teacher, mask) for loss in losses]
    for loss, features in zip(losses, stored, strict=True):
        for target, valid in ((teacher, mask), (features, None)):
            pred = torch.rand(1, 3, 16, 16, requires_grad=True)
            loss(pred, target, valid).backward()
            assert pred.grad.any()
