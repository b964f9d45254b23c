"""What goes wrong on a GPU in silence, as far as it shows without one.

Tiles that the compiler gets wrong, and CUDA's streams, captures and driver behind small fakes;
tests/compile looks at the compiled code, tests/gpu at a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from cases import call_of
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gpl_fast
from gpl_fast import LossNet, SegmentationLoss, backend, ops, streams, tiles
from gpl_fast.fast import policy
from gpl_fast.fast.convolution import conv_transpose
from gpl_fast.fast.plan import Plan
from gpl_fast.net import weights
from gpl_fast.net.weights import Layout

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


# ------------------------------------------------------------------------------------------ tiles


@pytest.fixture
def user_rows(tmp_path, monkeypatch):
    """Names a file of rows as a user has it."""

    def use(*rows):
        path = tmp_path / "tiles.json"
        path.write_text(json.dumps(rows))
        monkeypatch.setenv("GPL_FAST_TILES", str(path))
        tiles.choose.cache_clear()

    yield use
    monkeypatch.undo()
    tiles.choose.cache_clear()


def chosen(arch, form, *, dtype="bfloat16", c_out=64, stride=1):
    return tiles.choose.__wrapped__(arch, dtype, form, 64, c_out, stride)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_descriptors_are_for_channels_and_strides_that_they_can_read(dtype):
    for arch, form in ((90, "plain"), (90, "listed"), (100, "diff"), (120, "listed")):
        assert chosen(arch, form, dtype=dtype).descriptors
        assert not chosen(arch, form, dtype=dtype, c_out=21).descriptors
        assert not chosen(arch, form, dtype=dtype, stride=2).descriptors
    # With them TF32 waits between the products of both branches on sm_90.
    assert chosen(90, "diff", dtype=dtype).descriptors == (dtype != "float32")


def test_a_row_of_ones_own_goes_before(user_rows):
    row = {"arch": 90, "dtype": "bfloat16", "form": "listed", "tile": [8, 8, 32, 64], "warps": 4,
           "stages": 2, "descriptors": True, "c_out_max": 64}  # fmt: skip
    user_rows(row)
    assert chosen(90, "listed") == tiles.Tile(8, 8, 32, 64, 4, 2, True)
    assert chosen(90, "listed", c_out=128) != chosen(90, "listed")
    assert not chosen(90, "listed", c_out=21).descriptors
    assert chosen(90, "diff").block_k == 64


def test_a_row_of_ones_own_is_for_its_architecture(user_rows):
    """Of sm_80's 163 KiB of shared memory sm_86 and sm_89 have 99."""
    newer = (86, 89, 90, 120)
    shipped = [chosen(arch, "diff") for arch in newer]
    row = {"arch": 80, "dtype": "bfloat16", "form": "any", "tile": [16, 16, 64, 64], "warps": 8,
           "stages": 4, "descriptors": False}  # fmt: skip
    user_rows(row, *tiles.rows())
    assert chosen(80, "diff") == tiles.Tile(16, 16, 64, 64, 8, 4, False)
    assert [chosen(arch, "diff") for arch in newer] == shipped


def test_wider_rows_of_sm_90_are_not_inherited():
    """sm_120 has less than half its shared memory."""
    assert chosen(90, "diff").block_h == 16
    for arch in (80, 86, 89, 120):
        wide = chosen(arch, "diff", c_out=512)
        assert chosen(arch, "diff").block_h == wide.block_h == 8
        assert wide.block_k * wide.block_n <= 4096


@pytest.mark.parametrize(
    ("c_in", "block_k"),
    [(8, 16), (24, 32), (64, 64), (152, 32), (160, 32), (304, 64), (848, 64), (1208, 64)],
)
def test_channels_are_padded_by_what_they_need(c_in, block_k):
    """An eighth more than 64 at a time would multiply is left out."""
    assert tiles.choose.__wrapped__(90, "bfloat16", "diff", c_in, 64, 1).block_k == block_k


@pytest.mark.parametrize("fences", [False, True])
def test_unfenced_copies_are_not_pipelined(fences, monkeypatch):
    """Stages of loads by pointers, where Triton fences them and where it does not."""
    monkeypatch.setattr(tiles, "fences_copies", lambda: fences)
    async_proxy = 3 if fences else 1
    for arch, stages_ in ((80, 3), (89, 3), (90, async_proxy), (100, async_proxy), (120, 3)):
        assert chosen(arch, "diff", stride=2).stages == stages_
        assert chosen(arch, "plain", c_out=21).stages == stages_
    assert chosen(90, "diff", dtype="float32").stages == async_proxy
    assert chosen(90, "diff").stages == chosen(100, "listed").stages == 3  # by TMA


# ------------------------------------------------------------------------------------------ grids


