"""The task of the ablations: scenes in which only an outline tells a class, and their scores."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import gpl_fast
from gpl_fast.experiments.structure import (
    CLASSES,
    NET,
    NUM_CLASSES,
    SIZE,
    StructureScenes,
    Task,
    load_photos,
    outline,
    render,
    score,
)  # fmt: skip

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def scenes() -> StructureScenes:
    return render(load_photos("test"), 48, seed=100)


def one_square(columns: slice, kind: int = 2) -> torch.Tensor:
    labels = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    labels[:, 20:40, columns] = kind
    return labels


def as_scenes(labels: torch.Tensor) -> StructureScenes:
    images = torch.zeros(len(labels), 3, SIZE, SIZE, dtype=torch.uint8)
    return StructureScenes(images, labels, (labels > 0).byte())


def test_the_same_seed_gives_the_same_scenes_and_another_one_others(scenes):
    photos = load_photos("test")
    again, other = render(photos, 48, seed=100), render(photos, 48, seed=101)
    assert torch.equal(again.images, scenes.images)
    assert torch.equal(again.objects, scenes.objects)
    assert not torch.equal(other.labels, scenes.labels)


def test_no_pixel_of_a_photograph_is_in_both_splits():
    from skimage import data

    left, right = load_photos("train")[0], load_photos("test")[0]
    photo = data.astronaut().astype(np.float32)
    whole = photo.reshape(photo.shape[0] // 2, 2, photo.shape[1] // 2, 2, 3).mean((1, 3))
    np.testing.assert_allclose(np.concatenate([left, right], 1), whole, rtol=1e-5)
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_photos("validation")


def test_every_object_is_of_one_class_and_every_class_occurs(scenes):
    assert torch.equal(scenes.labels > 0, scenes.objects > 0)
    assert scenes.labels.unique().tolist() == list(range(NUM_CLASSES))
    for label, which in zip(scenes.labels, scenes.objects, strict=True):
        for number in range(1, int(which.max()) + 1):
            assert len(label[which == number].unique()) == 1


def test_size_tells_no_class():
    y, x = np.mgrid[:64, :64].astype(np.float32) - 32
    areas = [outline(k, 13.0, 0.3, y, x).sum() for k in range(1, NUM_CLASSES)]
    assert max(areas) < 1.25 * min(areas)


def test_a_turned_shape_is_the_same_shape():
    y, x = np.mgrid[:64, :64].astype(np.float32) - 31.5
    for kind in range(1, NUM_CLASSES):
        upright = outline(kind, 13.0, 0.0, y, x)
        turned = outline(kind, 13.0, math.pi / 2, y, x)
        agree = {(upright == np.rot90(turned, k)).mean() for k in (1, 3)}
        assert max(agree) > 0.99, CLASSES[kind]


def test_brightness_says_object_and_no_more():
    photos = load_photos("train")
    scenes = render(photos, 400, seed=1, task=Task(noise=0.0))
    means = [scenes.images.float().mean(1)[scenes.labels == k].mean() for k in range(NUM_CLASSES)]
    assert min(means[1:]) - means[0] > 0.6 * Task().contrast
    assert max(means[1:]) - min(means[1:]) < 0.3 * Task().contrast


def test_the_last_level_keeps_four_by_four():
    stored = gpl_fast.GenericPerceptualLoss(NUM_CLASSES, NET, backend="reference").encode(
        torch.zeros(1, SIZE, SIZE, dtype=torch.long)
    )
    *_, last = stored.features.values()
    assert last.shape[2:] == (4, 4)


def test_the_truth_has_the_best_scores(scenes):
    assert asdict(score(scenes.labels, scenes)) == pytest.approx(
        {"miou": 1.0, "boundary": 1.0, "panoptic": 1.0, "fragments": 1.0}
    )


def test_nothing_found_is_no_object():
    found = score(torch.zeros_like(one_square(slice(20, 40))), as_scenes(one_square(slice(20, 40))))
    assert (found.boundary, found.panoptic, found.fragments) == (0.0, 0.0, 0.0)


def test_an_object_cut_in_two_loses_its_panoptic_quality_and_little_miou():
    truth, cut = one_square(slice(20, 40)), one_square(slice(20, 40))
    cut[:, :, 29:31] = 0
    found = score(cut, as_scenes(truth))
    assert found.miou == pytest.approx((18 / 20 + (4096 - 400) / (4096 - 360)) / 2)
    assert (found.panoptic, found.fragments) == (0.0, 2.0)


def test_panoptic_quality_is_the_overlap_of_what_is_found_over_what_is_found_or_missed():
    found = score(one_square(slice(20, 35)), as_scenes(one_square(slice(20, 40))))
    assert (found.panoptic, found.fragments) == (pytest.approx(15 / 20), 1.0)
    wrong_class = score(one_square(slice(20, 40), 1), as_scenes(one_square(slice(20, 40))))
    assert (wrong_class.panoptic, wrong_class.fragments, wrong_class.boundary) == (0.0, 1.0, 0.0)


def test_an_outline_may_be_a_pixel_beside_and_not_three():
    truth = as_scenes(one_square(slice(20, 40)))
    assert score(one_square(slice(21, 41)), truth).boundary == 1.0
    assert score(one_square(slice(23, 43)), truth).boundary < 0.8
