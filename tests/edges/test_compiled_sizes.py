"""One compiled loss for all sizes: eager's values and gradients, and how many graphs they cost."""

from __future__ import annotations

import pytest
import torch
from cases import agree, value_and_grad
from torch import nn
from torch._dynamo import mark_dynamic
from torch._dynamo.backends.registry import lookup_backend

from gpl_fast import (
    GenericPerceptualLoss,
    LossNet,
    PerceptualLoss,
    SegmentationLoss,
    TargetFeatures,
    TopK,
    functional,
)

C = 5
SMALL = {"net": "1,1", "widths": (8, 8)}
NET = LossNet.vgg(C, (1, 1), (8, 8))

# (N, H, W): the second differs from the first in each, or torch would make only what has changed a
# symbol and count one graph more.
SIZES = [
    (2, 24, 40), (3, 28, 44), (2, 32, 40), (4, 40, 24), (2, 33, 47), (5, 32, 32),
    (2, 48, 64), (3, 36, 28), (2, 24, 24), (6, 25, 33), (2, 8, 56),
]  # fmt: skip
WAYS = ("automatic", "dynamic", "marked")


class Compiled:
    """A callable, compiled; `graphs` counts what it took."""

    def __init__(self, call, way: str = "automatic", backend: str = "aot_eager") -> None:
        self.eager, self.graphs = call, 0
        self._make = lookup_backend(backend)
        dynamic = True if way == "dynamic" else None
        self.call = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=self._count)
        self.marked = way == "marked"

    def _count(self, graph, inputs):
        self.graphs += 1
        return self._make(graph, inputs)

    def __call__(self, x, *args):
        if self.marked:
            for t in (x, *args):
                mark(t)
        return self.call(x, *args)


def mark(t: object) -> None:
    """All dimensions of what an image has but its channels."""
    if isinstance(t, torch.Tensor):
        for dim in range(t.dim()):
            if t.dim() < 4 or dim != 1:
                mark_dynamic(t, dim)
    elif isinstance(t, TopK):
        mark(t.values), mark(t.indices)
    elif isinstance(t, TargetFeatures):
        for e in t.features.values():
            mark(e)


def logits(n, h, w):
    return torch.randn(n, C, h, w)


def labels(n, h, w):
    return torch.randint(0, C, (n, h, w))


def mask(n, h, w):
    return torch.rand(n, h, w) > 0.2


def topk(n, h, w):
    return TopK(*logits(n, h, w).softmax(1).topk(2, dim=1))


def smaller(n, h, w):
    return logits(n, h // 2 + 1, w // 2)


ENCODER = GenericPerceptualLoss(C, **SMALL)


def features(n, h, w):
    return ENCODER.encode(logits(n, h, w))


def gpl(backend):
    return GenericPerceptualLoss(C, backend=backend, **SMALL)


def total(backend, **words):
    return SegmentationLoss(C, backend=backend, **SMALL, **words)


def weighted(backend):
    return total(backend, class_weight=[1, 2, 3, 4, 5], label_smoothing=0.1, temperature=2.0)


def johnson(backend):
    return PerceptualLoss(NET, {"relu2_1": 1.0}, {"relu1_1": 1.0}, tv_weight=0.1, backend=backend)


def of_module(backend):
    torch.manual_seed(1)
    first = [nn.Conv2d(C, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8)]
    module = nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU())
    net = LossNet.from_module(module, {"a": "1", "b": "5"})
    return PerceptualLoss(net, {"a": 1.0, "b": 1.0}, {"b": 1.0}, backend=backend)


def behind_adapter(backend):
    torch.manual_seed(1)
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
    net = LossNet.from_sequential(chain, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.2])
    return GenericPerceptualLoss(C, net.with_input_adapter(C), backend=backend)


