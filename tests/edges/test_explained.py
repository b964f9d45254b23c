"""`explain` and `repr` of every loss: what it says is what happens, on meta tensors too."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, TopK

N, C, SIZE = 2, 5, (48, 40)
X, T = torch.randn(N, C, *SIZE), torch.randn(N, C, *SIZE)
Y = torch.randint(0, C, (N, *SIZE))
MASK = torch.rand(N, *SIZE) > 0.3
WEIGHTS = MASK * torch.rand(N, *SIZE)
NET = LossNet.vgg(C, (1, 2), (8, 8))
SPARSE = TopK(*T.softmax(dim=1).topk(2, dim=1))

CASES = {
    "dense": (lambda o: GenericPerceptualLoss(C, NET, **o), (X, T)),
    "labels": (lambda o: GenericPerceptualLoss(C, NET, ignore_index=2, **o), (X, Y)),
    "topk, mask": (lambda o: GenericPerceptualLoss(C, NET, **o), (X, SPARSE, MASK)),
    "total": (lambda o: SegmentationLoss(C, net=NET, **o), (X, Y)),
    "total, mask": (lambda o: SegmentationLoss(C, net=NET, ignore_index=2, **o),
                    (X, Y, None, MASK)),
    "weights": (lambda o: GenericPerceptualLoss(C, NET, **o), (X, T, WEIGHTS)),
    "total, weights": (lambda o: SegmentationLoss(C, net=NET, ignore_index=2, **o),
                       (X, Y, None, WEIGHTS)),
    "total, weights, teacher": (lambda o: SegmentationLoss(C, net=NET, ignore_index=2, **o),
                                (X, Y, T, WEIGHTS.half())),
    "total, teacher": (lambda o: SegmentationLoss(C, net=NET, **o), (X, Y, T)),
    "total, temperature": (lambda o: SegmentationLoss(C, net=NET, temperature=2.0, **o), (X, Y)),
    "total, small logits": (lambda o: SegmentationLoss(C, net=NET, **o), (X[:, :, ::2, ::2], Y)),
    "total, no gpl": (lambda o: SegmentationLoss(C, net=NET, gpl_weight=0, **o), (X, Y)),
    "total, no ce": (lambda o: SegmentationLoss(C, net=NET, ce_weight=0, **o), (X, Y)),
    "style": (lambda o: PerceptualLoss(NET, {"relu1_1": 1.0}, {"relu2_1": 1.0}, **o), (X, T)),
    "style of another": (lambda o: PerceptualLoss(NET, {"pool1": 1.0}, {"relu2_1": 1.0}, **o),
                         (X, T, T[:1])),
    "smooth, masked": (lambda o: PerceptualLoss(NET, {"pool1": 1.0}, tv_weight=0.1, **o),
                       (X, T, None, MASK)),
    "parts": (lambda o: SegmentationLoss(C, net=NET, return_parts=True, **o), (X, Y)),
    "smooth": (lambda o: PerceptualLoss(NET, {"pool1": 1.0}, tv_weight=0.1, **o), (X, T)),
}  # fmt: skip


def packs(net):
    return {t.untyped_storage()._cdata for t in net.cached_tensors()}


def kept_bytes(loss, args):
    """What autograd holds after the call besides the caller's tensors and the weights."""
    pred, *rest = args
    pred = pred.clone().requires_grad_()
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(pred, *rest)
    value = sum(value.values()) if isinstance(value, dict) else value
    given = [pred, *(t for t in rest if isinstance(t, torch.Tensor))]
    own = {t.untyped_storage()._cdata for t in given} | packs(loss.net)
    assert value.requires_grad
    return sum(size for storage, size in kept.items() if storage not in own)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved(case, dtype, backend):
    make, args = CASES[case]
    loss = make({"backend": backend, "compute_dtype": dtype})
    found = loss.explain(*args)
    assert found.backend == ("reference" if case == "total, no gpl" else backend)
    slack = 0 if found.backend == "fast" else 0.05
    got = kept_bytes(loss, args)
    assert abs(found.bytes_saved - got) <= slack * got + 16 * N  # scalars of each image
    assert "GFLOP" in str(found)


def test_in_a_loop_without_gradients(backend):
    loss = GenericPerceptualLoss(C, NET, backend=backend)
    want = loss.explain(X, T).bytes_saved
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert loss.explain(X, T).bytes_saved == want


@pytest.mark.parametrize("case", CASES)
def test_meta_tensors_stand_for_those_of_the_default_device(case):
    make, args = CASES[case]
    loss = make({})
    meta = tuple(None if t is None else t.to("meta") for t in args)
    want, found = loss.explain(*args), loss.explain(*meta)
    assert (found.backend, found.reason, found.flops) == (want.backend, want.reason, want.flops)
    assert found.bytes_saved == want.bytes_saved
    assert found.workspace_bytes == want.workspace_bytes


def test_nothing_is_computed_and_little_looked_at():
    """Of an input that no memory holds."""
    huge = torch.empty(4, 1203, 4096, 4096, device="meta")
    labels = torch.empty(4, 4096, 4096, dtype=torch.int64, device="meta")
    found = SegmentationLoss(1203, ignore_index=None, compute_dtype="bfloat16").explain(
        huge, labels
    )
    assert found.backend == "fast"
    assert found.bytes_saved > 2**30


