"""Memory of the two walks: the sum of the buffers that are planned by name is its bound, and the
workspace is theirs."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import ATOL, NARROW, call_of, error, value_and_grad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inside import Measured, Taken, peak_bytes, step
from policies import decided, told_chunks
from saved import left_by
from torch import Tensor, nn

from gpl_fast import (
    LPIPS,
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    TopK,
    ops,
)
from gpl_fast.fast import memory
from gpl_fast.fast.chunk import Chunk
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.policy import MIB
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# Beside the plan: numbers of each image, and oneDNN's own 8 KiB.
A_CALL, AN_IMAGE = 2**14, 2**9
# What a CPU computes in; bfloat16 without float32 only where oneDNN has it.
WAYS = [(FLOAT, "float32"), (FLOAT, "winograd"), (BF16, "float32"), (BF16, "winograd"),
        (HALF, "float32"), (HALF, "winograd")]  # fmt: skip
if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    WAYS += [(BF16, "own"), (BF16, "mixed")]


def beside(plan: Plan) -> int:
    """Bytes that are not planned."""
    return A_CALL + AN_IMAGE * plan.n


# -------------------------------------------------------------------------------------- drawn calls


def modules() -> LossNet:
    """Biases, a normalisation, a convolution without ReLU, channels that grow in a segment."""
    return LossNet.from_sequential(
        nn.Sequential(
            nn.Conv2d(3, 9, 3, padding=1), nn.ReLU(), nn.Conv2d(9, 8, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 11, 3, padding=1), nn.Conv2d(11, 6, 1), nn.ReLU(),
            nn.Conv2d(6, 24, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(24, 7, 3, padding=1), nn.ReLU(),
        ),
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25),
    )  # fmt: skip


VGGS = {
    "1,1": {}, "2,1": {}, "1,3": {"pool": "avg"}, "3": {"kernel_size": 5},
    "2,2": {"pool": "stride"}, "1,1,1": {"kernel_size": 1}, "1,2": {},
}  # fmt: skip
# Feature and style taps: some are inside of segments.
TAPS = {
    "last": lambda net: ({net.layers[-1].name: 1.0}, {}),
    "all": lambda net: ({layer.name: 1.0 for layer in net.layers}, {}),
    "styles": lambda net: ({}, {layer.name: 1.0 for layer in net.layers if layer.kind != "conv"}),
    "both": lambda net: (
        {net.layers[0].name: 1.0, net.layers[-1].name: 2.0},
        {net.layers[-1].name: 1.0, net.layers[1].name: 0.5},
    ),
}
KINDS = ("dense", "resized", "labels", "topk", "features", "total", "total, teacher")
COMPARED = {
    "l1": {"criterion": "l1"},
    "normalized": {"normalize_features": True},
    "l1, normalized": {"criterion": "l1", "normalize_features": True},
}


@dataclass(frozen=True)
class Drawn:
    """One call."""

    kind: str
    net: str
    taps: str
    shape: tuple[int, int, int, int]
    way: tuple[torch.dtype, str]
    rows: int | None
    activation: str
    masked: bool
    k: int
    source: float  # size of a resized target
    rest: str
    compared: str  # of `COMPARED`, or "channels"

    def network(self) -> LossNet:
        torch.manual_seed(0)
        c = self.shape[1]
        if self.net == "modules":
            return modules() if c == 3 else modules().with_input_adapter(c)
        structure = {"net": self.net, "widths": (16, 24, 20), **VGGS[self.net]}
        return GenericPerceptualLoss(c, **structure).net

    def loss(self, **options: Any) -> Any:
        net, options = self.network(), {"backend": "fast", "compute_dtype": self.way[0], **options}
        options |= COMPARED.get(self.compared, {})
        if self.kind.startswith("total"):
            return SegmentationLoss(self.shape[1], net=net, temperature=2.0, **options)
        features, styles = TAPS["all" if self.kind == "features" else self.taps](net)
        if self.compared == "channels":
            widths = {layer.name: layer.out_channels for layer in net.layers}
            features = {name: torch.full((widths[name],), w) for name, w in features.items()}
        return PerceptualLoss(net, features, styles, activation=self.activation, **options)

    def inputs(self, loss: Any) -> tuple[Tensor, list[Any]]:
        n, c, h, w = self.shape
        pred, dense = torch.randn(2, *self.shape)
        labels = torch.randint(c, (n, h, w))
        mask = torch.rand(n, h, w) < 0.8 if self.masked else None
        if self.kind.startswith("total"):
            return pred, [labels, dense if "teacher" in self.kind else None, mask]
        target: Any = labels if self.kind == "labels" else dense
        if self.kind == "resized":
            target = torch.randn(n, c, math.ceil(self.source * h), math.ceil(self.source * w))
        elif self.kind == "topk":
            k = min(self.k, c)
            target = TopK(*dense.softmax(dim=1).topk(k, dim=1), self.rest)
        elif self.kind == "features":
            return pred, [loss.encode(dense)]
        return pred, [target, None, mask]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    net = draw(st.sampled_from([*VGGS, "modules"]))
    c = draw(st.sampled_from([3, 3, 5, 19, 70]))
    size = st.integers(24, 72)
    return Drawn(
        kind=draw(st.sampled_from(KINDS)),
        net=net,
        taps=draw(st.sampled_from(list(TAPS))),
        shape=(draw(st.integers(1, 3)), c, draw(size), draw(size)),
        way=draw(st.sampled_from(WAYS)),
        rows=draw(st.sampled_from([None, 2, 4, 8])),
        activation=draw(st.sampled_from(["softmax", "sigmoid", "none"])),
        masked=draw(st.booleans()),
        k=draw(st.integers(1, 4)),
        source=draw(st.sampled_from([0.5, 0.8, 3.0])),
        rest=draw(st.sampled_from(["renormalize", "uniform", "drop"])),
        compared=draw(st.sampled_from(["l2", "l2", *COMPARED, "channels"])),
    )


def check(taken: Taken) -> None:
    plan = taken.plan
    assert taken.transient <= plan.bytes_transient() + beside(plan), taken.half


@settings(max_examples=120)
@given(d=drawn())
def test_the_sum_of_the_buffers_is_the_bound(d: Drawn):
    with decided(rows=d.rows, arithmetic=d.way[1]):
        loss = d.loss()
        pred, args = d.inputs(loss)
        for taken in step(loss, pred, *args):
            check(taken)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(d=drawn(), images=st.sampled_from([(1, 2), (1, 3), (2, 3), (1, 1, 2), (1, 2, 3)]))
def test_the_sum_is_the_bound_of_chunks_by_segment(d: Drawn, images, monkeypatch):
    d = replace(d, shape=(3, *d.shape[1:]))
    with monkeypatch.context() as patch, decided(arithmetic=d.way[1]):
        told_chunks(patch, images, d.rows)
        loss = d.loss()
        pred, args = d.inputs(loss)
        for taken in step(loss, pred, *args):
            check(taken)


@settings(max_examples=60)
@given(d=drawn(), share=st.floats(0.2, 1.0))
def test_the_workspace_is_a_hard_bound(d: Drawn, share):
    with decided(rows=d.rows, arithmetic=d.way[1]):
        loss = d.loss()
        pred, args = d.inputs(loss)
        asked = share * step(loss, pred, *args)[-1].plan.bytes_transient() / MIB
        found: list[Taken] = []
        while not found:  # by the target's walk, where there is one, and by the other
            try:
                found = step(d.loss(workspace_mb=asked), pred, *args)
            except ValueError as refused:
                least = int(
                    re.search(r"workspace_mb: .* at least (\d+) for", str(refused)).group(1)
                )
                assert least > asked
                asked = least
        for taken in found:
            assert taken.plan.hard
            assert taken.plan.bytes_transient() <= asked * MIB
            check(taken)


@settings(max_examples=40)
@given(d=drawn())
def test_encoding_a_target_keeps_to_the_plan(d: Drawn):
    with decided(rows=d.rows, arithmetic=d.way[1]):
        loss = d.loss()
        encode = loss.gpl.encode if d.kind.startswith("total") else loss.encode
        target = d.inputs(loss)[1][0]
        if d.kind == "features":
            target = d.inputs(loss)[0]
        with Measured() as measured:
            encode(target)
        for taken in measured.taken:
            check(taken)


@settings(max_examples=40)
@given(d=drawn())
def test_without_a_gradient_the_taps_come_on_top(d: Drawn):
    """A chunk's differences and all Gram matrices, which nobody keeps."""
    with decided(rows=d.rows, arithmetic=d.way[1]), torch.no_grad():
        loss = d.loss()
        pred, args = d.inputs(loss)
        with Measured() as measured:
            loss(pred, *args)
        *_, taken = measured.taken
        plan = taken.plan
        taps = sum(
            memory.bytes_of(shape, dtype) * (plan.images[0] / plan.n if "diff" in name else 1)
            for name, (shape, dtype) in plan.contract.items()
            if name.startswith(("diff", "gram"))
        )
        assert taken.transient <= plan.bytes_transient() + taps + beside(plan)


