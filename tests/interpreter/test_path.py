"""Module to gradient through the kernels, interpreted on CPU tensors.

The bounds are those of tests/cpu/test_fast.py, whose functions run here with Triton's stages: true
float32 takes ATen's convolutions between them, all else `conv_block_fwd`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import cpu_tests
import pytest
import torch
from cases import error, value_and_grad
from inside import Inside
from policies import decided
from program_order import ORDERS, backward, program_order, shuffled
from saved import left_by, unpack_code, unpack_mask
from strategies import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, TopK
from gpl_fast.fast.memory import peak
from gpl_fast.fast.plan import Plan
from gpl_fast.fast.policy import MIB
from gpl_fast.kernels import conv_block
from gpl_fast.tiles import Tile

fast_tests = cpu_tests.load("fast")
How, Total, sequential = fast_tests.How, fast_tests.Total, fast_tests.sequential
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.usefixtures("one_thread", "triton_path")


@pytest.fixture
def triton_path(decide, monkeypatch):
    """CPU tensors take the path of CUDA tensors; float32 is float32."""
    decide(forward="triton", backward="triton", arch=80, tiles=wide_tile)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for (name, attribute), wide in WIDE.items():
        monkeypatch.setattr(kernel(name), attribute, wide)


def kernel(name: str) -> ModuleType:
    """Functions of the same names stand before some of these modules."""
    return importlib.import_module(f"gpl_fast.kernels.{name}")


def wide_tiling(classes: int, channels: int, width: int, twice: bool = False) -> dict[str, int]:
    """One tile of all classes."""
    block_c = max(1 << (channels - 1).bit_length(), 2)
    block_w = min(1 << (width - 1).bit_length(), 64)
    tile = {"BLOCK_C": block_c, "BLOCK_W": block_w, "num_warps": 4}
    return {"HELD": True, "TILES": 1, "WHOLE": classes // block_c, **tile}


# The interpreter counts programs and steps, not elements.
WIDE = {
    ("label_conv", "PIXELS"): 256,
    ("softmax_pack", "tiling"): wide_tiling,
    ("softmax_bwd", "tiling"): wide_tiling,
}
SHIPPED = {(name, attribute): getattr(kernel(name), attribute) for name, attribute in WIDE}


def wide_tile(c_in: int, c_out: int) -> Tile:
    channels = min(max(1 << (c_out - 1).bit_length(), 8), 256)
    depth = min(max(1 << (c_in - 1).bit_length(), 16), 256)
    return Tile(16, 32, depth, channels, 4, 1, False)


@pytest.fixture
def shipped_tiles(decide, monkeypatch, triton_path):
    decide(tiles=None)
    for (name, attribute), shipped in SHIPPED.items():
        monkeypatch.setattr(kernel(name), attribute, shipped)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the form of each `conv_block_fwd` from here on."""
    forms: list[str] = []
    shipped = conv_block.launch

    def launch(*args, **meta):
        forms.append(meta["FORM"])
        return shipped(*args, **meta)

    monkeypatch.setattr(conv_block, "launch", launch)
    return forms


# ------------------------------------------------------------------------------- against float64


def drawn(
    kind: str, compute: torch.dtype | None, *, c: int = 5, pred: torch.dtype = FLOAT,
    net: str = "1,1", kernel: int = 3, pool: str = "max", levels=None, activation: str = "softmax",
    temperature: float = 1.0, rows=None, masked: bool | str = False, ignore=None,
    rest: str = "uniform", layout: str = "contiguous", target_activation: str = "same", n: int = 2,
    size=(9, 26),
):  # fmt: skip
    """Arguments of `test_against_float64` in tests/cpu/test_fast.py."""
    case = Case(
        shape=(n, c, *size),
        net={"net": net, "kernel_size": kernel, "pool": pool},
        options={
            "activation": activation,
            "temperature": temperature,
            "level_weights": levels,
            "reduction": "none",
        },
        channels_last=False,
        seed=3,
    )
    how = How((pred, compute), layout, rows, masked, ignore, target_activation, rest, min(3, c))
    return kind, case, how, None


