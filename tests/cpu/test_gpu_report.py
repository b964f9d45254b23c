"""The GPU report where there is no GPU: every step of a dry run, what becomes of a bad one, and
that it is over in time and on disk whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpl_fast import ops

ROOT = Path(__file__).resolve().parents[2]
FILES = {"report.json", "report.md", "log.txt", "tiles.json", "data-gradient.json",
         "softmax-bwd.json", "benchmark.png"}  # fmt: skip

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)
pytest.importorskip("triton", reason="the GPU's kernels need Triton")

# Sleeps in a process of its own besides, and hears no signal that can be ignored.
DEAF = (
    "import signal, subprocess, sys, time\n"
    "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(s, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(100)"
)


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_report

    return gpu_report


@pytest.fixture
def make(gpu_report, tmp_path):
    made = []

    def of(seconds=600.0):
        import steps

        found = gpu_report.Report(tmp_path, True, seconds + time.monotonic() - steps.BORN)
        made.append(found)
        return found

    yield of
    for each in made:
        each.steps.close()


def on_disk(folder):
    return json.loads((folder / "report.json").read_text())


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths}


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path):
    command = [sys.executable, "benchmarks/gpu_report.py", "--dry", "--out", str(tmp_path)]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "--minutes", "12"], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begin < 720
    found = on_disk(tmp_path)
    status = {step["name"]: step["status"] for step in found["steps"]}
    assert {status.pop(name) for name in ("choices", "sanitizers")} == {"skipped"}
    ran = ("library", "truth", "warm", "times", "tiles", "tests", "baselines")
    assert status.pop("plot") in ("ok", "skipped")
    assert status == dict.fromkeys(ran, "ok")
    assert {row["what"] for row in found["truth"]} == {"run 0", "value", "gradient"}
    assert all(row["ok"] for row in found["truth"])
    rows = found["benchmark"]["rows"]
    assert {row["target"] for row in rows} == {"dense", "labels"}
    assert {row["run"] for row in rows} == {"alone", "beside"}
    for row in rows:
        assert row["seconds_median"] > 0
        assert row["value_error"] < 0.05
    assert {p["target"] for p in found["profiles"]} == {"dense", "labels"}
    assert found["tests"]["failed"] == 0
    assert found["tests"]["passed"] > 30
    page = (tmp_path / "report.md").read_text()
    for row in rows:
        assert f"| {row['provider']} |" in page
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= FILES
    assert all(path.stat().st_size < 16 << 20 for path in tmp_path.iterdir())


def test_a_bad_step_is_reported_and_the_others_run(make, tmp_path):
    steps = make().steps
    bad = python("print('it broke'); raise SystemExit(3)")
    assert steps.run("library", {"": bad}, 60).status == "failed"
    assert steps.run("tiles", {"": python("print('fine')")}, 60).status == "ok"
    assert [step["detail"] for step in on_disk(tmp_path)["steps"]] == ["it broke", "fine"]
    assert "it broke" in (tmp_path / "log.txt").read_text()


def test_of_several_commands_the_bad_ones_are_named(make):
    commands = {"good": python("pass"), "bad": python("1 / 0"), "slow": python(DEAF)}
    step = make().steps.run("truth", commands, 5, at_once=3)
    assert step.cases == {"good": "ok", "bad": "failed", "slow": "timed out"}
    assert (step.status, step.detail) == ("timed out", "1 of 3 ok; not: bad, slow")


def test_commands_run_beside_one_another_but_not_too_many(make):
    code = "import time; print(time.monotonic()); time.sleep(0.7); print(time.monotonic())"
    steps = make().steps
    steps.run("tests", {str(i): python(code) for i in range(3)}, 60, at_once=2)
    spans = sorted(tuple(map(float, p.read_text().split())) for p in steps.logs)
    assert spans[1][0] < spans[0][1]
    assert spans[2][0] > min(spans[0][1], spans[1][1])


def test_a_step_that_hangs_is_killed_with_all_that_it_began(make, tmp_path):
    steps = make().steps
    begin = time.monotonic()
    step = steps.run("truth", {"": python(DEAF)}, 3)
    assert step.status == "timed out"
    assert time.monotonic() - begin < 8
    grandchild = int(steps.logs[0].read_text())
    for _ in range(50):
        if not alive(grandchild):
            break
        time.sleep(0.1)
    assert not alive(grandchild)
    assert on_disk(tmp_path)["steps"][0]["status"] == "timed out"


def test_all_that_a_driver_holds_is_killed_within_one_grace(make, monkeypatch):
    import steps

    now, said = [0.0], []

    def process(pid):
        def wait(timeout):
            said.append("wait")
            now[0] += timeout
            raise subprocess.TimeoutExpired("held", timeout)

        return SimpleNamespace(pid=pid, wait=wait)

    running = make().steps
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(steps.os, "killpg", lambda pid, number: said.append(pid))
    for pid in range(-12, 0):  # of nobody
        running._children[f"{pid}"] = steps._Child(process(pid), Path("none"))
    running.kill()
    assert said == [*range(-12, 0), *["wait"] * 12]
    assert now[0] == steps.GRACE
    assert not running._children


def test_what_a_step_has_found_is_on_disk_before_it_ends(make, tmp_path):
    report = make()
    out = report.steps.output("times")
    found = {"rows": [], "profiles": [{"shape": [1, 5, 32, 32], "target": "dense",
                                       "seconds": {"conv_block_fwd": 1.5}}]}  # fmt: skip
    code = f"open({str(out)!r}, 'w').write({json.dumps(found)!r}); import time; time.sleep(100)"
    import threading

    seen = []

    def look():
        time.sleep(5.5)
        seen.append(on_disk(tmp_path))

    watcher = threading.Thread(target=look)
    watcher.start()
    report.steps.run("times", {"": python(code)}, 7)
    watcher.join()
    assert seen[0]["steps"][0]["status"] == "running"
    assert seen[0]["profiles"] == found["profiles"]
    assert "| 1x5x32x32, dense | conv_block_fwd |" in (tmp_path / "report.md").read_text()


def test_steps_end_with_the_whole_time_and_later_ones_are_left_out(make, tmp_path):
    report = make(8.0)  # of which the last page has its share
    assert report.steps.run("truth", {"": python(DEAF)}, 60).status == "timed out"
    assert report.steps.run("tiles", {"": python("pass")}, 60).status == "skipped"
    assert on_disk(tmp_path)["steps"][1]["detail"] == "no time was left"


def test_a_main_thread_that_never_comes_back_is_left_behind(tmp_path):
    code = f"""
