"""`gpl-fast bench --roofline`'s predictions: near what they were designed for, and true to their
rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpl_fast import cli, tiles
from gpl_fast.tools import roofline
from gpl_fast.tools.columns import BEFORE, COLUMNS, NEXT, NOW
from gpl_fast.tools.gpus import CHIPS, GPUS
from gpl_fast.tools.launches import launches
from gpl_fast.tools.prediction import predict, seconds_of, step_seconds
from gpl_fast.tools.recorder import Launch
from gpl_fast.tools.workload import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[2]
DENSE = ("cityscapes", "ade20k", "ade-full", "lvis")
H200 = CHIPS["h200"]
TILE = tiles.Tile(16, 16, 64, 64, 8, 3, True)
BLOCK = Launch("conv_block_fwd", 3.1e11, 1e9, 8, 512, 512, 64, 64, 2, TILE)


@pytest.mark.parametrize(
    ("column", "milliseconds"),
    [(BEFORE, (12.5, 22, 47, 40)), (NEXT, (4.6, 10.2, 27, 19))],
    ids=["before", "next"],
)
def test_an_h200_is_predicted_as_by_the_first_model(column, milliseconds):
    """Within a seventh: what decides which branch is carried was not in it."""
    for name, expected in zip(DENSE, milliseconds, strict=True):
        stages = [s for s in predict(WORKLOADS[name], "h200", column) if "operators" not in s.stage]
        assert 1e3 * step_seconds(stages) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("gpu", CHIPS)
def test_each_column_is_faster_and_none_is_below_the_floor(gpu):
    rates = GPUS[gpu][0]
    for work in WORKLOADS.values():
        before, now, later = (step_seconds(predict(work, gpu, k)) for k in COLUMNS)
        assert before > now > later
        made = [v for half in launches(work) for v in half if v.name != "relu_pool_bwd"]
        assert later > sum(map(rates.seconds, made))


def test_a_prediction_is_as_long_as_what_it_waits_for():
    fast = replace(H200, tensor=1e9, l2=1e9, shared=1e9, flops=1e30, memory=1e30)
    assert seconds_of(BLOCK, fast, NOW) < seconds_of(BLOCK, H200, NOW)
    for slower in ("tensor", "l2", "shared", "flops", "memory", "hz"):
        rate = getattr(H200, slower) / 100
        chip = replace(H200, **{slower: rate})
        assert seconds_of(BLOCK, chip, NOW) > 5 * seconds_of(BLOCK, H200, NOW)
    pack = Launch("softmax_pack_fwd", 0.0, 1e6, 8, 512, 512, 150, maps=2)
    assert seconds_of(pack, replace(H200, hz=H200.hz / 2), NOW) > 1.9 * seconds_of(pack, H200, NOW)
    stream = Launch("relu_pool_bwd", 0.0, 3e9)
    assert seconds_of(stream, H200, NOW) == pytest.approx(3e9 / (0.75 * 4.3e12) + 3e-6)


def test_wider_tiles_and_halos_ask_less_of_the_cache():
    narrow = replace(BLOCK, tile=replace(TILE, block_h=8))
    before, tapped, wide = (
        seconds_of(b, H200, k) for b, k in ((narrow, BEFORE), (narrow, NOW), (BLOCK, NOW))
    )
    assert before > tapped > wide > seconds_of(BLOCK, H200, NEXT)


def test_a_fused_gradient_takes_the_product_and_what_is_behind_it():
    block = Launch("conv_block_bwd", 1e12, 1e9, 8, 512, 512, 150, 64)
    logits = replace(block, name="conv_block_logits_bwd")
    aten = replace(block, name="data gradient (ATen)")
    assert seconds_of(aten, H200, NOW) > seconds_of(block, H200, NOW)
    assert seconds_of(logits, H200, NOW) > 1.2 * seconds_of(block, H200, NOW)


def test_few_programs_leave_sms_idle():
    one = replace(BLOCK, images=1, rows=16, columns=16, flops=1e6, bytes=1e6)
    many = replace(one, images=132)
    assert seconds_of(one, H200, NOW) == seconds_of(many, H200, NOW)
    assert seconds_of(replace(one, images=133), H200, NOW) > 1.8 * seconds_of(many, H200, NOW)


def test_a_host_that_is_slower_is_what_a_step_takes():
    work = Workload((64, 3, 64, 64), "dense")
    stages = predict(work, "h200", NOW)
    waiting = [replace(s, host=1.0) for s in stages]
    assert step_seconds(waiting) == len(stages) > step_seconds(stages)


def test_the_page_has_the_table_that_the_command_prints(capsys):
    assert cli.main(["bench", "--roofline"]) == 0
    printed = capsys.readouterr().out.partition("\n###")[0].splitlines()
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 + len(WORKLOADS)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert "\n".join(table) in page, "docs/gpu.md: put in\n" + "\n".join(table)
    assert page.count("| now, ms |") == 1  # the only table of predictions


def test_a_report_is_printed_beside(tmp_path, capsys):
    row = {"shape": "2x5x64x64", "target": "dense", "provider": roofline.OURS}
    row |= {"seconds_median": 0.0123, "machine": "a GPU"}
    profile = {"shape": [2, 5, 64, 64], "target": "dense", "seconds": {"conv_block_fwd": 0.00456}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"benchmark": {"rows": [row]}, "profiles": [profile]}))
    words = ["bench", "--roofline", "--mine", "2", "5", "64", "64", "--target", "dense"]
    assert cli.main([*words, "--csv", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(s.startswith("| mine 2 x 5") and s.endswith(" | 12.3 |") for s in lines)
    assert any(s.startswith("| forward: conv_block_fwd") and s.endswith(" 4.56 |") for s in lines)


def test_what_was_measured_adds_up_to_all_of_it(tmp_path, capsys):
    """Stages of both halves once, and those that were not predicted."""
    seconds = {"conv_block_fwd": 0.02, "other operators (ATen)": 0.002, "odd_fwd": 0.0005}
    about = {"shape": [2, 5, 64, 64], "target": "dense"}
    broken = {**about, "shape": [1, 5, 64, 64], "error": "no profiler"}
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"rows": [], "profiles": [broken, {**about, "seconds": seconds}]}))
    words = ["bench", "--roofline", "--mine", "2", "5", "64", "64", "--target", "dense"]
    assert cli.main([*words, "--csv", str(path)]) == 0
    lines = capsys.readouterr().out.partition("###")[2].splitlines()
    (columns,) = (line.count("|") for line in lines if line.startswith("| stage |"))
    found = {}
    for line in lines:
        if line.startswith("| ") and line.count("|") == columns:
            name, *_, last = line.strip("| ").split(" | ")
            found[name.strip()] = last
    del found["stage"]
    assert float(found.pop("all")) == 22.5
    assert sum(map(float, found.values())) == 22.5
    assert len(found) == len(seconds)


@pytest.mark.parametrize("gpu", CHIPS)
def test_the_columns_of_auto_grow(gpu, capsys):
    """A strip of what is asked needs more than 256 MB, and more than a small GPU's share."""
    words = ["bench", "--roofline", "--gpu", gpu, "--mine", "1", "150", "2048", "2048"]
    for workspace in ("4096", "auto"):
        assert cli.main([*words, "--target", "dense", "--workspace-mb", workspace]) == 0
        assert "| mine 1 x 150 x 2048 x 2048 | dense |" in capsys.readouterr().out


def test_auto_is_a_share_of_the_chips_memory(tmp_path):
    path, found = tmp_path / "roofline.json", {}
    words = ["bench", "--roofline", "--mine", "1", "5", "64", "64", "--json", str(path)]
    for gpu in CHIPS:
        assert cli.main([*words, "--gpu", gpu, "--workspace-mb", "auto"]) == 0
        found[gpu] = json.loads(path.read_text())["workspace_mb"]
    assert found == {"h200": 2256, "h100": 1280, "a100": 1280, "rtx4090": 640}
    work = WORKLOADS["ade20k"]  # what fits is as with a bound of that size
    auto, bound = (predict(work, "h100", NOW, mb) for mb in (None, 1280.0))
    assert auto == bound
    assert predict(work, "h100", NOW) != auto


def test_the_predictions_are_data_too(tmp_path):
    path = tmp_path / "roofline.json"
    words = ["bench", "--roofline", "--mine", "1", "5", "64", "64", "--json", str(path)]
    assert cli.main(words) == 0
    (work,) = json.loads(path.read_text())["workloads"]
    assert set(work["predicted"]) == {"before", "now", "next"}
    assert {s["stage"] for s in work["predicted"]["now"]} >= {"conv_block_fwd", "softmax_bwd"}