DRAWN = {
    "dense": drawn("dense", BF16),
    "dense, float32": drawn("dense", None, layout="sliced"),
    "dense, float16, two convolutions": drawn("dense", HALF, net="2,1", masked=True),
    "dense, three levels": drawn("dense", BF16, net="1,1,1", levels=(1.0, 0.25, 1.0)),
    "dense, strips": drawn("dense", BF16, net="2,1", rows=4),
    "dense, average": drawn("dense", BF16, pool="avg", levels=(1.0, 1.0), layout="channels_last"),
    "dense, stride": drawn("dense", HALF, pool="stride", levels=(1.0, 1.0)),
    "dense, one class": drawn("dense", BF16, c=1, activation="sigmoid"),
    "dense, probabilities": drawn("dense", BF16, target_activation="none"),
    "dense, probabilities, temperature": drawn(
        "dense", BF16, target_activation="none", temperature=3.0
    ),
    "dense, no activation, 7 x 7": drawn("dense", BF16, kernel=7, net="1", activation="none"),
    "bfloat16 prediction": drawn("dense", None, pred=BF16, temperature=2.0),
    "float16 prediction, true float32": drawn("dense", FLOAT, pred=HALF),
    "resized": drawn("resized", BF16, masked=True),
    "labels": drawn("labels", BF16, masked=True, ignore=255),
    "labels, float32": drawn("labels", None, ignore=0),
    "labels, 19, 5 x 5": drawn("labels", HALF, c=19, kernel=5, net="1"),
    "labels, 150, 1 x 1": drawn("labels", BF16, c=150, kernel=1, n=1),
    "labels, strips": drawn("labels", BF16, net="2,1", rows=4, masked=True),
    "labels, average": drawn("labels", BF16, pool="avg"),
    "topk": drawn("topk", BF16, masked=True),
    "topk, float32": drawn("topk", None, rest="renormalize"),
    "topk, renormalize": drawn("topk", HALF, c=19, rest="renormalize"),
    "topk, drop, strips": drawn("topk", BF16, rest="drop", rows=4),
    "features": drawn("features", BF16, masked=True),
    "features, levels, strips": drawn("features", HALF, levels=(1.0, 1.0), rows=4),
    **{
        f"weights-triton-{name}": drawn(kind, compute, masked="weights", **how)
        for name, kind, compute, how in [
            ("float32-dense", "dense", None, {"layout": "channels_last"}),
            ("bfloat16-dense", "dense", BF16, {"rows": 4}),
            ("float16-dense", "dense", HALF, {"activation": "sigmoid"}),
            ("bfloat16-dense-resized", "resized", BF16, {}),
            ("float32-labels", "labels", None, {"ignore": 0}),
            ("bfloat16-labels", "labels", BF16, {"ignore": 255, "rows": 4}),
            ("float16-labels", "labels", HALF, {"c": 19}),
            ("float32-topk", "topk", None, {}),
            ("bfloat16-topk", "topk", BF16, {"rest": "renormalize"}),
            ("float16-topk", "topk", HALF, {"rows": 4, "temperature": 2.0}),
            ("float32-features", "features", None, {}),
            ("bfloat16-features", "features", BF16, {}),
            ("float16-features", "features", HALF, {}),
        ]
    },
}


@pytest.mark.parametrize("name", DRAWN)
def test_against_float64(name, monkeypatch):
    forms = launched(monkeypatch)
    fast_tests.test_against_float64.hypothesis.inner_test(*DRAWN[name])
    _, _, how, _ = DRAWN[name]
    assert bool(forms) == ((how.dtypes[1] or how.dtypes[0]) != FLOAT)


