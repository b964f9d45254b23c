"""examples/accelerate_segmentation.py, fsdp2_segmentation.py and torchrun_resume.py, and what
docs/frameworks/accelerate.md and distributed.md say."""

from __future__ import annotations

import re
import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from recipes import recipe, run_recipe
from torch import nn

import gpl_fast


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_accelerate_the_loss_falls_and_two_processes_take_the_steps_of_one():
    """Two times four pieces of two images are all 16 images, as eight of one process."""
    AcceleratorState._reset_state(True)
    one = recipe("accelerate_segmentation").main(pieces=8)
    assert one[-1] < 0.8 * one[0]
    two = run_recipe("accelerate_segmentation", processes=2)
    for pattern, value in (("loss ([0-9.]+)", one[0]), ("to ([0-9.]+)", one[-1])):
        assert sum(numbers(pattern, two)) / 2 == pytest.approx(value, rel=1e-4)
    assert len(set(numbers("model ([0-9.]+)", two))) == 1


def test_accelerates_accumulation_divides_by_its_steps():
    """So a value that a normalizer has divided is divided twice."""
    AcceleratorState._reset_state(True)
    weight = nn.Parameter(torch.ones(()))
    for steps, expected in ((1, 1.0), (4, 0.25)):
        weight.grad = None
        accelerator = Accelerator(gradient_accumulation_steps=steps)
        accelerator.backward(weight * 1.0)
        assert weight.grad == expected


def test_accelerates_autocast_ends_with_the_models_forward():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(nn.Conv2d(3, 3, 3, padding=1))
    logits, labels = model(torch.randn(1, 3, 32, 32)), torch.zeros(1, 32, 32, dtype=torch.long)
    assert logits.dtype == torch.float32
    loss = gpl_fast.SegmentationLoss(3)

    def used() -> str:
        return str(loss.explain(logits, labels).compute_dtype).removeprefix("torch.")

    assert used() == "float32"
    with accelerator.autocast():
        assert used() == "bfloat16"
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def sharded() -> str:
    return run_recipe("fsdp2_segmentation", processes=2)


@pytest.mark.parametrize("inside", [False, True])
def test_fsdp2_the_loss_falls(sharded, inside):
    pairs = re.findall(rf"inside {inside}: loss ([0-9.]+) to ([0-9.]+)", sharded)
    assert len(pairs) == 2
    assert all(float(last) < 0.8 * float(first) for first, last in pairs)


def test_fsdp2_the_loss_inside_is_the_loss_outside(sharded):
    """In the first step; afterwards gradients were rounded to bfloat16 at other places."""
    first = {
        inside: sorted(numbers(rf"inside {inside}: loss ([0-9.]+)", sharded))
        for inside in (False, True)
    }
    assert first[False] == pytest.approx(first[True], rel=0.02)


def test_logits_that_are_dtensors_are_this_process_images(sharded):
    found, local = numbers("DTensor ([0-9.]+)", sharded), numbers("local ([0-9.]+)", sharded)
    assert len(found) == 2
    assert found == local
    assert found[0] != found[1]


@pytest.fixture(scope="module")
def at_once() -> str:
    return run_recipe("torchrun_resume", processes=2)


def test_two_processes_take_the_steps_of_one(at_once, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    of_one = recipe("torchrun_resume").main([])
    for what, value in zip(("loss", "model"), of_one, strict=True):
        assert numbers(what + " ([0-9.]+)", at_once) == pytest.approx([value] * 2, rel=1e-5)


def test_a_resumed_run_is_one_that_was_not_interrupted(at_once, tmp_path):
    checkpoint = ["--checkpoint", str(tmp_path / "last.pt")]
    run_recipe("torchrun_resume", *checkpoint, "--steps", "4", processes=2)
    resumed = run_recipe("torchrun_resume", *checkpoint, processes=2)
    for what in ("loss", "model"):  # lines of two processes may share one
        found = numbers(what + " ([0-9.]+)", resumed)
        assert len(found) == 2
        assert found == numbers(what + " ([0-9.]+)", at_once)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert set(state["model"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_means_of_processes_are_no_mean_of_the_whole():
    """Where processes have counted different numbers of pixels."""
    images, labels = recipe("torchrun_resume").batch(0)
    logits = torch.randn(len(images), 3, 32, 32)
    loss = gpl_fast.SegmentationLoss(3)
    halves = [loss(logits[r::2], labels[r::2]) for r in range(2)]
    assert abs(sum(halves) / 2 - loss(logits, labels)) > 1e-4