def test_more_than_is_planned_is_refused(decide):
    """What holds the sum: `take` allows a name its bytes and no more."""
    net = LossNet.vgg(3, (1,), NARROW)
    plan = Plan(call_of(net), 1, 32, 32)
    chunk = Chunk(plan, torch.zeros(1, 3, 32, 32), target={}, packs={}, saved={}, stages=ops)
    chunk.room = {"maps": 4096}
    assert chunk.take("maps", (4, 16, 16)).dtype == FLOAT
    assert chunk.take("maps", (2, 4, 8)).untyped_storage().nbytes() == 4096
    for name, shape in (("maps", (1025,)), ("others", (1,))):
        with pytest.raises(AssertionError):
            chunk.take(name, shape)


def test_a_buffer_that_grows_is_not_held_twice():
    net = LossNet.vgg(3, (1,), NARROW)
    plan = Plan(call_of(net), 1, 32, 32)
    chunk = Chunk(plan, torch.zeros(1, 3, 32, 32), target={}, packs={}, saved={}, stages=ops)
    chunk.room = {"z0": 2**20}
    sizes = (2**16, 2**17, 2**18)
    peak, _ = peak_bytes(lambda: [chunk.take("z0", (size,)).shape for size in sizes])
    assert peak == 2**20


# ------------------------------------------------------------------------------------ the workspace