@pytest.mark.usefixtures("shipped_tiles")
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_tf32_within_the_bounds_of_float16(kind, monkeypatch):
    """Both have ten bits."""
    forms = launched(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    kind, case, how, _ = drawn(kind, None)
    for bound in ("ATOL", "ROUTED", "SLACK"):
        values = getattr(fast_tests, bound)
        monkeypatch.setattr(fast_tests, bound, {**values, FLOAT: values[HALF]})
    fast_tests.test_against_float64.hypothesis.inner_test(kind, case, how, None)
    assert forms


TOTALS = [
    Total(True, 0.1, "mean", "auto", 1.0, "softmax", None, False, True, BF16, None, 5, 0),
    Total(False, 0.0, "none", "auto", 2.5, "softmax", "dense", True, False, BF16, 4, 5, 1),
    Total(False, 0.1, "sum", True, 1.0, "softmax", "topk", False, False, FLOAT, None, 19, 2),
    Total(True, 0.0, "mean", False, 1.0, "sigmoid", None, True, False, BF16, None, 2, 3),
    Total(False, 0.0, "mean", "auto", 1.0, "softmax", "features", False, False, FLOAT, 4, 5, 4),
    Total(True, 0.1, "mean", "auto", 1.0, "softmax", None, "weights", True, BF16, None, 5, 5),
    Total(True, 0.1, "sum", "auto", 1.0, "softmax", "dense", "weights", False, BF16, 4, 5, 6),
    Total(False, 0.1, "none", True, 2.5, "softmax", "topk", "weights", False, FLOAT, None, 5, 7),
    Total(False, 0.0, "mean", "auto", 1.0, "sigmoid", "dense", "weights", True, HALF, None, 5, 8),
]


def total_id(t) -> str:
    dtype = str(t.dtype).removeprefix("torch.")
    kind = "labels" if t.teacher is None else f"teacher-{t.teacher}"
    weights = "weights-" if t.masked == "weights" else ""
    return f"{weights}triton-{dtype}-{kind}-{t.activation}"


@pytest.mark.parametrize("total", TOTALS, ids=total_id)
def test_total_against_float64(total):
    fast_tests.test_total_against_float64.hypothesis.inner_test(total)


FAST_TESTS = [
    ("perceptual_family", "both", "adapter", None),
    ("perceptual_family", "both", "max", 4),
    ("perceptual_family", "conv, relu, pool", "avg", 4),
    ("perceptual_family_in_half_precision", BF16),
    ("perceptual_family_in_half_precision", HALF),
    ("looked_up_targets_behind_biases_and_normalisation", "adapter", "labels"),
    ("looked_up_targets_behind_biases_and_normalisation", "max", "topk"),
    ("stride_two_levels_and_style", "labels"),
    ("style_targets", (1, 3, 21, 18), None),
    ("float16_chain_neither_underflows_nor_overflows", 65536.0, "mean", None),
    ("an_incoming_gradient_of_zero_or_minus_one", "topk"),
    ("an_empty_image_among_others",),
    *(("a_confident_sigmoid_keeps_its_difference_to_labels", *case)
      for case in [(1, FLOAT), (3, BF16)]),
    *(("no_images", kind, "mean") for kind in fast_tests.KINDS),
    *(("nothing_valid_is_zero_and_connected", kind, None) for kind in fast_tests.KINDS),
    *(("a_prediction_equal_to_its_target_gives_zero", *case)
      for case in [("max", "softmax", BF16, None), ("avg", "sigmoid", HALF, None),
                   ("stride", "none", BF16, None), ("max", "softmax", FLOAT, 2)]),
]  # fmt: skip


@pytest.mark.parametrize("case", FAST_TESTS, ids=str)
def test_as_the_cpu_path(case, request):
    name, *arguments = case
    test = getattr(fast_tests, f"test_{name}")
    names = test.__code__.co_varnames[: test.__code__.co_argcount]
    arguments += [request.getfixturevalue(n) for n in names if n in ("decide", "monkeypatch")]
    test(*arguments)


@pytest.mark.usefixtures("shipped_tiles")
@pytest.mark.parametrize("net", ["max", "avg", "adapter"])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_biases_and_normalisation_in_blocks(kind, net, monkeypatch):
    """Where a pool's winner can be in doubt, through the routes that were saved."""
    forms = launched(monkeypatch)
    taps, made = {"pool1": 0.5, "pool2": 1.0}, fast_tests.NETS[net]()

    def make(backend, **options):
        return PerceptualLoss(
            made, taps, {}, activation="softmax", reduction="none", backend=backend, **options
        )

    pred, teacher = torch.randn(2, 2, made.in_channels, 21, 18)
    target = teacher.argmax(dim=1) if kind == "labels" else teacher
    plain = make("reference", compute_dtype=BF16)(pred, target)
    exact = make("reference", compute_dtype=torch.float64)
    x = pred.clone().requires_grad_()
    value = make("fast", compute_dtype=BF16)(x, target)
    truth, x64, walk = fast_tests.truth_and_routed(exact, value, pred, target, None, kind)
    (grad,) = torch.autograd.grad(value.sum(), x)
    (routed,) = torch.autograd.grad(truth.sum(), x64)
    fast_tests.check_value(value.detach(), plain, truth.detach(), BF16)
    fast_tests.check_gradient(grad, routed, walk, BF16)
    assert forms


# ----------------------------------------------------------------------------- the saved tensors


@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("kind", ["dense", "labels", "topk", "features"])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_saved_tensors_are_the_contract(dtype, kind, pool):
    loss = fast_tests.fast(5, "2,1", pool=pool, compute_dtype=dtype, level_weights=(1, 1))
    pred = 2 * torch.randn(2, 5, 9, 26)
    target = fast_tests.target_of(kind, pred, loss)

    def saved() -> tuple[Plan, dict[str, Tensor]]:
        return left_by(loss(pred.clone().requires_grad_(), target))

    p, ours = saved()
    with decided(forward="compiled", backward="compiled"):
        _, theirs = saved()
    assert list(ours) == list(p.saved()) == list(theirs)
    channels = {name: step.out_channels for step in p.steps for name in (step.relu, step.pool)}
    for name, (shape, contract) in p.saved().items():
        mine, other = ours[name], theirs[name]
        assert (mine.shape, mine.dtype) == (shape, contract) == (other.shape, other.dtype)
        if contract == torch.uint8:
            unpack = unpack_code if name.startswith("code") else unpack_mask
            c = channels[name.partition(".")[2]]
            # Only bfloat16's rounding of z, which the kernels do without, breaks a tie.
            swapped = unpack(mine, c) != unpack(other, c)
            assert swapped.double().mean() <= (0.02 if dtype == BF16 else 0)
        else:
            assert mine.isfinite().all()
            assert error(mine, other) < (0.05 if dtype == BF16 else 1e-5)


# ------------------------------------------------------------------------------- near convergence


@pytest.mark.parametrize("kind", ["labels", "teacher"])
@pytest.mark.parametrize(("c", "raised"), [(19, 8.0), (150, 12.0), (1203, 14.0)])
def test_bfloat16_holds_on_peaked_maps(c, raised, kind):
    logits, labels = fast_tests.peaked(c, raised, 8)
    logits, labels = logits[..., :32, :32].bfloat16().contiguous(), labels[..., :32, :32]
    target = labels.contiguous()
    if kind == "teacher":
        target = (logits + 0.5 * torch.randn(logits.shape)).bfloat16()
    net = LossNet.vgg(c)
    exact = GenericPerceptualLoss(c, net, backend="reference")
    truth, grad64 = value_and_grad(exact, logits.double(), fast_tests.doubled(target))
    value, grad = value_and_grad(GenericPerceptualLoss(c, net, backend="fast"), logits, target)
    assert error(value, truth) < (0.1 if c == 1203 else 0.05)
    assert fast_tests.cosine(grad, grad64) >= 0.95


@pytest.mark.usefixtures("shipped_tiles")
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_no_order_of_programs_changes_a_bit(kind):
    blocks = "1,1" if kind == "dense" else "1"
    levels = [1.0] * len(blocks.split(","))
    loss = fast_tests.fast(5, blocks, compute_dtype=BF16, level_weights=levels)
    pred = torch.randn(2, 5, 6, 33)
    target = fast_tests.target_of(kind, pred, loss)
    first = value_and_grad(loss, pred, target)
    assert len(ORDERS) == 3
    for order in ORDERS:
        with program_order(order):
            assert all(map(torch.equal, value_and_grad(loss, pred, target), first))


def test_orders_are_orders():
    programs = [(i, 0, 0) for i in range(9)]
    assert backward(programs) == programs[::-1]
    assert sorted(shuffled(programs)) == programs != shuffled(programs)


# ------------------------------------------------------------------------------------ allocations


class Allocations(TorchDispatchMode):
    """Shapes of all memory that operators return and that nobody had before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        for t in torch.utils._pytree.tree_leaves(given):
            if isinstance(t, Tensor):
                self.known.add(t.untyped_storage().data_ptr())
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.known.add(t.untyped_storage().data_ptr())
                self.made.append(t)  # held: nobody else gets its address
        return out


def unseen(launch):
    """The interpreter copies its arguments, which a GPU does not."""

    def run(*args, **meta):
        with _disable_current_modes():
            return launch(*args, **meta)

    return run


C, PADDED = 37, 64


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
@pytest.mark.parametrize("kind", ["labels", "topk", "dense"])
def test_nothing_else_has_the_classes(kind, dtype, decide, monkeypatch):
    """Of C channels: one chunk of u for a list, one of the carried map and δ for a dense target."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    forms = launched(monkeypatch)
    for name in (
        "branch",
        "conv_block",
        "diff_reduce",
        "label_conv",
        "relu",
        "relu_pool",
        "softmax_pack",
        "unit_diff",
    ):
        monkeypatch.setattr(kernel(name), "launch", unseen(kernel(name).launch))
    loss = GenericPerceptualLoss(C, "1,1", widths=(8, 16), backend="fast", compute_dtype=dtype)
    pred = torch.randn(3, C, 20, 26)
    target = fast_tests.target_of(kind, pred, loss)
    whole, _ = left_by(loss(pred.clone().requires_grad_(), target))
    forms.clear()
    decide(strip_mb=(peak(whole, (1,) * len(whole.rows), whole.rows) + 1) / MIB)
    with Inside(Allocations) as inside:
        value_and_grad(loss, pred, target)
    mode, _ = inside.modes  # of the forward
    assert len(forms) == 3 * 2  # every image a chunk of its own, two blocks
    wide = [t for t in mode.made if {C, PADDED} & set(t.shape)]
    maps = [t for t in wide if PADDED in t.shape]
    assert [tuple(t.shape) for t in maps] == 3 * [(2 if kind == "dense" else 1, 1, 20, 26, PADDED)]
    assert {t.dtype for t in maps} == {dtype}
    assert not [t for t in wide if PADDED not in t.shape]


@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_deep_segments_go_over_all_images(kind, decide, monkeypatch):
    """As on a GPU, where the workspace holds one image's class maps."""
    forms = launched(monkeypatch)
    decide(strip_mb=None)
    words = {"widths": (8, 16), "backend": "fast", "compute_dtype": BF16, "reduction": "none"}
    words |= {"level_weights": (1.0, 0.25)}
    loss = GenericPerceptualLoss(C, "1,1", **words)
    pred = torch.randn(3, C, 12, 16)
    target = fast_tests.target_of(kind, pred, loss)
    whole = value_and_grad(loss, pred, target)
    plan, _ = left_by(loss(pred.clone().requires_grad_(), target))
    assert plan.images == (3, 3)
    least = (peak(plan, (1, 3), plan.rows) + 1) / MIB
    loss = GenericPerceptualLoss(C, "1,1", **words, workspace_mb=least)
    forms.clear()
    parts = value_and_grad(loss, pred, target)
    assert left_by(loss(pred.clone().requires_grad_(), target))[0].images == (1, 3)
    assert len(forms) == 2 * (3 + 1)  # the look at the plan, too
    assert all(map(torch.equal, parts, whole))


def test_the_recorder_sees_memory_and_not_views():
    x = torch.zeros(4, 6)
    with Allocations() as mode:
        y = x.t()[1:] + 1
        y.add_(x.t()[1:])
        x.new_empty(7)
    assert [tuple(t.shape) for t in mode.made] == [(5, 4), (7,)]


# -------------------------------------------------------------------------------------- examples


def test_a_segmentation_loss_trains():
    """The sum of both terms falls along its own gradient."""
    loss = SegmentationLoss(5, net="1,1", widths=(8, 16), backend="fast")
    x = torch.randn(2, 5, 16, 20).bfloat16().float().requires_grad_()
    labels = torch.randint(5, (2, 16, 20))
    values = []
    for _ in range(3):
        value = loss(x.bfloat16(), labels)
        (grad,) = torch.autograd.grad(value, x)
        values.append(float(value.detach()))
        x = (x - 200 * grad).detach().requires_grad_()
    assert values[0] > values[1] > values[2]


def test_average_pools_of_a_chain_of_modules():
    """`from_sequential` without anything but convolutions, ReLU and pools."""
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    net = LossNet.from_sequential(layers)
    loss = GenericPerceptualLoss(8, net, backend="fast", compute_dtype=BF16)
    pred, target = torch.randn(2, 2, 8, 9, 14)
    top = TopK(*target.softmax(1).topk(2, dim=1))
    for goal in (target, top):
        exact = GenericPerceptualLoss(8, net, backend="reference")
        truth, grad64 = value_and_grad(exact, pred.double(), fast_tests.doubled(goal))
        value, grad = value_and_grad(loss, pred, goal)
        assert error(value, truth) < 0.02
        assert error(grad, grad64) < 0.06