def test_a_launch_takes_no_more_images_than_a_grid():
    """CUDA's y and z go up to 65535; the workspace has room for more of such images."""
    call = call_of(LossNet.vgg(1), dtype=BF16, workspace_mb=float(2**20), policy="sm_90")
    plan = Plan(call, 70000, 32, 32)
    assert max(plan.images) == 35000  # of equal size
    assert min(Plan(call, 65535, 32, 32).images) == 65535


# -------------------------------------------------------------------------------- streams, graphs


class Stream:
    """Work waits until somebody waits for it."""

    def __init__(self) -> None:
        self.work: list = []

    def synchronize(self) -> None:
        for run in self.work:
            run()
        self.work.clear()


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a GPU, and remembers who reads it."""

    is_cuda = True
    device = CUDA

    def record_stream(self, stream):
        self.readers = [*getattr(self, "readers", ()), stream]


class Gpu:
    """`torch.cuda` as far as caches ask it."""

    def __init__(self, monkeypatch) -> None:
        self.current, self.capturing = Stream(), False
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def made(self, *_, **__):
        """A tensor that the current stream is going to fill with ones."""
        t = torch.zeros(3).as_subclass(OnDevice)
        self.current.work.append(lambda: torch.Tensor.fill_(t, 1))
        return t


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu(monkeypatch)
    packed = lambda *args: {"w": gpu.made(), "b": gpu.made()}  # noqa: E731
    monkeypatch.setattr(weights, "pack_weights", packed)
    monkeypatch.setattr(weights, "rounded", lambda w, dtype: SimpleNamespace(to=gpu.made))
    return gpu


CACHES = {
    "packs": lambda net: list(net.packs(Layout(CUDA, BF16, False, True, ())).values()),
    "packs of lists": lambda net: list(net.packs(Layout(CUDA, BF16, True, True, ())).values()),
    "weights": lambda net: list(net.weights_on(CUDA, BF16).values()),
}


@pytest.mark.parametrize("cache", CACHES)
def test_what_one_stream_made_is_there_for_another(cache, gpu):
    net = LossNet.vgg(3, (1, 1), widths=(4, 4))
    made = CACHES[cache](net)
    gpu.current = Stream()  # has waited for nothing
    read = CACHES[cache](net)
    assert all(a is b for a, b in zip(made, read, strict=True))
    for t in read:
        assert torch.equal(t.as_subclass(torch.Tensor), torch.ones(3))


@pytest.mark.parametrize("cache", CACHES)
def test_the_allocator_knows_who_reads(cache, gpu):
    """Else it gives freed memory to the stream that made it while others still read it."""
    net = LossNet.vgg(3, (1, 1), widths=(4, 4))
    streams = [gpu.current, second := Stream()]
    for _ in range(3):  # which it is told once
        CACHES[cache](net)
    gpu.current = second
    assert all(t.readers == streams for t in CACHES[cache](net))


class Module(nn.Module):
    def to(self, *args, **kwargs):
        raise AssertionError("made while a graph is captured")

    def forward(self, x):
        return x


@pytest.mark.parametrize("cache", [*CACHES, "module"])
def test_nothing_is_made_while_a_graph_is_captured(cache, gpu):
    if cache == "module":
        net = LossNet.from_module(nn.Sequential(Module()), {"a": "0"}, in_channels=3)
        get = lambda: net._module_on(net.identity, CUDA, BF16)  # noqa: E731
    else:
        net = LossNet.vgg(3, (1, 1), widths=(4, 4))
        get = lambda: CACHES[cache](net)  # noqa: E731
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"run the loss once before the capture.*same kind"):
        get()
    assert not gpu.current.work
    assert net.cached_tensors() == []


@pytest.mark.parametrize("cache", CACHES)
def test_what_is_there_is_read_while_a_graph_is_captured(cache, gpu):
    net = LossNet.vgg(3, (1, 1), widths=(4, 4))
    made = CACHES[cache](net)
    gpu.capturing = True
    assert all(a is b for a, b in zip(made, CACHES[cache](net), strict=True))
    assert not gpu.current.work


def test_a_cpu_asks_cuda_for_nothing(monkeypatch):
    for name in ("device", "current_stream", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, None)
    x = torch.rand(1, 3, 8, 8)
    loss = gpl_fast.GenericPerceptualLoss(3, (1,), widths=(4,), activation="none")
    assert loss(x, x) == 0


# ----------------------------------------------------------------------------------------- driver


@pytest.fixture
def library(monkeypatch):
    """A GPU, a driver and a library, each of a version of one's own."""

    def use(text, capability, driver):
        monkeypatch.setattr(ops, "load", lambda: None)
        monkeypatch.setattr(torch.ops, "gpl_fast", SimpleNamespace(cuda_build=lambda: text))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        properties = SimpleNamespace(total_memory=2**34)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(ops, "driver_version", lambda: driver)

    return use


BUILD = "13.1 80+PTX 90a"


