"""Files of networks: who may read them, paths of every kind, files cut short or made up."""

from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from gpl_fast import LossNet
from gpl_fast.files import read_safetensors, write_safetensors

KEY = "gpl_fast.lossnet"


def network():
    torch.manual_seed(0)
    return LossNet.from_sequential(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 5, padding=2, bias=False), nn.ReLU(), nn.AvgPool2d(2),
        ),
        mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0],
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    network().save(path)
    return path


def contents(path):
    with safe_open(path, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()[KEY])  # noqa: SIM118


# ------------------------------------------------------------------------------- writing and paths


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        for _ in range(2):  # a new file, and one that is written again
            network().save(tmp_path / "net")
            assert (tmp_path / "net").stat().st_mode & 0o777 == 0o666 & ~mask
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == ["net"]


class AsPath:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


@pytest.mark.parametrize("kind", [str, os.fsencode, AsPath])
def test_paths_of_any_kind(tmp_path, kind):
    path = kind(tmp_path / "näme,1.safetensors")
    network().save(path)
    assert LossNet.load(path).fingerprint() == network().fingerprint()


def test_relative_paths_and_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LossNet.vgg(3, (1,), (4,)).save("target")
    os.symlink("target", "link")
    network().save("link")
    assert os.path.islink("link")
    assert LossNet.load("target").fingerprint() == network().fingerprint()


def test_what_is_no_path():
    for call in (network().save, LossNet.load):
        with pytest.raises(TypeError, match="int"):
            call(3)


def test_where_nothing_can_be_written(tmp_path):
    folder = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="create it first") as error:
        network().save(folder / "net")
    assert error.value.filename == str(folder)
    with pytest.raises(OSError, match="no regular file") as error:
        network().save(tmp_path)
    assert error.value.filename == str(tmp_path)


@pytest.mark.parametrize("end", ["/", "//", "/.", "/..", "/./"])
def test_a_path_that_names_a_folder_writes_no_file(tmp_path, end):
    for name in ("new", "there"):
        if name == "there":
            (tmp_path / name).write_text("kept")
        with pytest.raises(OSError, match="names a folder"):
            network().save(f"{tmp_path / name}{end}")
    assert os.listdir(tmp_path) == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_where_nothing_can_be_read(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        LossNet.load(tmp_path / "missing")
    assert error.value.filename == str(tmp_path / "missing")
    with pytest.raises(IsADirectoryError) as error:
        LossNet.load(tmp_path)
    assert error.value.filename == str(tmp_path)


def test_a_file_stays_whole_when_its_successor_fails(saved, monkeypatch):
    def full_disk(_tensors, path, metadata):
        with open(path, "wb") as f:
            f.write(b"half of it")
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        LossNet.vgg(3).save(saved)
    assert LossNet.load(saved).fingerprint() == network().fingerprint()
    assert os.listdir(saved.parent) == [saved.name]


def test_tensors_of_any_layout_and_shared_memory(tmp_path):
    x = torch.rand(2, 3, 4)
    tensors = {"a": x, "b": x, "t": x.transpose(0, 2), "row": x[1], "one": x[0, 0].expand(5, 4),
               "g": x.clone().requires_grad_(), "n": x[:0], "m": x > 0.5}  # fmt: skip
    write_safetensors(tmp_path / "f", tensors, "key", {"n": [1, None, "é"]})
    header, read = read_safetensors(tmp_path / "f", "key", "this test")
    assert header == {"n": [1, None, "é"]}
    assert set(read) == set(tensors)
    for name, t in tensors.items():
        assert torch.equal(read[name], t)
        assert read[name].dtype == t.dtype


def test_what_is_read_owns_its_memory(tmp_path):
    path = tmp_path / "f"
    write_safetensors(path, {"a": torch.ones(1000), "m": torch.ones(9) > 0}, "key", {})
    with torch.inference_mode():
        read = read_safetensors(path, "key", "this test")[1]
    with open(path, "r+b") as f:
        size = os.path.getsize(path)
        f.write(b"\x00" * size)
    assert (read["a"] == 1).all()
    assert read["m"].all()
    assert not any(t.is_inference() for t in read.values())
    assert read["a"].untyped_storage().nbytes() == 4000


def test_bools_are_0_and_1_whatever_a_file_holds(tmp_path):
    header = {"m": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
              "__metadata__": {"key": "{}"}}  # fmt: skip
    raw(tmp_path / "f", header, b"\x00\x02\xff")
    mask = read_safetensors(tmp_path / "f", "key", "this test")[1]["m"]
    assert mask.view(torch.uint8).tolist() == [0, 1, 1]


# ---------------------------------------------------------------------------------- crafted files


def raw(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def entry(dtype, shape, nbytes):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}


RAW = {
    "empty": b"",
    "no UTF-8": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "huge header": struct.pack("<Q", 2**62) + b"{}",
    "negative header": b"\xff" * 8 + b"{}",
    "header is a list": (b"[" * 50_000, b""),
    "deep header": (b'{"a":' * 50_000, b""),
    "huge shape": (entry("U8", [2**40, 2**40], 1), b"1"),
    "a shape that torch has not": (entry("U8", [0, 2**63], 0), b""),
    "unknown dtype": (entry("F7", [1], 1), b"1"),
    "a dtype that torch has not": (entry("F6_E2M3", [4], 3), b"123"),
    "shape and bytes differ": (entry("F32", [3], 8), b"12345678"),
    "offsets beyond the end": (entry("F32", [2], 8), b"1234"),
}


@pytest.mark.parametrize("kind", RAW)
def test_files_that_are_none(tmp_path, kind):
    path, made = tmp_path / "f", RAW[kind]
    path.write_bytes(made) if isinstance(made, bytes) else raw(path, *made)
    with pytest.raises(ValueError, match="not safetensors or is truncated") as error:
        LossNet.load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value)) < 1000