@pytest.mark.parametrize("kind", ["dense", "labels"])
@pytest.mark.parametrize("pool", ["max", "stride"])
def test_the_least_workspace(pool, kind):
    def make(mb):
        return GenericPerceptualLoss(
            5, "2,1", widths=(64, 64), pool=pool, backend="fast", workspace_mb=mb
        )

    pred, target = torch.randn(2, 2, 5, 16, 900)
    target = torch.randint(5, (2, 16, 900)) if kind == "labels" else target
    with pytest.raises(ValueError, match=r"workspace_mb: got 0\.5, expected at least") as caught:
        make(0.5)(pred, target)
    least = int(re.search(r"at least (\d+)", str(caught.value)).group(1))
    assert least > 1
    value, grad = value_and_grad(make(least), pred, target)
    want, want_grad = value_and_grad(make(4096), pred, target)
    assert error(value, want) < ATOL[FLOAT]
    assert error(grad, want_grad) < ATOL[FLOAT]
    with pytest.raises(ValueError, match=f"expected at least {least} "):
        make(least - 1)(pred, target)


@functools.cache  # drawing vgg19 takes half a second
def random_net(blocks: str) -> LossNet:
    return GenericPerceptualLoss(150, blocks).net


@pytest.mark.parametrize("policy", ["amx", "avx512_bf16", "avx2", "sm_80"])
@pytest.mark.parametrize("kind", ["dense", "labels", "features"])
@pytest.mark.parametrize("size", [(3, 64, 96), (1, 512, 512), (16, 512, 683)])
@pytest.mark.parametrize("mb", [64, 256, 2048])
@pytest.mark.parametrize("blocks", ["1,1,1,1,1", "vgg19"])
def test_chunks_fit_the_workspace(blocks, mb, size, kind, policy):
    net = random_net(blocks)
    call = call_of(net, kind=kind, dtype=BF16, policy=policy, workspace_mb=mb)
    try:
        planned = Plan(call, *size)
    except ValueError as error:
        least = int(re.search(r"at least (\d+)", str(error)).group(1))
        assert least > mb
        return
    assert planned.bytes_transient() <= mb * MIB
    assert 1 <= planned.images[0] <= planned.images[-1] <= size[0]
    assert list(planned.images) == sorted(planned.images)
    for segment, rows in zip(planned.segments, planned.rows, strict=True):
        height = planned.sizes[segment[0]].h
        assert rows == height or (rows % 2 == 0 and 0 < rows < height)