@pytest.mark.parametrize(
    ("text", "capability", "driver", "needed"),
    [
        (BUILD, (9, 0), (12, 8), "13.0"),
        (BUILD, (9, 0), (13, 0), None),  # minor versions are compatible
        (BUILD, (9, 0), (13, 1), None),
        (BUILD, (9, 0), (14, 0), None),
        (BUILD, (12, 0), (13, 0), "13.1"),  # but PTX is not
        (BUILD, (12, 0), (13, 1), None),
        ("12.8 80+PTX 90a", (9, 0), (12, 2), None),
        ("12.8 80+PTX 90a", (9, 0), (11, 8), "12.0"),
        (BUILD, (9, 0), None, None),  # nobody can say
    ],
)
def test_an_older_driver_is_an_obstacle(text, capability, driver, needed, library):
    library(text, capability, driver)
    said = ops.cuda_obstacle(CUDA)
    if needed is None:
        assert said is None
        assert policy.ask(CUDA).backward == "compiled"
        return
    assert f"the driver knows CUDA up to {driver[0]}.{driver[1]}" in said
    assert f"need {needed} for sm_{capability[0]}{capability[1]}" in said
    assert "update the driver" in said


def test_with_an_older_driver_tritons_kernels_run_and_it_is_said(library, monkeypatch):
    library(BUILD, (9, 0), (12, 8))
    monkeypatch.setattr(backend, "_broken_library", lambda: None)
    monkeypatch.setattr(backend, "_warned", set())
    assert policy.ask(CUDA).backward == "triton"
    with pytest.warns(UserWarning, match=r"Triton's kernels run.*CUDA up to 12\.8"):
        choice = backend.choose("auto", CUDA, torch.float32)
    assert choice.name == "fast"


@pytest.mark.parametrize(("status", "version"), [(0, (12, 8)), (3, None)])
def test_the_driver_is_asked(status, version, monkeypatch):
    def answer(number):
        number._obj.value = 12080
        return status

    driver = {"libcuda.so.1": SimpleNamespace(cuDriverGetVersion=answer)}
    monkeypatch.setattr(ctypes, "CDLL", driver.__getitem__)
    assert ops.driver_version.__wrapped__() == version


def test_there_may_be_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert ops.driver_version.__wrapped__() is None


# ------------------------------------------------------------------------------------ fixed order


class Inside(TorchDispatchMode):
    """Calls `during` in the middle of each convolution; keeps the arguments by name."""

    def __init__(self, during) -> None:
        super().__init__()
        self.during, self.calls = during, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
            self.during()
        return func(*args, **(kwargs or {}))


def data_gradient(during):
    dz, w = torch.rand(1, 5, 6, 4).as_subclass(OnDevice), torch.rand(4, 3, 3, 3)
    with Inside(during) as inside:
        dx = conv_transpose(dz, w, 1, (1, 1), (0, 0), allow_tf32=False)
    (call,) = inside.calls
    return dz, w, dx, call


def test_the_data_gradient_asks_for_a_fixed_order_itself():
    switch = []
    dz, w, dx, call = data_gradient(lambda: switch.append(torch.backends.cudnn.deterministic))
    assert call["deterministic"]
    assert switch == [False]
    wanted = nn.functional.conv_transpose2d(dz.permute(0, 3, 1, 2), w, padding=1)
    assert torch.equal(dx, wanted.permute(0, 2, 3, 1))


def test_two_threads_leave_the_switch_as_it_was():
    """The first to come leaves first: whoever puts back what it found leaves it on."""
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first():
        data_gradient(lambda: (first_is_in.set(), second_is_in.wait(10)))
        first_is_out.set()

    def second():
        data_gradient(lambda: (second_is_in.set(), first_is_out.wait(10)))

    with torch.backends.cudnn.flags(deterministic=False):
        threads = [threading.Thread(target=run) for run in (first, second)]
        threads[0].start()
        first_is_in.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join()
        assert not torch.backends.cudnn.deterministic


def test_class_weights_are_copied_once_and_follow_a_change(monkeypatch):
    """A copy at each step would stop the device; one that is kept must not outlive its numbers."""
    total = SegmentationLoss(4, class_weight=[1.0, 2.0, 3.0, 4.0])
    with FakeTensorMode():
        logits = torch.empty(1, 4, 2, 2, device="cuda")
    made = []
    monkeypatch.setattr(streams, "made_once", lambda device, dtype: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device: made.append(device) or t.clone())
    for _ in range(3):
        assert total._copies.of("class_weight", total.class_weight, logits).tolist() == [
            1.0,
            2.0,
            3.0,
            4.0,
        ]
    assert made == [logits.device]
    total.class_weight = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert total._copies.of("class_weight", total.class_weight, logits).tolist() == [
        4.0,
        3.0,
        2.0,
        1.0,
    ]
    total.class_weight.fill_(7.0)
    assert total._copies.of("class_weight", total.class_weight, logits).tolist() == [7.0] * 4
    assert len(made) == 3
    with FakeTensorMode():  # whose tensors must not stay
        assert total._copies.of("class_weight", total.class_weight, logits) is total.class_weight
