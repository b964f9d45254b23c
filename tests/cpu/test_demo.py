"""The demo: its data, its measures and a tiny run of the whole."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpl_fast import demo
from gpl_fast.demo.experiment import ARMS, BASELINE, WITH_GPL, Result, Settings, summary
from gpl_fast.demo.models import UNet
from gpl_fast.demo.scenes import (
    BACKGROUND,
    NUM_CLASSES,
    TRAIN_DIGITS,
    Sources,
    digit_heights,
    load_sources,
    paste_digit,
    render,
)
from gpl_fast.demo.train import (
    Schedule,
    Trace,
    bytes_saved,
    confusion,
    cross_entropy,
    mean_iou,
    pixel_accuracy,
    train,
)

for package in ("sklearn", "PIL", "matplotlib", "rich"):
    pytest.importorskip(package)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def train_sources() -> Sources:
    return load_sources("train", digit_heights(32))


@pytest.fixture(scope="module")
def test_sources() -> Sources:
    return load_sources("test", digit_heights(32))


def test_scenes_depend_on_the_seed_alone(train_sources: Sources) -> None:
    a, b = render(train_sources, 8, 32, seed=5), render(train_sources, 8, 32, seed=5)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    other = render(train_sources, 8, 32, seed=6)
    assert not torch.equal(a.labels, other.labels)
    # A longer set starts with the shorter one: more scenes do not change the first.
    assert torch.equal(a.images[:3], render(train_sources, 3, 32, seed=5).images)


def test_digits_and_photographs_of_the_splits_are_disjoint(
    train_sources: Sources, test_sources: Sources
) -> None:
    from sklearn.datasets import load_digits

    assert not set(train_sources.index) & set(test_sources.index)
    assert len(train_sources.index) == TRAIN_DIGITS
    assert len(train_sources.index) + len(test_sources.index) == 1797
    for sources in (train_sources, test_sources):
        assert set(sources.classes.tolist()) == set(range(10))
        np.testing.assert_array_equal(sources.classes, load_digits().target[sources.index])
    for left, right in zip(train_sources.photos, test_sources.photos, strict=True):
        assert left.shape == right.shape
        assert not np.array_equal(left, right)


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"'val'.*'train' or 'test'"):
        load_sources("val", digit_heights(32))


def test_a_pasted_digit_marks_its_own_pixels_with_its_class() -> None:
    image, label = np.zeros((32, 32, 3), np.float32), np.full((32, 32), BACKGROUND, np.uint8)
    stroke = np.zeros((10, 10), np.float32)
    stroke[2:8, 4:6] = 1.0
    paste_digit(image, label, stroke, 3, np.full(3, 200.0, np.float32), top=5, left=7)
    expected = np.zeros((32, 32), bool)
    expected[7:13, 11:13] = True
    np.testing.assert_array_equal(label == 3, expected)
    np.testing.assert_array_equal(label == BACKGROUND, ~expected)
    np.testing.assert_array_equal(image[..., 0] == 200.0, expected)


def test_every_scene_holds_readable_digits(test_sources: Sources) -> None:
    scenes = render(test_sources, 200, 32, seed=0)
    assert scenes.labels.max() == BACKGROUND
    assert set(scenes.labels.unique().tolist()) == set(range(NUM_CLASSES))
    digits = scenes.labels != BACKGROUND
    assert digits.flatten(1).sum(1).min() > 10
    brightness = scenes.images.float().mean(1)
    assert brightness[digits].mean() > brightness[~digits].mean() + 60


def test_a_batch_is_centred_channels_last_and_int64(test_sources: Sources) -> None:
    scenes = render(test_sources, 4, 32, seed=0)
    images, labels = scenes.batch(torch.tensor([2, 0]), CPU)
    assert images.shape == (2, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images[1] * 70 + 110, scenes.images[0].float())


def test_mean_iou_by_hand() -> None:
    # Class 0: 3 of 4 right, 1 false -> 3/5. Class 1: 2 of 4 right, 1 false -> 2/5. Class 2: 0/1.
    counts = torch.tensor([[3, 1, 0, 0], [1, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert mean_iou(counts) == pytest.approx((3 / 5 + 2 / 5 + 0) / 3)  # class 3 is left out
    assert pixel_accuracy(counts) == pytest.approx(5 / 8)
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))


def test_the_confusion_matrix_counts_every_pixel(test_sources: Sources) -> None:
    scenes = render(test_sources, 70, 32, seed=0)  # more than one batch of the evaluation
    torch.manual_seed(0)
    net = UNet(NUM_CLASSES, 4).eval()
    counts = confusion(net, scenes, CPU)
    images, labels = scenes.batch(torch.arange(70), CPU)
    with torch.no_grad():
        guess = net(images).argmax(1)
    for true, predicted in ((BACKGROUND, 3), (4, BACKGROUND), (7, 7)):
        assert counts[true, predicted] == ((labels == true) & (guess == predicted)).sum()
    assert counts.sum() == 70 * 32 * 32


def test_bytes_saved_counts_storages_once_without_inputs_and_constants() -> None:
    x, y = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)
    weight = torch.randn(4, 4)
    assert bytes_saved(lambda a: (a @ weight).sum(), x) == 0  # only a constant and the input
    assert bytes_saved(lambda a, b: (a * b).sum(), x, y) == 0  # only inputs
    assert bytes_saved(lambda a: a.exp().sum(), x) == 8 * 4 * 4
    assert bytes_saved(lambda a: (a.exp() * a.exp().relu()).sum(), x) == 3 * 8 * 4 * 4
    assert bytes_saved(lambda a: a.exp().square().square().sum(), x) == 2 * 8 * 4 * 4


def test_cutting_the_step_at_the_logits_changes_nothing(train_sources: Sources) -> None:
    scenes = render(train_sources, 8, 32, seed=0)
    net, trace = train(4, scenes, scenes, Schedule(2, 4, 1e-2, seed=3, points=1), CPU)

    torch.manual_seed(3)
    plain = UNet(NUM_CLASSES, 4).to(memory_format=torch.channels_last)
    order = torch.Generator().manual_seed(10_003)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10, pct_start=0.2)
    for step in range(2):
        images, labels = scenes.batch(torch.randint(8, (4,), generator=order), CPU)
        loss = F.cross_entropy(plain(images), labels)
        assert trace.losses[step] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert [step for step, _ in trace.curve] == [2]
    assert 0 < trace.loss_seconds < trace.step_seconds


def test_training_is_repeatable_and_the_seed_counts(train_sources: Sources) -> None:
    scenes = render(train_sources, 8, 32, seed=0)
    runs = [
        train(4, scenes, scenes, Schedule(3, 4, 1e-2, seed), CPU, cross_entropy)[1].losses
        for seed in (0, 0, 1)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0] != pytest.approx(runs[2], rel=1e-4)


@pytest.mark.parametrize(
    ("deltas", "word"),
    [
        ([0.02, 0.021], "helps"),
        ([-0.02, -0.021], "hurts"),
        ([0.02, -0.01], "noise"),
        ([0.3], "one"),
    ],
)
def test_the_verdict_follows_the_figures(deltas: list[float], word: str) -> None:
    result = Result(Settings(seeds=tuple(range(len(deltas)))), "reference", "", "")
    result.students = {
        BASELINE: [Trace(miou=0.5) for _ in deltas],
        WITH_GPL: [Trace(miou=0.5 + delta) for delta in deltas],
    }
    assert word in result.verdict()


def _demo(out: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([*options, "--out", str(out)]))


@pytest.mark.slow
@pytest.mark.parametrize("scenes", [12, 1])
def test_a_tiny_run_writes_the_whole_report(
    scenes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        f"--steps 3 --teacher-steps 2 --seeds 4 5 --train-scenes {scenes} --test-scenes {scenes}"
    )
    assert _demo(tmp_path / "new" / "out", *options.split(), "--backend", "reference") == 0
    out = tmp_path / "new" / "out"
    report = json.loads((out / "report.json").read_text())
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert report["verdict"] in page.replace("&#x27;", "'")
    assert "data:image/png;base64," in page

    assert report["settings"]["seeds"] == [4, 5]
    assert report["backend"]["name"] == "reference"
    assert report["environment"]["torch"] == torch.__version__
    assert len(report["miou_differences"]) == 2
    for arm in ARMS:
        assert [t["seed"] for t in report["students"][arm]] == [4, 5]
        assert all(len(t["losses"]) == 3 for t in report["students"][arm])
        figures = report["summary"][arm]
        assert 0 <= figures["miou_mean"] <= 1
        assert 0 < figures["loss_share"] < 1
        assert figures["miou_mean"] == pytest.approx(
            np.mean([t["miou"] for t in report["students"][arm]])
        )
    # Cross-entropy keeps its log-probabilities and one scalar, the total weight.
    pixels = 16 * 32 * 32
    assert report["summary"][BASELINE]["saved_bytes"] == pixels * NUM_CLASSES * 4 + 4
    assert report["summary"][WITH_GPL]["saved_bytes"] > report["summary"][BASELINE]["saved_bytes"]
    assert "mIoU" in capsys.readouterr().out


def test_a_missing_package_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)  # import rich raises ImportError
    assert _demo(tmp_path) == 1
    message = capsys.readouterr().err
    assert "needs rich" in message
    assert 'pip install "gpl-fast[demo]"' in message


def test_a_device_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _demo(tmp_path, "--device", "cuda:99") == 1
    assert "--device cuda:99" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_options_cost_no_heavy_import() -> None:
    code = (
        "import argparse, sys, gpl_fast, gpl_fast.demo as demo;"
        "demo.add_arguments(argparse.ArgumentParser());"
        "print([m for m in ('sklearn', 'PIL', 'matplotlib', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_summary_is_over_seeds() -> None:
    result = Result(Settings(seeds=(0, 1)), "reference", "", "")
    result.students[BASELINE] = [
        Trace(miou=0.4, accuracy=0.8, step_seconds=2.0, loss_seconds=0.5),
        Trace(miou=0.6, accuracy=0.9, step_seconds=4.0, loss_seconds=1.0),
    ]
    result.saved_bytes[BASELINE] = 7
    figures = summary(result, BASELINE)
    assert figures["miou_mean"] == pytest.approx(0.5)
    assert figures["miou_spread"] == pytest.approx(0.02**0.5)
    assert figures["loss_share"] == pytest.approx(0.25)