@pytest.mark.parametrize(
    ("dtype", "arithmetic"),
    [(FLOAT, "own"), (FLOAT, "float32"), (BF16, "own"), (BF16, "mixed"), (BF16, "float32")],
)
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_little_workspace_is_enough_for_many_classes(kind, dtype, arithmetic, decide):
    """64 MB for crops of 512 x 512, whatever the deep layers' weights take."""
    decide(convolutions=arithmetic)
    for c in (19, 150, 1203):
        call = call_of(GenericPerceptualLoss(c).net, kind=kind, dtype=dtype, workspace_mb=64)
        assert Plan(call, 2, 512, 512).bytes_transient() <= 64 * MIB


def transient_bytes(loss, pred, target):
    """What a step's two walks hold at most besides saved tensors and gradient, and its plan."""
    x = pred.clone().requires_grad_()
    loss(x, target)  # weights are cached at the first call
    forward, value = peak_bytes(lambda: loss(x, target))
    planned, _ = left_by(value)
    backward, grad = peak_bytes(lambda: torch.autograd.grad(value, x))
    return max(forward - planned.bytes_saved(), backward - grad[0].nbytes), planned


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize(("blocks", "c"), [("1,1,1,1,1", 19), ("2,2", 19), ("1,1", 150)])
def test_transient_memory_is_about_what_is_planned(blocks, c, pool):
    pred, target = torch.randn(2, 1, c, 128, 192)
    least = 1
    for _ in range(2):  # the least workspace, then the usual one
        loss = GenericPerceptualLoss(c, blocks, pool=pool, backend="fast", workspace_mb=least)
        try:
            loss(pred, target)
        except ValueError as error:
            least = int(re.search(r"at least (\d+)", str(error)).group(1))
    assert least > 1
    for mb in (least, 2 * least, 256):
        loss = GenericPerceptualLoss(c, blocks, pool=pool, backend="fast", workspace_mb=mb)
        transient, planned = transient_bytes(loss, pred, target)
        assert transient <= planned.bytes_transient() + beside(planned)
        assert planned.bytes_transient() <= 4 * transient


def test_transient_memory_does_not_grow_with_the_images():
    loss = GenericPerceptualLoss(19, "1,1", backend="fast", workspace_mb=12)
    one, four = (transient_bytes(loss, *torch.randn(2, n, 19, 128, 128))[0] for n in (1, 4))
    assert four <= 1.01 * one


ON_A_GPU = {  # classes, images, MB: images and rows of the first segment's chunks
    "all at once": (19, 8, 2048, (8, 512)),
    "equal parts": (150, 16, 2048, (8, 512)),  # 11 would fit, and leave 5
    "one image": (1203, 4, 2048, (1, 512)),
    "strips": (1203, 4, 800, (1, 256)),
}


