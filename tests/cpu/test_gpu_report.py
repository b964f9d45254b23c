"""The GPU report where there is no GPU: every stage of a dry run, and what becomes of a bad one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpl_fast import ops

ROOT = Path(__file__).resolve().parents[2]

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    return gpu_report


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path):
    command = [sys.executable, "benchmarks/gpu_report.py", "--dry", "--out", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    status = {stage["name"]: stage["status"] for stage in found["stages"]}
    needs_a_gpu = ("choices", "memcheck", "racecheck")
    assert {status.pop(name) for name in needs_a_gpu} == {"skipped"}
    assert status == dict.fromkeys(("build", "check", "layouts", "tests", "benchmark"), "ok")
    rows = found["benchmark"]["rows"]
    assert {row["target"] for row in rows} == {"dense", "labels"}
    for row in rows:
        assert row["seconds_median"] > 0
        assert row["value_error"] < 0.05
        total = row["forward_seconds"] + row["backward_seconds"]
        assert total == pytest.approx(row["seconds_median"], rel=0.5)
    page = (tmp_path / "report.md").read_text()
    for row in rows:
        assert f"| {row['provider']} |" in page
    tests = next(stage for stage in found["stages"] if stage["name"] == "tests")
    assert " 0 failed" in tests["detail"]
    assert int(tests["detail"].split()[0]) > 40


def test_a_bad_stage_is_reported_and_the_others_run(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path, dry=True, budget=200.0)
    code = "print('it broke'); raise SystemExit(3)"
    assert report.run("build", [sys.executable, "-c", code]).status == "failed"
    assert report.run("benchmark", [sys.executable, "-c", "print('fine')"]).status == "ok"
    assert [stage.detail for stage in report.stages] == ["it broke", "fine"]
    assert (tmp_path / "build.log").read_text() == "it broke\n"


def test_a_stage_ends_with_its_time(gpu_report, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_report.LIMITS, "check", 0.5)
    report = gpu_report.Report(tmp_path, dry=True, budget=200.0)
    sleep = "import time; print('begun', flush=True); time.sleep(60)"
    stage = report.run("check", [sys.executable, "-c", sleep])
    assert (stage.status, stage.detail) == ("timed out", "begun")
    assert stage.seconds < 30


def test_the_benchmark_keeps_its_share_of_the_time(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path, dry=True, budget=gpu_report.BENCHMARK - 1)
    stage = report.run("tests", [sys.executable, "-c", "raise SystemExit(1)"])
    assert (stage.status, stage.detail) == ("skipped", "no time was left")
    assert report.run("benchmark", [sys.executable, "-c", "pass"]).status == "ok"


def test_stages_can_be_chosen(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path, dry=True, budget=200.0)
    found = report.all_stages(("build",))
    assert [(stage["name"], stage["status"]) for stage in found["stages"]] == [("build", "ok")]
    assert found["benchmark"] == {"rows": [], "left_out": []}
    assert "| build | ok |" in gpu_report.markdown(found)


def test_outcomes_of_tests_are_counted(gpu_report, tmp_path):
    (tmp_path / "tests.xml").write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase><testcase name='d'><error/></testcase>"
        "</testsuite></testsuites>"
    )
    counts, failed = gpu_report.outcomes(tmp_path / "tests.xml")
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failed == ["b", "d"]


def test_without_a_gpu_it_says_so(gpu_report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "torch finds no CUDA device; --dry" in capsys.readouterr().err


def test_the_page_tells_what_failed(gpu_report):
    row = {"workload": "lvis", "shape": "4x1203x512x512", "target": "labels", "provider": "x"}
    found = {
        "machine": "a GPU",
        "dry": False,
        "protocol": {"torch": "2", "gpl_fast": "0", "commit": "abc"},
        "driver": "",
        "info": {},
        "stages": [{"name": "tests", "status": "failed", "seconds": 3.0, "detail": "1 failed"}],
        "benchmark": {"rows": [{**row, "error": "OutOfMemoryError: 9 GiB"}], "left_out": ["voc"]},
    }
    page = gpu_report.markdown(found)
    assert "| tests | failed | 3 | 1 failed |" in page
    assert "OutOfMemoryError: 9 GiB" in page
    assert "Left out for want of time: voc." in page