def test_files_cut_anywhere(saved):
    whole = saved.read_bytes()
    for keep in range(0, len(whole), 97):
        saved.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="truncated"):
            LossNet.load(saved)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "malformed"), ('{"layers":' * 100_000, "malformed"), ("{", "malformed"),
        ("[]", "malformed: got list"), ("3", "malformed: got int"), ("null", "got NoneType"),
        ('{"layers": ' + "9" * 5000 + "}", "malformed"), ("{}", "malformed"),
        ('{"layers": [], "mean": null, "std": null}', "empty chain"),
        ('{"layers": {}, "mean": null, "std": null}', "malformed"),
        ('{"layers": [[]], "mean": null, "std": null}', "malformed"),
        ('{"layers": "conv", "mean": null, "std": null}', "malformed"),
    ],
)  # fmt: skip
def test_structures_that_are_none(saved, text, words):
    tensors, _ = contents(saved)
    save_file(tensors, saved, metadata={KEY: text})
    with pytest.raises(ValueError, match=words) as error:
        LossNet.load(saved)
    assert str(error.value).startswith(f"{saved}: ")


def layer(i, **changes):
    def edit(_tensors, structure):
        structure["layers"][i].update(changes)

    return edit


def kernel(i, size):
    """Of layer i, in the structure and in the weights."""

    def edit(tensors, structure):
        x = structure["layers"][i]
        x["kernel_size"] = size
        tensors[x["name"]] = torch.rand(x["out_channels"], x["in_channels"], size, size)

    return edit


def renamed(old, new):
    def edit(tensors, structure):
        for x in structure["layers"]:
            x["name"] = new if x["name"] == old else x["name"]
        for suffix in ("", ".bias"):
            if old + suffix in tensors:
                tensors[new + suffix] = tensors.pop(old + suffix)

    return edit


def weight(name, value):
    return lambda t, s: t[name].view(-1)[:1].fill_(value)


def normalisation(mean, std):
    return lambda t, s: s.update(mean=mean, std=std)


def moved(i, j):
    return lambda t, s: s["layers"].insert(j, s["layers"].pop(i))


def without(*names):
    def edit(tensors, structure):
        structure["layers"] = [x for x in structure["layers"] if x["name"] not in names]

    return edit


def strided(tensors, structure):
    """A convolution of stride 2 beside a pool."""
    structure["layers"][2].update(name="down1", kind="down", kernel_size=3)
    tensors["down1"] = torch.rand(4, 4, 3, 3)


def down(tensors, structure):
    """With a bias, in a chain without pools."""
    strided(tensors, structure)
    del structure["layers"][5]