@pytest.mark.parametrize("case", ON_A_GPU)
def test_a_gpu_takes_class_maps_in_parts_and_deep_segments_whole(case):
    c, n, mb, first = ON_A_GPU[case]
    call = call_of(GenericPerceptualLoss(c).net, dtype=BF16, policy="sm_90", workspace_mb=mb)
    plan = Plan(call, n, 512, 512)
    assert (plan.images[0], plan.rows[0]) == first
    assert plan.images[1:] == (n,) * 4
    assert not any(plan.in_strips[1:])
    if 1 < first[0] < n:
        more = (first[0] + 4, *plan.images[1:])
        assert memory.peak(plan, more, plan.rows) > plan.budget


def test_a_cpu_takes_the_same_images_through_all_segments():
    for c, n, policy in ((19, 8, "avx2"), (3, 16, "amx"), (150, 2, "avx512_bf16")):
        call = call_of(GenericPerceptualLoss(c).net, dtype=BF16, policy=policy)
        plan = Plan(call, n, 64, 64)
        assert len(set(plan.images)) == 1
        assert plan.images[0] > 1


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("taps", [("relu1_2", "relu2_1"), ("pool1", "pool2"), ("conv1_1",)])
def test_transient_memory_of_style_taps_is_planned(taps, dtype):
    net, styles = LossNet.vgg(3, (2, 1)), dict.fromkeys(taps, 1.0)
    pred, target = torch.rand(2, 1, 3, 128, 192)
    for mb in (16, 256):
        loss = PerceptualLoss(net, {"pool2": 1.0}, styles, backend="fast", compute_dtype=dtype,
                              workspace_mb=mb)  # fmt: skip
        transient, planned = transient_bytes(loss, pred, target)
        assert transient <= planned.bytes_transient() + beside(planned)
        assert planned.bytes_transient() <= mb * MIB


@pytest.mark.parametrize("dtype", [FLOAT, BF16, torch.float16])
@pytest.mark.parametrize("heads", [None, {"relu1_2": None}, {"relu1_1": None, "pool2": None}])
def test_transient_memory_of_maps_is_planned(heads, dtype):
    """Above all the factor of each pixel of the gradient that comes in."""
    pred, target = torch.rand(2, 3, 3, 128, 192)
    for mb in (32, 256):
        loss = LPIPS(LossNet.vgg(3, (2, 1)), heads, spatial=True, backend="fast",
                     compute_dtype=dtype, workspace_mb=mb)  # fmt: skip
        for taken in step(loss, pred, target):
            assert taken.transient <= taken.plan.bytes_transient() + beside(taken.plan)
            assert taken.plan.bytes_transient() <= mb * MIB


@pytest.mark.parametrize("kind", ["total", "total, teacher"])
def test_transient_memory_of_the_total_is_planned(kind):
    labels, (logits, teacher) = torch.randint(19, (1, 256, 256)), torch.randn(2, 1, 19, 256, 256)
    total = SegmentationLoss(19, net="1,1", backend="fast", workspace_mb=24)
    transient, planned = transient_bytes(
        lambda x, t: total(x, labels, teacher=t), logits, teacher if "teacher" in kind else None
    )
    assert transient <= planned.bytes_transient() + beside(planned)


class FirstMaps:
    """The CPU's stages; keeps the maps that the logits became."""

    def __init__(self):
        self.made = []  # held: nothing else gets their addresses

    def __getattr__(self, name):
        return getattr(ops, name)

    def softmax_pack_fwd(self, x, **arguments):
        self.made.append(arguments["y"])
        ops.softmax_pack_fwd(x, **arguments)


def test_strips_share_their_memory(decide):
    """What the system's allocator maps anew at every call takes as long as the softmax."""
    strips = FirstMaps()
    decide(stages={"compiled": strips})
    loss = GenericPerceptualLoss(19, "1,1", widths=(8, 16), backend="fast", workspace_mb=2)
    loss(*torch.randn(2, 2, 19, 128, 128))
    assert len(strips.made) > 4
    assert len({y.data_ptr() for y in strips.made}) == 2  # of each image
