"""examples/stored_teachers.py, and what docs/frameworks/distillation.md says."""

import pytest
import torch
from recipes import recipe

import gpl_fast


@pytest.fixture(scope="module")
def stored():
    return recipe("stored_teachers")


def test_the_loss_falls_with_two_workers(stored):
    losses = stored.main(steps=8, workers=2)
    assert losses[-1] < 0.98 * losses[0]


def test_a_batch_is_its_images_and_survives_the_file(stored, tmp_path):
    teacher = stored.network(8)
    stored.store(teacher, tmp_path)
    samples = [stored.Stored(tmp_path)[i] for i in (0, 3)]
    images, _, top = stored.collate(samples)
    with torch.no_grad():
        values, indices = (teacher(images) / stored.T).softmax(dim=1).topk(stored.K, dim=1)
    assert torch.allclose(top.values.float(), values, atol=1e-3)
    assert (top.indices.long() == indices).float().mean() > 0.95
    assert torch.equal(top[1].values, samples[1][2].values)


def test_the_temperature_of_stored_values_is_the_files_own():
    logits = torch.randn(1, 10, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = gpl_fast.GenericPerceptualLoss(10, temperature=2.0)
    right, wrong = (gpl_fast.TopK(*(logits / t).softmax(dim=1).topk(10, dim=1)) for t in (2.0, 1.0))
    assert loss(logits, right) < 1e-9 < 1e-7 < loss(logits, wrong)


def test_the_square_of_the_temperature_is_not_applied():
    a, b = torch.randn(2, 1, 10, 32, 32, generator=torch.Generator().manual_seed(0))
    warm = gpl_fast.GenericPerceptualLoss(10, temperature=2.0)(a, b)
    assert torch.isclose(warm, gpl_fast.GenericPerceptualLoss(10)(a / 2, b / 2))


def test_the_default_collate_does_not_join_top_k():
    top = gpl_fast.TopK(torch.ones(1, 1, 32, 32), torch.zeros(1, 1, 32, 32, dtype=torch.long))
    with pytest.raises(TypeError):
        torch.utils.data.default_collate([top, top])