CRAFTED = {
    "even kernel": (kernel(0, 2), "odd kernel_size"),
    "kernel of 0": (kernel(0, 0), "integers >= 1"),
    "other kernel": (layer(0, kernel_size=5), "conv1_1: got"),
    "kernel of a pool": (layer(2, kernel_size=3), "got Layer"),
    "kernel as text": (layer(0, kernel_size="3"), "integers >= 1"),
    "kernel as float": (layer(0, kernel_size=3.0), "integers >= 1"),
    "kernel as bool": (kernel(0, True), "integers >= 1"),
    "negative channels": (layer(0, in_channels=-3), "integers >= 1"),
    "huge channels": (layer(0, in_channels=10**40), "conv1_1: got"),
    "channels": (layer(3, in_channels=9), "got Layer"),
    "channels of a relu": (layer(1, out_channels=9), "got Layer"),
    "unknown kind": (layer(1, kind="gelu"), "'gelu'"),
    "kind as a number": (layer(1, kind=1), "after 'conv'"),
    "kind as a list": (layer(1, kind=[]), "after 'conv'"),
    "unknown field": (layer(1, stride=2), "malformed"),
    "comma": (renamed("conv1_1", "conv1_1,relu1_1"), "got Layer"),
    "semicolon": (renamed("conv1_1", "conv;1"), "got Layer"),
    "bias in a name": (renamed("conv1_1", "conv1_1.bias"), "got Layer"),
    "empty name": (renamed("conv1_1", ""), "got Layer"),
    "surrogate": (layer(1, name="\ud800"), "got Layer"),
    "adapter as a name": (renamed("conv1_1", "adapter"), "got Layer"),
    "name as a number": (layer(1, name=7), "got Layer"),
    "twice the same name": (renamed("relu2_1", "relu1_1"), "got Layer"),
    "two relus": (moved(4, 1), "'relu' after"),
    "pool first": (moved(2, 0), "'maxpool' after 'the input'"),
    "relu first": (without("conv1_1"), "'relu' after 'the input'"),
    "stride beside pools": (strided, "expected one of the two"),
    "stride and a bias": (down, "conv1_1.bias' that no layer has"),
    "nan": (weight("conv1_1", float("nan")), "conv1_1: got weights that are not finite"),
    "inf": (weight("conv1_1.bias", float("-inf")), "conv1_1.bias: got weights that are not finite"),
    "half": (lambda t, s: t.update(conv1_1=t["conv1_1"].half()), "float16"),
    "missing weight": (lambda t, s: t.pop("conv2_1"), r"\['conv2_1'\] are missing"),
    "extra weight": (lambda t, s: t.update(x=torch.rand(1)), "'x' that no layer has"),
    "adapter of no channels": (
        lambda t, s: t.update(adapter=torch.rand(3, 0, 1, 1)),
        "adapter: got",
    ),
    "adapter of 3 x 3": (lambda t, s: t.update(adapter=torch.rand(3, 5, 3, 3)), "adapter: got"),
    "mean alone": (normalisation([0.5], None), "mean, std"),
    "mean of two": (normalisation([0.5] * 2, [0.5] * 2), "mean, std"),
    "mean of none": (normalisation([], []), "mean, std"),
    "mean of text": (normalisation(["0.5"], [1.0]), "mean, std"),
    "mean as text": (normalisation("0.5", "0.5"), "mean, std"),
    "mean of bools": (normalisation([True], [1.0]), "mean, std"),
    "mean of nan": (normalisation([float("nan")], [1.0]), "mean, std"),
    "mean of lists": (normalisation([[0.5]], [1.0]), "mean, std"),
    "mean as a number": (normalisation(0.5, 0.5), "mean, std"),
    "std of 0": (normalisation([0.5], [0.0]), "mean, std"),
    "std of inf": (normalisation([0.5], [float("inf")]), "mean, std"),
    "no mean": (lambda t, s: s.pop("mean"), "mean"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_files_are_refused_with_the_path_and_the_reason(saved, kind):
    edit, words = CRAFTED[kind]
    tensors, structure = contents(saved)
    tensors = {k: t.clone() for k, t in tensors.items()}
    edit(tensors, structure)
    save_file(tensors, saved, metadata={KEY: json.dumps(structure)})
    with pytest.raises(ValueError, match=words) as error:
        LossNet.load(saved)
    assert str(error.value).startswith(f"{saved}: ")


def test_what_the_class_can_build_is_read_back(tmp_path):
    convs = nn.Sequential(nn.Conv2d(2, 3, 9, padding=4), nn.Conv2d(3, 2, 1), nn.MaxPool2d(2),
                          nn.AvgPool2d(2))  # fmt: skip
    nets = [network(), LossNet.from_sequential(convs), LossNet.vgg(2, (2, 1), (3, 4), pool="avg"),
            LossNet.vgg(2, (1, 2), (3, 4), 5, "stride"),
            network().with_input_adapter(7)]  # fmt: skip
    for net in nets:
        net.save(tmp_path / "f")
        loaded = LossNet.load(tmp_path / "f")
        assert loaded.fingerprint() == net.fingerprint()
        assert loaded.layers == net.layers
        assert (loaded.in_channels, loaded.mean, loaded.std) == (
            net.in_channels, net.mean, net.std
        )  # fmt: skip