# A loss, and what makes its further arguments of a size.
CASES = {
    "labels": (gpl, labels),
    "dense": (gpl, logits),
    "topk": (gpl, topk),
    "features": (gpl, features),
    "resized": (gpl, smaller),
    "masked": (gpl, logits, mask),
    "resized, its mask": (gpl, smaller, lambda n, h, w: mask(n, h // 2 + 1, w // 2)),
    "channels_last": (gpl, lambda *s: logits(*s).to(memory_format=torch.channels_last)),
    "total": (total, labels),
    "total, weighted": (weighted, labels),
    "total, teacher": (total, labels, logits, mask),
    "johnson": (johnson, logits),
    "johnson, style": (johnson, logits, lambda n, h, w: logits(1, h + 3, w // 2)),
    "adapter, list": (behind_adapter, labels),
    "adapter": (behind_adapter, logits, mask),
    "module": (of_module, logits),
}
# Way, backend, cases: every kind of target once, every way with each loss.
RUNS = {
    ("automatic", "fast"): tuple(name for name in CASES if name != "module"),
    ("dynamic", "fast"): ("dense", "topk", "total", "johnson"),
    ("marked", "fast"): ("labels", "features", "total, teacher", "johnson, style"),
    ("automatic", "reference"): ("masked", "johnson", "adapter", "module"),
    ("dynamic", "reference"): ("dense", "module"),
    ("marked", "reference"): ("total", "module"),
}


def compare(compiled, loss, x, *args):
    """The compiled one first: nothing has been made for it."""
    got, want = value_and_grad(compiled, x, *args), value_and_grad(loss, x, *args)
    if len(x):
        agree(got, want)
    else:
        assert [t.shape for t in got] == [t.shape for t in want]
        assert got[0] == want[0] == 0


@pytest.mark.parametrize(
    ("way", "backend", "name"), [(*run, name) for run, names in RUNS.items() for name in names]
)
def test_two_graphs_for_all_sizes(way, backend, name):
    make, *kinds = CASES[name]
    loss = make(backend)
    compiled = Compiled(loss, way, "aot_eager" if backend == "fast" else "eager")
    for size in SIZES:
        compare(compiled, loss, logits(*size), *(kind(*size) for kind in kinds))
    # A size that stored features hold as a number is a symbol once it has changed.
    assert compiled.graphs <= (1 if way == "marked" and name != "features" else 2)


@pytest.mark.parametrize("way", WAYS)
def test_features_from_a_file(way, tmp_path):
    loss, path = gpl("fast"), tmp_path / "features.safetensors"
    compiled = Compiled(loss, way)
    for size in SIZES[:4]:
        features(*size).save(path)
        compare(compiled, loss, logits(*size), TargetFeatures.load(path))
    assert compiled.graphs <= 2


@pytest.mark.parametrize("way", WAYS)
def test_logits_smaller_than_their_labels(way):
    loss = total("fast")
    compiled = Compiled(loss, way)
    for size in SIZES:
        compare(compiled, loss, smaller(*size), labels(*size))
    assert compiled.graphs <= 2


@pytest.mark.parametrize("name", ["labels", "total", "johnson", "features"])
def test_no_image_and_one_image_cost_a_graph_each(name):
    make, *kinds = CASES[name]
    loss = make("fast")
    compiled = Compiled(loss)
    for size in [*SIZES[:2], (0, 24, 36), (1, 24, 36), (7, 36, 24), (0, 9, 12), (1, 33, 21)]:
        compare(compiled, loss, logits(*size), *(kind(*size) for kind in kinds))
    assert compiled.graphs <= 4


@pytest.mark.parametrize("name", ["labels", "johnson"])
def test_instances_of_one_size(name):
    """Crops of an image's objects: as many as there are, none at first."""
    make, *kinds = CASES[name]
    loss = make("fast")
    compiled = Compiled(loss)
    for n in (0, 3, 1, 5, 0, 64, 7, 1, 12, 2):
        compare(compiled, loss, logits(n, 16, 16), *(kind(n, 16, 16) for kind in kinds))
    assert compiled.graphs <= 4


def test_squares_at_first_cost_a_graph():
    loss = gpl("fast")
    compiled = Compiled(loss)
    for size in [(2, 32, 32), (3, 40, 40), (2, 33, 47), (4, 40, 24), (2, 48, 48), (5, 28, 60)]:
        compare(compiled, loss, logits(*size), labels(*size))
    assert compiled.graphs <= 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["gpl_weight", "ce_weight", "tv_weight"])
def test_a_changed_weight_costs_a_graph(name, way, backend):
    loss = johnson(backend) if name == "tv_weight" else total(backend)
    args = (logits if name == "tv_weight" else labels)(*SIZES[0])
    compiled = Compiled(loss, way, "eager")
    for weight in (0.1, 0.2, 0.4, 0.7, 1.5):
        setattr(loss, name, weight)
        compare(compiled, loss, logits(*SIZES[0]), args)
    assert compiled.graphs <= 2


def test_a_changed_weight_beside_changing_sizes():
    loss = total("fast")
    compiled = Compiled(loss)
    for i, size in enumerate(SIZES):
        loss.gpl_weight = (i + 1) / 8
        compare(compiled, loss, logits(*size), labels(*size))
    assert compiled.graphs <= 3


def test_features_of_another_size_are_refused_when_the_graph_runs():
    loss = gpl("fast")
    compiled = Compiled(loss)
    for size in SIZES[:3]:
        compare(compiled, loss, logits(*size), features(*size))
    with pytest.raises(ValueError, match="got those of a 24 x 40 target, expected 25 x 41"):
        compiled(logits(2, 25, 41), features(2, 24, 40))


# ------------------------------------------------------------------------------ plain functions


def plain_gpl(x, target, weight=1.0, **options):
    return functional.generic_perceptual_loss(
        x, target, NET, level_weights=[0.5, weight], **options
    )


def plain_total(x, target, weight=0.1, **options):
    return functional.segmentation_loss(x, target, NET, gpl_weight=weight, **options)


def plain_johnson(x, target, weight=0.1, **options):
    return functional.perceptual_loss(
        x, target, NET, feature_layers={"relu2_1": 1.0}, style_layers={"relu1_1": weight}, **options
    )


PLAIN = {"gpl": (plain_gpl, logits), "total": (plain_total, labels),
         "johnson": (plain_johnson, logits)}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_functions(name, way):
    function, kind = PLAIN[name]
    compiled = Compiled(function, way)
    for size in SIZES:
        compare(compiled, function, logits(*size), kind(*size))
    assert compiled.graphs <= 2


@pytest.mark.parametrize("name", PLAIN)
def test_numbers_given_to_plain_functions(name, backend):
    """A weight that the graph can multiply by is a symbol; what it cannot is a constant."""
    function, kind = PLAIN[name]
    x, target = logits(*SIZES[0]), kind(*SIZES[0])
    compiled = Compiled(lambda x, t, w: function(x, t, w, backend=backend), backend="eager")
    for weight in (0.1, 0.2, 0.4, 0.7, 1.5):
        compare(compiled, compiled.eager, x, target, weight)
    assert compiled.graphs <= (2 if name == "total" else 5)


@pytest.mark.parametrize("word", ["temperature", "label_smoothing", "workspace_mb", "ce_weight"])
def test_words_given_to_plain_functions(word):
    x, target = logits(*SIZES[0]), labels(*SIZES[0])
    compiled = Compiled(lambda x, t, number: plain_total(x, t, **{word: number}), backend="eager")
    for number in (0.25, 0.5, 0.75, 1):
        compare(compiled, compiled.eager, x, target, number)


@pytest.mark.parametrize(
    ("word", "number"), [("gpl_weight", -0.5), ("temperature", 0.0), ("ce_weight", float("inf"))]
)
def test_bad_numbers_are_refused_by_compiled_functions(word, number):
    def call(x, t, number):
        return functional.segmentation_loss(x, t, NET, **{word: number})

    compiled = Compiled(call, backend="eager")
    x, target = logits(*SIZES[0]), labels(*SIZES[0])
    for good in (0.25, 0.5):
        compiled(x, target, good)
    with pytest.raises(Exception, match=f"{word}.* got"):
        compiled(x, target, number)