import pathlib, sys, time
import report
from steps import Steps
path = pathlib.Path({str(tmp_path)!r}, "report.json")
steps = Steps(2.0, lambda: report.replace_text(path, '{{"whole": true}}'), path.parent, {{}})
steps._start("truth", "", [sys.executable, "-c", "import time; time.sleep(100)"], {{}})
print(steps._children[""].process.pid, flush=True)
time.sleep(100)
"""
    begin = time.monotonic()
    done = subprocess.run(
        python(code), capture_output=True, text=True, env=environment(), timeout=90
    )
    assert done.returncode == 3, done.stderr
    assert time.monotonic() - begin < 60
    assert on_disk(tmp_path) == {"whole": True}
    assert not alive(int(done.stdout))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_on_disk_is_whole_whenever_it_is_killed(number, tmp_path):
    code = f"""
import pathlib, signal, sys
sys.argv = ["gpu_report.py"]
import gpu_report
gpu_report.LIMITS = {{"forever": 60.0}}
def forever(self):
    while True:
        self.steps.skip("forever", "x" * 100_000)
        del self.steps.done[20:]
gpu_report.Report._forever = forever
sys.argv += ["--dry", "--out", {str(tmp_path)!r}]
gpu_report.main()
"""
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            python(code), env=environment(), stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT
        )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "report.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.013)
        on_disk(tmp_path)
        process.send_signal(number)
        process.wait(30)
    finally:
        process.kill()
    assert on_disk(tmp_path)["steps"], (tmp_path / "said").read_text()


def test_steps_can_be_chosen(make, tmp_path):
    report = make()
    report.all_steps(("library", "choices"))
    found = on_disk(tmp_path)
    assert [step["name"] for step in found["steps"]] == ["library", "choices"]
    assert found["benchmark"] == {"rows": [], "left_out": []}
    assert "| library | ok |" in (tmp_path / "report.md").read_text()


def test_without_baselines_there_is_no_plot(make, gpu_report, monkeypatch):
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: name)
    report = make()
    report.all_steps(("plot",))
    (step,) = report.steps.done
    assert (step.status, step.detail) == ("skipped", "no baselines were measured")


def test_what_was_left_out_is_told_of_both_runs(make, tmp_path):
    report = make()
    for step, names in {"times": ["voc dense"], "baselines": ["voc dense", "lvis topk"]}.items():
        report.steps.output(step).write_text(json.dumps({"rows": [], "left_out": names}))
    report.write()
    told = "Left out for want of time: voc dense alone, voc dense, lvis topk."
    assert told in (tmp_path / "report.md").read_text()


def test_outcomes_of_tests_are_counted(gpu_report):
    log = (
        "tests/gpu/test_a.py::test_a[1, 2] PASSED   [ 10%]\n"
        "tests/gpu/test_a.py::test_b FAILED         [ 20%]\n"
        "tests/gpu/test_a.py::test_c SKIPPED (none) [ 30%]\n"
        "FAILED tests/gpu/test_a.py::test_b - it broke\n"
    )
    cut_off = "tests/gpu/test_b.py::test_d ERROR\ntests/gpu/test_b.py::test_e"
    found = gpu_report.outcomes([log, cut_off])
    names = ["tests/gpu/test_a.py::test_b", "tests/gpu/test_b.py::test_d"]
    assert found == {"passed": 1, "failed": 2, "skipped": 1, "names": names}


def test_without_a_gpu_it_says_so(gpu_report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "torch finds no CUDA device; --dry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("_conv_block_fwd_kernel", "conv_block_fwd"),
        ("void gpl_fast::cuda::(anonymous namespace)::softmax_bwd_kernel<float>", "softmax_bwd"),
        ("conv_block_bwd_sm90_kernel", "conv_block_bwd"),
        ("sm90_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32", "data gradient (ATen)"),
        ("void at::native::vectorized_elementwise_kernel<4>", "other operators (ATen)"),
    ],
)
def test_a_kernels_name_tells_its_stage(gpu_report, kernel, stage):
    assert gpu_report.on_device.stages.stage_of(kernel) == stage


@pytest.mark.parametrize("seen", ["nothing", "an error"])
def test_without_a_profiler_stages_are_timed_by_events(gpu_report, monkeypatch, seen):
    from gpl_fast.tools import measure, workload

    stages = gpu_report.on_device.stages

    def of_kernels(step, device):
        if seen == "an error":
            raise RuntimeError("no CUPTI")
        return {"seconds": {}}

    monkeypatch.setattr(stages, "of_kernels", of_kernels)
    loss = workload.make_loss("fast-bf16", 5)
    inputs = workload.make_inputs((1, 5, 33, 40), "dense", "cpu")
    found = stages.profile(lambda: measure.step(loss, *inputs), "cpu")
    assert found["by"] == "events"
    assert {"softmax_pack_fwd", "relu_pool_bwd", "softmax_bwd"} < set(found["seconds"])
    assert all(took > 0 for took in found["seconds"].values())
    assert ("error" in found) == (seen == "an error")


def test_the_page_tells_what_is_wrong_and_how_far_off_it_is(make):
    found = make().found() | {"machine": "NVIDIA H200"}
    row = {"workload": "lvis", "shape": "4x1203x512x512", "target": "labels", "provider": "x"}
    found["benchmark"] = {"rows": [{**row, "error": "OutOfMemoryError: 9 GiB"}],
                          "left_out": ["voc"]}  # fmt: skip
    found["truth"] = [{"case": "form-dense-bf16", "what": "value", "error": 0.5, "bound": 0.1,
                       "ok": False}]  # fmt: skip
    found["profiles"] = [{"shape": [8, 19, 769, 769], "target": "dense",
                          "seconds": {"softmax_bwd": 1.0, "odd_fwd": 2.0}}]  # fmt: skip
    found["choices"]["softmax"] = [{"classes": 150, "cuda_ms": 1.5, "triton_ms": 2.0}]
    found["choices"]["backward"] = [{"in_channels": 64, "out_channels": 128, "kernel_ms": 0.5,
                                     "aten_ms": 0.75}]  # fmt: skip
    found["halo"] = [{"c_in": 64, "c_out": 128, "halo_ms": 0.25, "triton_ms": 0.3}]
    found["tiles"] = [{"c_in": 64, "c_out": 128, "block_h": 8, "block_w": 16, "block_k": 64,
                       "block_n": 128, "stages": 3, "error": "OutOfResources"}]  # fmt: skip
    import gpu_pages

    page = gpu_pages.markdown(found)
    assert "| form-dense-bf16 | value | 5.0e-01 | 1.0e-01 | **wrong** |" in page
    assert "OutOfMemoryError: 9 GiB" in page
    assert "Left out for want of time: voc." in page
    assert "| 8x19x769x769, dense | odd_fwd |  | 2000.00 |  |" in page
    assert "| 8x19x769x769, dense | softmax_bwd | 0." in page
    assert "| 64 -> 128 | data gradient, ATen's | 0.500 | 0.750 |" in page
    assert "| 64 -> 128 | forward with a halo, Triton's | 0.250 | 0.300 |" in page
    assert "| 150 classes | softmax_bwd, Triton's | 1.500 | 2.000 |" in page
    assert "| 64 -> 128 | 8 x 16 x 64 x 128, 3 stages |  | OutOfResources |" in page


@pytest.mark.parametrize(
    ("machine", "known"),
    [("NVIDIA L40S", False), ("NVIDIA GH200 480GB", False), ("NVIDIA H100 80GB HBM3", True),
     ("NVIDIA A100-SXM4-80GB", True), ("NVIDIA GeForce RTX 4090", True)],
)  # fmt: skip
def test_only_a_gpu_that_is_known_is_predicted(make, machine, known):
    import gpu_pages

    profile = {"shape": [1, 5, 64, 64], "target": "dense", "seconds": {"conv_block_fwd": 0.02}}
    page = gpu_pages.markdown(make().found() | {"machine": machine, "profiles": [profile]})
    for stage in ("conv_block_fwd", "all"):
        assert (f"| 1x5x64x64, dense | {stage} |  | 20.00 |  |" in page) == (not known)
    assert ("| softmax_bwd | 0." in page) == known


def test_a_library_that_serves_the_device_is_taken(gpu_report, tmp_path):
    import gpu_library

    assert gpu_library.obstacle("cpu") is None
    assert gpu_library.obstacle("cuda:0")  # nobody here
    found = gpu_library.described("cpu")
    assert found["info"]["operators"]["library"]
