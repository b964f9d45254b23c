"""Each experiment with --quick: the report, and what must hold by construction."""

from __future__ import annotations

import html
import json
import sys

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from gpl_fast import cli, experiments
from gpl_fast.experiments import probe, shift, toy, variance
from gpl_fast.experiments.frame import half_interval, with_interval


def quick(name: str, tmp_path) -> dict:
    out = tmp_path / "new" / name
    assert cli.main(["experiment", name, "--quick", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    assert report["command"].startswith(f"gpl-fast experiment {name} --seeds 0 ")
    assert report["environment"]["torch"] == torch.__version__
    assert "<h2>Protocol</h2>" in page
    assert all(table["title"] in html.unescape(page) for table in report["tables"])
    assert (out / "report.png").exists() == ("data:image/png;base64," in page)
    return report


def test_the_toy_counts_every_trial_of_every_reading(tmp_path):
    report = quick("toy", tmp_path)
    assert set(report["ratios"]) == set(toy.READINGS)
    for ratios in report["ratios"].values():
        assert {*toy.TEMPLATES, "random 1,1,1,1,1"} <= set(ratios)
        assert all(len(values) == 2 and min(values) > 0 for values in ratios.values())


@pytest.mark.parametrize("reading", toy.READINGS)
def test_shuffled_images_hold_the_same_pixels_and_b_shares_the_zeros(reading):
    a, b, c = toy.make_images(torch.Generator().manual_seed(3), reading)
    assert torch.equal(a.flatten().sort().values, c.flatten().sort().values)
    assert not torch.equal(a, c)
    assert torch.equal(a == 0, b == 0)
    share = float((a == 0).sum()) / 5025
    assert share == 1 if reading == "disc" else 0.8 < share < 0.92


def test_shuffled_rows_are_whole_and_a_grid_has_16_patches_a_side():
    image = torch.arange(512.0 * 512).view(1, 1, 512, 512)
    rows = toy.shuffle_patches(image, torch.Generator().manual_seed(0), 16, 512)
    assert torch.equal(rows[0, 0, :, 0] + 511, rows[0, 0, :, -1])
    grid = toy.shuffle_patches(image, torch.Generator().manual_seed(0), 32, 32)
    starts = grid[0, 0, ::32, ::32].flatten()
    assert torch.equal(starts.sort().values, image[0, 0, ::32, ::32].flatten())


def test_templates_are_blind_to_what_they_say():
    a = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    assert toy.squared(a, a + 2) == pytest.approx(4, rel=1e-5)
    assert toy.zero_mean(a, a + 2) == pytest.approx(0, abs=1e-6)
    assert toy.correlation(a, 3 * a + 2) == pytest.approx(0, abs=1e-5)
    assert toy.correlation(a, -a) == pytest.approx(2, abs=1e-5)


def test_a_shift_of_0_is_0_by_every_distance(tmp_path):
    curves = quick("shift", tmp_path)["curves"]
    assert len(curves) == 2 + shift.LEVELS
    for curve in curves.values():
        assert curve[0] == 0
        assert min(curve[1:]) > 0


def test_a_tiled_image_is_itself_again_at_its_period():
    tile = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    tiled = tile.repeat(1, 1, 20, 20)
    moved = [shift.crop(tiled, s) for s in range(9)]
    for name, found in shift.distances(moved[0], moved, seed=0).items():
        assert found[0] == found[8] == 0, name
        assert min(found[1:8]) > 0, name


def test_the_variance_law_holds_within_20_percent_below_its_bound(tmp_path):
    report = quick("variance", tmp_path)
    assert set(report["initialisations"]) == set(variance.NAMES)
    for name, found in report["initialisations"].items():
        assert found["of_law"] == pytest.approx(1, abs=0.2), name
        assert found["of_bound"] <= 1, name
    # He's keeps the scale, N(0, 1) multiplies it by half its fan.
    assert report["initialisations"]["he (ours)"]["law"] == pytest.approx(1)
    assert report["initialisations"]["N(0, 1²)"]["law"] == pytest.approx((9 * 256 / 2) ** 3)


@pytest.mark.parametrize("init", variance.INITS)
def test_the_law_counts_the_variance_that_weights_have(init):
    weight = variance.draw_weight((256, 64, 3, 3), init, torch.Generator().manual_seed(0))
    expected = variance.weight_variance(init, 64 * 9, 256 * 9)
    assert float(weight.var()) == pytest.approx(expected, rel=0.02)


def test_a_linear_probe_of_a_random_network_is_above_chance(tmp_path):
    report = quick("probe", tmp_path)
    assert set(report["accuracy"]) == {"pixels", *probe.POOLS}
    for name, scores in report["accuracy"].items():
        assert min(scores) > 2 * report["chance"], name


def test_the_list_names_every_experiment_and_its_question(capsys):
    assert cli.main(["experiment", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in experiments.NAMES:
        assert experiments.experiment(name).question in printed
    assert len(printed.splitlines()) == len(experiments.NAMES)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ([], 2, "which one? toy"),
        (["shift", "--seeds", "1", "1"], 2, "expected each once"),
        (["shift", "--steps", "193"], 2, "at most 192"),
        (["shift", "--device", "cuda:99"], 1, "--device cuda:99"),
    ],
)
def test_what_cannot_run_is_refused_and_writes_nothing(options, status, said, tmp_path, capsys):
    assert cli.main(["experiment", *options, "--out", str(tmp_path)]) == status
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_way_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert cli.main(["experiment", "shift", "--out", str(tmp_path)]) == 1
    assert 'scikit-image: pip install "gpl-fast[experiments]"' in capsys.readouterr().err


def test_given_settings_reach_an_experiment_and_defaults_do_otherwise():
    e = experiments.experiment("variance")
    assert e.settings(None, None, False, "cpu").seeds == e.seeds
    assert e.settings(None, None, True, "cpu").steps == e.quick_steps
    assert e.settings([7, 8], 3, True, "cpu").seeds == (7, 8)
    assert e.settings([7, 8], 3, True, "cpu").steps == 3


def test_an_interval_is_student_s():
    assert half_interval([1.0, 3.0]) == pytest.approx(12.71 * 2**0.5 / 2**0.5)
    assert half_interval([1.0]) != half_interval([1.0])
    assert with_interval([0.5]) == "0.500"
    assert with_interval([0.5, 0.5]) == "0.500 ± 0.000"
