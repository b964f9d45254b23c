"""`gpl-fast bench`: a shape of one's own, what fits, a GPU's floors; and the protocol of both."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from policies import Told

import gpl_fast
from gpl_fast import cli, ops
from gpl_fast.fast import policy
from gpl_fast.tools import batch, bench, launches, measure, roofline, workload

ROOT = Path(__file__).resolve().parents[2]
needs_fast = pytest.mark.skipif(ops.load() is not None, reason=str(ops.load()))

# ---------------------------------------------------------------------------------------- protocol


def scripted(durations, calls=None, name=""):
    """A step that says it took the next of `durations` each time."""
    left = iter(durations)

    def once():
        if calls is not None:
            calls.append(name)
        return next(left)

    return once


def test_providers_take_turns_and_the_warm_up_is_not_counted():
    calls = []
    steps = {k: scripted([[9.0], [1.0], [2.0]], calls, k) for k in "ab"}
    assert measure.interleave(steps, 2) == {"a": [[1.0], [2.0]], "b": [[1.0], [2.0]]}
    assert calls == ["a", "b"] * 3


def test_short_steps_have_more_rounds_but_not_for_ever():
    found = measure.interleave({"a": lambda: [0.0]}, 2, seconds=60.0, most=7)
    assert len(found["a"]) == 7
    assert len(measure.interleave({"a": lambda: [0.0]}, 3)["a"]) == 3


def test_the_ratio_is_of_the_shortest_steps():
    # Load doubles two steps of the one and one of the other.
    parts = {"base": [[1.0, 3.0], [2.0, 6.0], [1.0, 3.0]], "own": [[2.0, 2.0], [2.0, 2.0], [1, 1]]}
    found = measure.summary(parts, "base")
    assert found["own"]["speedup"] == 2.0
    assert found["base"]["speedup"] == 1.0
    assert found["own"]["seconds_median"] == 4.0
    assert (found["base"]["forward_seconds"], found["base"]["backward_seconds"]) == (1.0, 3.0)
    assert found["own"]["rounds"] == 3
    assert measure.summary({"own": [[1.0], [2.0]]}, "base")["own"]["speedup"] is None
    one = measure.summary({"own": [[1.0, 2.0]]}, "base")["own"]
    assert [one[k] for k in ("seconds_p20", "seconds_median", "seconds_p80")] == [3.0, 3.0, 3.0]


def faults_of_large_tensors(keep):
    if keep:
        measure.keep_pages()
    before = 0
    for step in range(8):
        for megabytes in (3, 40, 70):
            torch.ones(megabytes << 18)
        if step == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_kept_pages_fault_once():
    kept, given_back = (
        measure.in_fresh_process(faults_of_large_tensors, keep) for keep in (True, False)
    )
    assert given_back > 40 << 8  # pages of 4 KiB: 40 MB and 70 MB, three times
    assert kept < given_back / 20


def faults_of_one_large_tensor(mapped):
    assert measure.keep_pages(mapped)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_mapped_pages_do_not_fault():
    mapped, not_yet = (
        measure.in_fresh_process(faults_of_one_large_tensor, n) for n in (64 << 20, 0)
    )
    assert not_yet > 36 << 8  # pages of 4 KiB: 40 MB, less what was free before
    assert mapped < not_yet / 4


def test_the_deviation_of_a_tiny_gradient():
    """Below 1e-8, where torch.cosine_similarity takes a norm for 1e-8."""
    grad, value = torch.tensor([[3e-12, 4e-12]]), torch.tensor(1.02)
    truth = torch.tensor(1.0, dtype=torch.float64), torch.tensor([[4e-12, 3e-12]]).double()
    error, cosine = measure.deviation((value, grad), truth)
    assert error == pytest.approx(0.02, rel=1e-5)
    assert cosine == pytest.approx(0.96, rel=1e-6)
    assert measure.deviation((value, -truth[1]), truth)[1] == pytest.approx(-1)


def test_a_fresh_process_gives_its_result_or_says_that_it_died():
    assert measure.in_fresh_process(abs, -3) == 3
    with pytest.raises(RuntimeError, match="_exit: its process ended with 3"):
        measure.in_fresh_process(os._exit, 3)


def test_saved_bytes_are_those_beyond_inputs_and_weights():
    weight = torch.randn(4, 5, 3, 3)

    def loss(x, target):
        return (torch.conv2d(x, weight, padding=1).relu() - target).square().sum()

    logits, target = torch.randn(1, 5, 8, 8), torch.randn(1, 4, 8, 8)
    _, kept = measure.memory(loss, logits, target, lambda: [weight])
    assert kept == 2 * 4 * 64 * 4  # ReLU's output and the difference
    _, more = measure.memory(loss, logits, target, list)
    assert more == kept + weight.nbytes


# --------------------------------------------------------------------------------- your own shape


@needs_fast
@pytest.mark.parametrize("kind", workload.TARGETS)
def test_mine_shows_naive_against_fast(kind, capsys, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--mine", "2", "5", "33", "40", "--target", kind, "--memory-gib", "0.25"]
    assert cli.main(["bench", *arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["gpl_fast"] == gpl_fast.__version__
    assert found["memory_is"] == "--memory-gib"
    rows = {row["provider"]: row for row in found["rows"]}
    assert set(rows) == {"reference", "fast", "fast-bf16"}
    for row in rows.values():
        assert (row["shape"], row["target"], row["note"]) == ([2, 5, 33, 40], kind, None)
        assert 0 < row["seconds_p20"] <= row["seconds_median"] <= row["seconds_p80"]
        assert row["peak_mib"] > 0
        assert row["batch_rule"] == "measured"
        # No batch fits that would need more than everything for logits and gradient alone.
        assert 2 <= row["largest_batch"] <= 2**28 / (2 * 4 * 5 * 33 * 40)
    loss = workload.make_loss("fast", 5)
    _, target = workload.make_inputs((2, 5, 33, 40), kind, "cpu")
    said = loss.explain(torch.randn(2, 5, 33, 40), target).bytes_saved
    assert rows["fast"]["saved_bytes"] == said < rows["reference"]["saved_bytes"] / 10
    out = capsys.readouterr().out
    ratio = rows["fast"]["largest_batch"] / rows["reference"]["largest_batch"]
    assert f"{rows['fast']['largest_batch']} " in out
    assert f"{ratio:.1f}x" in out
    assert "0.25 GiB (--memory-gib)" in out


@needs_fast
def test_mine_refuses_what_does_not_fit_and_still_shows_ours(capsys):
    shape = (8, 40, 64, 64)
    naive, ours = (
        batch.needed_bytes(workload.make_loss(name, 40), shape, "labels", "cpu") / 2**30
        for name in ("reference", "fast")
    )
    assert ours < naive
    between = str((ours + naive) / 2)
    words = ["--mine", *map(str, shape), "--memory-gib", between]
    assert cli.main(["bench", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    naive_line = next(i for i, line in enumerate(lines) if line.startswith("reference"))
    assert "n/a" in lines[naive_line]
    assert "not run: about" in lines[naive_line + 1]
    assert "GiB needed" in lines[naive_line + 1]
    assert any(line.startswith("fast ") and "ms" in line for line in lines)


@needs_fast
@pytest.mark.parametrize("name", ["reference", "fast"])
@pytest.mark.parametrize("kind", workload.TARGETS)
def test_the_model_of_memory_is_no_less_than_what_was_measured(name, kind):
    shape = (1, 150, 96, 96)
    loss = workload.make_loss(name, shape[1])
    used = measure.in_fresh_process(batch.used_by, name, shape, kind, "cpu")
    assert used.peak is not None
    assert used.inputs + used.peak <= batch.needed_bytes(loss, shape, kind, "cpu")


def test_the_default_shapes_are_timed_too(monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK", ((1, 3, 32, 32),))
    assert cli.main(["bench", "--quick"]) == 0
    assert "1x3x32x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mine", "1", "5", "8", "8"], "got 8 x 8, expected at least 32 x 32"),
        (["--mine", "1", "1", "32", "32", "--target", "topk"], "top-k of C >= 2"),
        (["--roofline", "--csv", "no-such-file.csv"], "no-such-file.csv"),
        (["--roofline", "--mine", "1", "5", "8", "8"], "expected at least 32 x 32"),
    ],
)
def test_what_cannot_be_measured_is_said(words, said, capsys):
    assert cli.main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--mine", "1", "5", "0", "8"], ["--mine", "1", "5"]])
def test_a_shape_is_four_positive_numbers(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *words])
    assert "--mine" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- roofline


def test_every_workload_has_a_table(capsys):
    assert cli.main(["bench", "--roofline"]) == 0
    out = capsys.readouterr().out
    for name, work in launches.WORKLOADS.items():
        forward, backward = launches.launches(work)
        gflop = sum(v.flops for v in (*forward, *backward)) / 1e9
        table = out.split(f"### {name}: ")[1].split("###")[0]
        assert "| backward: softmax_bwd |" in table
        assert f"| all |  | {gflop:,.0f} |" in table


@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
@pytest.mark.parametrize("workspace_mb", [24, 256])
def test_the_flops_counted_are_those_of_explain(kind, workspace_mb):
    shape = (2, 32, 128, 96)
    forward, backward = launches.launches(launches.Workload(shape, kind), workspace_mb)
    loss = gpl_fast.GenericPerceptualLoss(32, backend="fast")
    if ops.load() is not None:
        pytest.skip("explain of the fast backend needs the operators")
    pred = torch.randn(shape)
    _, target = workload.make_inputs(shape, kind, "cpu")
    said = loss.explain(pred, target)
    assert sum(v.flops for v in (*forward, *backward)) == pytest.approx(said.flops, rel=1e-9)
    names = [v.name for v in forward]
    assert names.count("conv_block_fwd") >= 5 * names.count("softmax_pack_fwd") > 0
    gradient = 2 * pred.numel() * 4  # the logits once in, their gradient once out
    assert sum(v.bytes for v in backward if v.name == "softmax_bwd") > gradient


@pytest.mark.parametrize("workspace_mb", [24, 256])
def test_the_flops_of_one_kernels_gradients_are_the_same(workspace_mb):
    """conv_block_bwd's, in strips but for their halos, where measured rows say so."""
    work = launches.Workload((2, 32, 128, 96), "dense")
    on_gpu = {"device": "cuda", "forward": "triton", "backward": "compiled", "arch": 90}
    found = {}
    for kernels in (False, True):
        with policy.injected(Told(**on_gpu, strip_mb=None, kernels=kernels)) as name:
            _, found[kernels] = launches.launches(work, workspace_mb, name)
    assert {v.name for v in found[True]} >= {"conv_block_bwd", "conv_block_logits_bwd"}
    flops = [sum(v.flops for v in found[k]) for k in (False, True)]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)
    assert all(v.bytes > 0 for v in found[True])