def test_what_makes_two_losses_differ_is_in_their_repr():
    losses = [
        GenericPerceptualLoss(5),
        GenericPerceptualLoss(6),
        GenericPerceptualLoss(5, seed=1),
        GenericPerceptualLoss(5, init="xavier_normal"),
        GenericPerceptualLoss(5, init=("normal", 0.01)),
        GenericPerceptualLoss(5, "1,1"),
        GenericPerceptualLoss(5, pool="avg"),
        GenericPerceptualLoss(5, kernel_size=5),
        GenericPerceptualLoss(5, widths=(32, 64, 128, 256, 512)),
        GenericPerceptualLoss(5, level_weights=[1, 1, 1, 1, 1]),
        GenericPerceptualLoss(5, temperature=2.0),
        GenericPerceptualLoss(5, activation="sigmoid"),
        GenericPerceptualLoss(5, target_activation="none"),
        GenericPerceptualLoss(5, ignore_index=255),
        GenericPerceptualLoss(5, reduction="sum"),
        GenericPerceptualLoss(5, compute_dtype=torch.bfloat16),
        GenericPerceptualLoss(5, backend="reference"),
        GenericPerceptualLoss(5, workspace_mb=64),
        GenericPerceptualLoss(5, LossNet.vgg(3).with_input_adapter(5)),
        GenericPerceptualLoss(5, LossNet.vgg(3).with_input_adapter(5, seed=1)),
        SegmentationLoss(5),
        SegmentationLoss(5, gpl_weight=0.5),
        SegmentationLoss(5, ce_weight=0.5),
        SegmentationLoss(5, class_weight=[1, 2, 1, 1, 1]),
        SegmentationLoss(5, label_smoothing=0.1),
        SegmentationLoss(5, gpl_ignore=True),
        SegmentationLoss(5, ignore_index=3),
        SegmentationLoss(5, return_parts=True),
        PerceptualLoss(NET, {"pool1": 1.0}),
        PerceptualLoss(NET, {"pool1": 2.0}),
        PerceptualLoss(NET, {"pool1": 1.0}, {"pool1": 1.0}),
        PerceptualLoss(NET, {"pool1": 1.0}, tv_weight=1.0),
        PerceptualLoss(NET, {"pool1": 1.0}, activation="softmax"),
    ]
    texts = [repr(loss) for loss in losses]
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) < 1000


# By keyword: the words without it, and with it.
WITH = {
    "net": ({}, {"net": "1,1"}),
    "widths": ({}, {"widths": (32, 64, 128, 256, 512)}),
    "kernel_size": ({}, {"kernel_size": 5}),
    "pool": ({}, {"pool": "avg"}),
    "init": ({}, {"init": ("uniform", 0.1)}),
    "seed": ({}, {"seed": 1}),
    "level_weights": ({}, {"level_weights": [0, 0, 0, 1, 1]}),
    "activation": ({}, {"activation": "sigmoid"}),
    "target_activation": ({}, {"target_activation": "none"}),
    "criterion": ({}, {"criterion": "l1"}),
    "normalize_features": ({}, {"normalize_features": True}),
    "temperature": ({}, {"temperature": 2.0}),
    "ignore_index": ({}, {"ignore_index": (3, 255)}),
    "reduction": ({}, {"reduction": "sum"}),
    "compute_dtype": ({}, {"compute_dtype": "bfloat16"}),
    "backend": ({}, {"backend": "reference"}),
    "workspace_mb": ({}, {"workspace_mb": 64}),
    "mode": ({}, {"mode": "multilabel"}),
    "pos_weight": ({"mode": "multilabel"}, {"mode": "multilabel", "pos_weight": [2.0] * C}),
    "gpl_weight": ({}, {"gpl_weight": 0.5}),
    "ce_weight": ({}, {"ce_weight": 0.5}),
    "class_weight": ({}, {"class_weight": [1, 2, 1, 1, 1]}),
    "label_smoothing": ({}, {"label_smoothing": 0.1}),
    "gpl_ignore": ({}, {"gpl_ignore": True}),
    "return_parts": ({}, {"return_parts": True}),
    "feature_layers": ({}, {"feature_layers": {"pool1": 1.0}}),
    "style_layers": ({}, {"style_layers": {"pool1": 1.0}}),
    "tv_weight": ({}, {"tv_weight": 1.0}),
}


def keywords(function):
    """Of a signature, with those of a TypedDict that it takes the rest by."""
    for name, p in inspect.signature(function, eval_str=True).parameters.items():
        if p.kind is p.VAR_KEYWORD:
            yield from typing.get_type_hints(*typing.get_args(p.annotation))
        elif name not in ("self", "in_channels", "num_classes"):
            yield name


@pytest.mark.parametrize(
    ("taker", "usual"),
    [
        (GenericPerceptualLoss, {"in_channels": C}),
        (SegmentationLoss, {"num_classes": C}),
        (PerceptualLoss, {"net": NET, "feature_layers": {"relu1_1": 1.0}}),
    ],
)
def test_every_keyword_is_in_the_repr(taker, usual):
    for name in set(keywords(taker.__init__)) - {"net" if "net" in usual else ""}:
        without, with_it = WITH[name]
        assert repr(taker(**usual | with_it)) != repr(taker(**usual | without)), name


def test_networks_with_foreign_weights_are_told_apart():
    chains = [torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1)) for _ in range(2)]
    a, b = (repr(GenericPerceptualLoss(3, LossNet.from_sequential(chain))) for chain in chains)
    assert a != b


def test_parts_by_constructor_and_call():
    net, args = NET, (X, T)
    parts = PerceptualLoss(net, {"pool1": 1.0}, return_parts=True)
    assert set(parts(*args)) == {"loss_feature", "loss_style", "loss_tv"}
    assert parts(*args, return_parts=False).dim() == 0
    assert set(PerceptualLoss(net, {"pool1": 1.0})(*args, return_parts=True)) == set(parts(*args))
