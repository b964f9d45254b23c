"""Numbers may be Python's, numpy's or 0-dim tensors, wherever the interface takes one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss

X, T = torch.randn(2, 4, 32, 36), torch.randn(2, 4, 32, 36)
Y = torch.randint(0, 3, (2, 32, 36))

FLOATS = {"numpy": np.float32, "numpy double": np.float64, "tensor": torch.tensor}
INTS = {"numpy": np.int64, "numpy int32": np.int32, "tensor": torch.tensor}


@pytest.mark.parametrize("kind", FLOATS)
def test_floats(kind, backend):
    make = FLOATS[kind]
    plain = GenericPerceptualLoss(
        4, level_weights=[0.25, 0, 0, 0.5, 1], temperature=2.0, workspace_mb=64, backend=backend
    )
    got = GenericPerceptualLoss(
        4,
        level_weights=[make(w) for w in (0.25, 0.0, 0.0, 0.5, 1.0)],
        temperature=make(2.0),
        workspace_mb=make(64.0),
        backend=backend,
    )
    assert torch.equal(got(X, T), plain(X, T))
    assert repr(got) == repr(plain)
    layers = {"relu1_1": 0.5}, {"pool2": 2.0}
    plain = PerceptualLoss(got.net, *layers, tv_weight=0.5, backend=backend)
    layers = {"relu1_1": make(0.5)}, {"pool2": make(2.0)}
    got = PerceptualLoss(got.net, *layers, tv_weight=make(0.5), backend=backend)
    assert torch.equal(got(X, T), plain(X, T))
    plain = SegmentationLoss(
        4, gpl_weight=0.5, ce_weight=2.0, label_smoothing=0.25, class_weight=[1.0, 0.5, 2.0, 1.0],
        backend=backend,
    )  # fmt: skip
    got = SegmentationLoss(
        4, gpl_weight=make(0.5), ce_weight=make(2.0), label_smoothing=make(0.25), backend=backend,
        class_weight=[make(w) for w in (1.0, 0.5, 2.0, 1.0)],
    )  # fmt: skip
    assert torch.equal(got(X, Y), plain(X, Y))


@pytest.mark.parametrize("kind", INTS)
def test_integers(kind, backend):
    make = INTS[kind]
    plain = GenericPerceptualLoss(
        4, "1,1", widths=(8, 8), kernel_size=5, seed=3, ignore_index=2, backend=backend
    )
    got = GenericPerceptualLoss(
        make(4), "1,1", widths=[make(8), make(8)], kernel_size=make(5), seed=make(3),
        ignore_index=make(2), backend=backend,
    )  # fmt: skip
    assert got.fingerprint() == plain.fingerprint()
    assert torch.equal(got(X, Y), plain(X, Y))
    assert SegmentationLoss(make(4), ignore_index=make(2)).gpl.options.ignore_index == 2


def test_level_weights_from_an_iterator(backend):
    weights = [0.0, 0.5, 0.0, 0.0, 1.0]
    want = GenericPerceptualLoss(4, level_weights=weights, backend=backend)
    for given in (iter(weights), (w for w in weights), np.array(weights), torch.tensor(weights)):
        loss = GenericPerceptualLoss(4, level_weights=given, backend=backend)
        for _ in range(2):
            assert torch.equal(loss(X, T), want(X, T))
        assert loss.encode(T).features.keys() == {"pool2", "pool5"}


def test_lists_are_as_good_as_tuples_and_text():
    plain = GenericPerceptualLoss(4, "1,2", widths=(8, 8), init=("normal", 0.5))
    got = GenericPerceptualLoss(4, [1, 2], widths=[8, 8], init=["normal", 0.5])
    assert got.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_by_its_name(name, backend):
    plain = GenericPerceptualLoss(4, compute_dtype=torch.bfloat16, backend=backend)
    assert torch.equal(
        GenericPerceptualLoss(4, compute_dtype=name, backend=backend)(X, T), plain(X, T)
    )


WRONG = {
    "in_channels bool": lambda: GenericPerceptualLoss(True),
    "in_channels float": lambda: GenericPerceptualLoss(4.0),
    "num_classes bool": lambda: SegmentationLoss(True),
    "num_classes numpy bool": lambda: SegmentationLoss(np.bool_(True)),
    "ignore_index bool": lambda: GenericPerceptualLoss(4, ignore_index=True),
    "ignore_index float": lambda: GenericPerceptualLoss(4, ignore_index=255.0),
    "ignore_index text": lambda: GenericPerceptualLoss(4, ignore_index="255"),
    "ignore_index beyond int64": lambda: SegmentationLoss(4, ignore_index=2**63),
    "ignore_index far below": lambda: SegmentationLoss(4, ignore_index=-(2**63) - 1),
    "seed bool": lambda: GenericPerceptualLoss(4, seed=True),
    "kernel_size bool": lambda: GenericPerceptualLoss(4, kernel_size=True),
    "temperature bool": lambda: GenericPerceptualLoss(4, temperature=True),
    "temperature bool tensor": lambda: GenericPerceptualLoss(4, temperature=torch.tensor(True)),
    "temperature of two": lambda: GenericPerceptualLoss(4, temperature=torch.ones(2)),
    "temperature inf": lambda: GenericPerceptualLoss(4, temperature=np.float32("inf")),
    "temperature zero": lambda: GenericPerceptualLoss(4, temperature=np.float32(0)),
    "temperature text": lambda: GenericPerceptualLoss(4, temperature="2"),
    "temperature None": lambda: GenericPerceptualLoss(4, temperature=None),
    "level_weights text": lambda: GenericPerceptualLoss(4, level_weights="11111"),
    "level_weights bools": lambda: GenericPerceptualLoss(4, level_weights=[True] * 5),
    "level_weights number": lambda: GenericPerceptualLoss(4, level_weights=1.0),
    "level_weights nan": lambda: GenericPerceptualLoss(4, level_weights=[np.nan, 0, 0, 0, 1]),
    "gpl_weight bool": lambda: SegmentationLoss(4, gpl_weight=True),
    "gpl_weight nan": lambda: SegmentationLoss(4, gpl_weight=np.float32("nan")),
    "label_smoothing two": lambda: SegmentationLoss(4, label_smoothing=torch.tensor(2.0)),
    "class_weight text": lambda: SegmentationLoss(4, class_weight="1111"),
    "class_weight bools": lambda: SegmentationLoss(4, class_weight=[True] * 4),
    "class_weight three": lambda: SegmentationLoss(4, class_weight=[1.0] * 3),
    "class_weight meta": lambda: SegmentationLoss(4, class_weight=torch.ones(4, device="meta")),
    "compute_dtype int": lambda: GenericPerceptualLoss(4, compute_dtype=torch.int32),
    "compute_dtype name": lambda: GenericPerceptualLoss(4, compute_dtype="half"),
    "feature_layers bool": lambda: PerceptualLoss(LossNet.vgg(4), {"pool1": True}),
    "tv_weight text": lambda: PerceptualLoss(LossNet.vgg(4), {"pool1": 1}, tv_weight="1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_number_is_named(case):
    name = case.split()[0]
    with pytest.raises((ValueError, TypeError), match=rf"{name}.*: got .*expected"):
        WRONG[case]()