def test_strips_of_rows_move_whole_maps_once():
    work = launches.Workload((1, 40, 256, 128), "dense")
    moved = []
    for workspace_mb in (256, 8):
        _, backward = launches.launches(work, workspace_mb)
        codes = [v for v in backward if v.name == "relu_pool_bwd"]
        moved.append((len(codes), sum(v.bytes for v in codes)))
    assert moved[1][0] > moved[0][0]
    assert moved[1][1] < 1.4 * moved[0][1]  # the halos


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    rates = roofline.Rates(100, 2.0, "here")
    assert rates.seconds(launches.Launch("a", 1e14, 1e9)) == 1.0
    assert rates.seconds(launches.Launch("b", 1e12, 4e12)) == 2.0


def test_every_gpu_says_where_its_rates_are_from():
    assert set(roofline.GPUS) == {"h200", "h100", "a100", "rtx4090"}
    for peak, *measured in roofline.GPUS.values():
        assert "NVIDIA" in peak.source
        assert all(m.tflops < peak.tflops and m.tbps < peak.tbps for m in measured)


def test_measured_rows_are_printed_beside(tmp_path, capsys):
    row = {"shape": "2x5x64x64", "target": "labels", "provider": "gpl_fast-bf16"}
    row |= {"forward_seconds": 0.004, "backward_seconds": 0.002, "seconds_median": 0.006}
    other = {**row, "shape": "2x5x32x32", "provider": "elsewhere"}
    failed = {"shape": "2x5x64x64", "target": "labels", "provider": "broken", "error": "memory"}
    of_gpu = {"machine": "a GPU", "benchmark": {"rows": [row, other, failed]}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(of_gpu))
    words = ["bench", "--roofline", "--gpu", "a100", "--mine", "2", "5", "64", "64"]
    assert cli.main([*words, "--csv", str(path)]) == 0
    out = capsys.readouterr().out
    assert "312 TFLOP/s, 2.039 TB/s (NVIDIA A100" in out
    assert "| gpl_fast-bf16, a GPU | 4.00 (" in out
    assert "elsewhere" not in out
    assert "broken" not in out
    table = tmp_path / "rows.csv"
    table.write_text(
        "machine,shape,target,provider,seconds_median,forward_seconds\n"
        "a CPU,2x5x64x64,labels,ours,0.5,\n"
    )
    assert cli.main([*words, "--csv", str(table)]) == 0
    assert "| ours, a CPU |  |  | 500.00 (" in capsys.readouterr().out


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json: got no rows of a benchmark"):
        roofline.read_measured(path)


def test_the_roofline_needs_neither_triton_nor_the_operators():
    code = """
import sys
sys.modules["triton"] = None
from pathlib import Path
from gpl_fast import cli, ops
ops.LIBRARY = Path("/not/there/libgpl_fast.so")
sys.exit(cli.main(["bench", "--roofline", "--gpu", "rtx4090", "--mine", "1", "5", "64", "64"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "forward: conv_block_fwd" in done.stdout
