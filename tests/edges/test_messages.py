"""What an error advises is right for the one who reads it: advice that is followed works."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch

import gpl_fast
from gpl_fast import GenericPerceptualLoss, PerceptualLoss, SegmentationLoss, functional

X = torch.randn(2, 5, 32, 40)
Y = torch.randint(0, 5, (2, 32, 40))


@dataclass
class Output:
    logits: torch.Tensor


@pytest.fixture(scope="module")
def loss():
    return GenericPerceptualLoss(5)


def test_depth_maps_without_a_channel_are_told_to_unsqueeze_it():
    depth = GenericPerceptualLoss(1, activation="none")
    maps = torch.rand(2, 32, 40)
    for call in (
        lambda: depth(maps, maps.unsqueeze(1)),
        lambda: depth(maps.unsqueeze(1), maps),
        lambda: depth.encode(maps),
    ):
        with pytest.raises(ValueError, match=r"use \.unsqueeze\(1\)") as caught:
            call()
        # .long() would make a map of zeros of it.
        assert "long()" not in str(caught.value)
    assert depth(maps.unsqueeze(1), maps.unsqueeze(1)) == 0


def test_volumes_are_told_to_go_through_in_slices(loss):
    volume, labels = torch.randn(2, 5, 3, 32, 40), torch.randint(0, 5, (2, 3, 32, 40))
    with pytest.raises(ValueError, match=r"\.transpose\(1, 2\)\.flatten\(0, 1\)"):
        loss(volume, volume)
    slices = volume.transpose(1, 2).flatten(0, 1)
    with pytest.raises(ValueError, match=r"\.transpose\(1, 2\)\.flatten\(0, 1\)"):
        loss(slices, volume)
    total = SegmentationLoss(5)
    with pytest.raises(ValueError, match=r"labels\.flatten\(0, 1\)"):
        total(slices, labels)
    assert total(slices, labels.flatten(0, 1)).isfinite()


def test_multi_hot_labels_are_not_told_to_take_an_argmax_alone(loss):
    multi = torch.rand(2, 5, 32, 40) > 0.5
    for labels in (multi.long(), multi):
        with pytest.raises(ValueError, match="multi-hot") as caught:
            loss(X, labels)
        assert "argmax" in str(caught.value)
        assert "target_activation='none'" in str(caught.value)
    advised = GenericPerceptualLoss(5, activation="sigmoid", target_activation="none")
    assert advised(X, multi.float()).isfinite()


def test_one_image_and_channels_last_arrays(loss):
    with pytest.raises(ValueError, match=r"one image: use \.unsqueeze\(0\)"):
        loss(X[0], X)
    with pytest.raises(ValueError, match=r"\.permute\(0, 3, 1, 2\)"):
        loss(X.permute(0, 2, 3, 1), X)
    with pytest.raises(ValueError, match=r"in_channels \(num_classes\) = 7"):
        loss(torch.randn(2, 7, 32, 40), X)


OUTPUTS = {
    "dict": ({"out": X, "aux": X}, r"\['out'\], of \['out', 'aux'\]"),
    "ordered dict": (OrderedDict(out=X), r"\['out'\]"),
    "model output": (Output(X), r"\.logits"),
    "list": ([X, X], "call the loss for each"),
    "tuple": ((X,), "call the loss for each"),
    "numpy": (X.numpy(), r"torch\.from_numpy"),
    "None": (None, "NoneType, expected"),
    "text": ("map.png", "str, expected"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_model_outputs_in_place_of_a_tensor(kind, loss):
    given, advice = OUTPUTS[kind]
    with pytest.raises(TypeError, match=f"prediction: got .*{advice}"):
        loss(given, X)
    with pytest.raises(TypeError, match=f"target: got .*{advice}"):
        loss(X, given)
    if given is not None:
        with pytest.raises(TypeError, match=f"teacher: got .*{advice}"):
            SegmentationLoss(5)(X, Y, teacher=given)
    with pytest.raises(TypeError, match=f"labels: got .*{advice}"):
        SegmentationLoss(5)(X, given)


def kinds():
    nested = torch.nested.nested_tensor(list(X), layout=torch.jagged)
    return {
        "sparse": (X.to_sparse(), "to_dense()"),
        "nested": (nested, "to_padded_tensor(0.0)"),
        "quantized": (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), "dequantize()"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "nested", "quantized"])
def test_tensors_without_a_plain_layout(kind, loss):
    t, way_out = kinds()[kind]
    for call in (lambda: loss(t, X), lambda: loss(X, t), lambda: SegmentationLoss(5)(X, t)):
        with pytest.raises(TypeError, match=f"got a {kind} tensor") as caught:
            call()
        assert way_out in str(caught.value)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SegmentationLoss(5, temprature=2.0), "SegmentationLoss"),
        (lambda: PerceptualLoss(gpl_fast.LossNet.vgg(5), {"pool1": 1}, temprature=2.0),
         "PerceptualLoss"),
        (lambda: functional.generic_perceptual_loss(X, X, gpl_fast.LossNet.vgg(5), temprature=2.0),
         "generic_perceptual_loss"),
        (lambda: functional.segmentation_loss(X, Y, gpl_fast.LossNet.vgg(5), temprature=2.0),
         "segmentation_loss"),
        (lambda: functional.encode(X, gpl_fast.LossNet.vgg(5), ["pool1"], temprature=2.0),
         "encode"),
    ],
)  # fmt: skip
def test_an_unknown_option_names_the_loss_and_the_known_ones(make, name):
    with pytest.raises(TypeError, match=f"{name}: got an unknown option 'temprature'") as caught:
        make()
    assert "did you mean 'temperature'" in str(caught.value)
    assert "compute_dtype" in str(caught.value)


@pytest.mark.parametrize("word", ["activation", "target_activation", "reduction", "backend"])
@pytest.mark.parametrize("value", ["soft", None, 3, ["mean"]])
def test_unknown_words_list_the_known_ones(word, value):
    with pytest.raises(ValueError, match=f"{word}: got .*expected one of"):
        GenericPerceptualLoss(5, **{word: value})


def test_losses_pickle_small(loss):
    """Structure, initialisation and seed say all about a drawn network."""
    data = pickle.dumps(SegmentationLoss(5, class_weight=[1.0] * 5))
    assert len(data) < 8192
    copy = pickle.loads(data)
    assert torch.equal(copy(X, Y), SegmentationLoss(5, class_weight=[1.0] * 5)(X, Y))


def test_masks_of_other_values_are_not_told_to_ignore_their_foreground():
    loss = GenericPerceptualLoss(1, activation="sigmoid")
    mask, x = (torch.rand(2, 32, 40) > 0.5).to(torch.uint8) * 255, torch.randn(2, 1, 32, 40)
    with pytest.raises(ValueError, match=r"\(labels > 0\).*\.float\(\)") as caught:
        loss(x, mask)
    assert "only for pixels that do not count" in str(caught.value)
    assert loss(x, (mask > 0).long()).isfinite()
    depth = GenericPerceptualLoss(1, activation="none")
    millimetres = torch.randint(0, 5000, (2, 1, 32, 40), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\.float\(\) for a map of values"):
        depth(x, millimetres)
    assert depth(x, millimetres.float()).isfinite()


def test_images_of_bytes_are_told_to_become_floats():
    loss = PerceptualLoss(gpl_fast.LossNet.vgg(3), {"pool1": 1.0})
    with pytest.raises(
        ValueError, match=r"images or other values give \.float\(\), divided by 255"
    ):
        loss(torch.rand(2, 3, 32, 40), torch.randint(0, 255, (2, 3, 32, 40), dtype=torch.uint8))


def test_labels_with_their_channel_last():
    total = SegmentationLoss(5)
    with pytest.raises(ValueError, match=r"labels\.squeeze\(-1\)"):
        total(X, Y.unsqueeze(-1))
    one_hot = torch.nn.functional.one_hot(Y, 5)
    with pytest.raises(ValueError, match=r"labels\.argmax\(-1\)"):
        total(X, one_hot)
    assert torch.equal(total(X, one_hot.argmax(-1)), total(X, Y))


def test_multi_hot_labels_of_a_segmentation_are_sent_to_the_loss_that_takes_them():
    with pytest.raises(ValueError, match="use mode='multilabel'"):
        SegmentationLoss(5)(X, (torch.rand(2, 5, 32, 40) > 0.5).long())
