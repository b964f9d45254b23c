"""benchmarks/run.py and report.py: every sweep at tiny sizes, and what is made of the rows."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import gpl_fast
from gpl_fast import ops
from gpl_fast.tools import measure, roofline

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ceiling
import gate
import peer_losses
import providers
import report
import run
import sweeps

# ------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("classes", [1, 19, 150, 1203])
def test_peaked_logits_have_the_entropy_of_a_trained_net(classes):
    logits, teacher = providers.make_inputs((1, classes, 48, 48), "dense", peaked=True)
    flat, _ = providers.make_inputs((1, classes, 48, 48), "dense")
    for x in (logits, teacher):
        two = x if classes > 1 else torch.cat([x, torch.zeros_like(x)], dim=1)
        log_p = two.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
        assert float(entropy) == pytest.approx(providers.TRAINED_ENTROPY, rel=0.35)
    assert not torch.equal(flat, logits)


@pytest.mark.parametrize("classes", [1, 5, 150])
def test_labels_are_regions_of_few_classes(classes):
    _, labels = providers.make_inputs((2, classes, 96, 96), "labels")
    assert labels.shape == (2, 96, 96)
    assert 0 <= labels.min() <= labels.max() < max(classes, 2)
    same = (labels[..., 1:] == labels[..., :-1]).float().mean()
    assert same > 0.75  # noise of 5 classes: 0.2
    assert all(image.unique().numel() <= providers.PRESENT for image in labels)
    if classes > providers.PRESENT:
        assert set(labels[0].unique().tolist()) != set(labels[1].unique().tolist())


def test_a_topk_target_lists_each_class_once_and_its_label_first():
    _, labels = providers.make_inputs((1, 40, 48, 48), "labels")
    _, topk = providers.make_inputs((1, 40, 48, 48), "topk")
    assert topk.indices.shape == (1, providers.TOP, 48, 48)
    ordered = topk.indices.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all()
    assert torch.equal(topk.indices[:, 0], labels)


@pytest.mark.parametrize("net", ["1,1,1,1,1", "vgg11"])
def test_all_providers_give_one_value(net):
    logits, target = providers.make_inputs((1, 7, 64, 48), "labels")
    eager = [name for name in providers.PROVIDERS if not name.startswith("compile")]
    made = {name: providers.PROVIDERS[name](7, "labels", "cpu", net) for name in eager}
    found = gate.errors(made, logits, target, net)
    assert set(found) == set(eager)
    assert not gate.complaints(found)
    assert providers.flops((1, 7, 64, 48), "labels", "vgg11") > providers.flops(
        (1, 7, 64, 48), "labels"
    )


# ------------------------------------------------------------------------------------------- a run


def run_with(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    return run.main()


@pytest.fixture(autouse=True)
def no_dtype_is_hopeless(monkeypatch):
    monkeypatch.setattr(run, "HOPELESS", math.inf)


# Two are like others; "lpips" needs the package: tests/peers.
@pytest.mark.parametrize("sweep", sorted({*sweeps.SWEEPS} - {"crop", "batch", "lpips"}))
def test_every_sweep_runs(sweep, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceiling, "SECONDS", 0.0)  # the fewest calls
    words = ["--sweep", sweep, "--dry", "--no-memory", "--out", tmp_path / "rows.csv"]
    pytest.importorskip("matplotlib")
    image = tmp_path / "plot.png"
    assert run_with(monkeypatch, *words, "--plot", image) == 0
    rows = report.read_csv(tmp_path / "rows.csv")
    cases = [case.on_few_pixels() for case in sweeps.SWEEPS[sweep]]
    measured = [(row["shape"], row["target"], row["provider"]) for row in rows]
    for case in cases:
        for provider in case.providers:
            assert ("x".join(map(str, case.shape)), case.kind, provider) in measured
    for row in rows:
        assert row["sweep"] == sweep
        assert row["command"].startswith(f"python benchmarks/run.py --sweep {sweep} --dry")
        assert row["seconds_median"] > 0
        assert row["rounds"] == 2
        if row["provider"] == "eager-fp32":
            assert row["speedup_vs_eager_fp32"] == 1.0
        if sweep == "training":
            assert row["forward_seconds"] is None
        else:
            assert row["forward_seconds"] + row["backward_seconds"] > 0
            assert row["value_error"] < 0.2
        assert (row["conv_seconds"] is not None) == (sweep in ("large", "classes"))
    assert image.exists() == (sweep in report.VARIED)
    out = capsys.readouterr().out
    assert all(f"| {row['provider']} |" in out for row in rows)
    if sweep == "training":
        assert "cross-entropy" in {row["provider"] for row in rows}
    assert "classes, gpl_fast-bf16: C 5 to 11: time x" in out or sweep != "classes"


def test_lpips_is_left_out_with_a_word_where_it_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peer_losses, "find_spec", lambda name: None)
    assert run_with(monkeypatch, "--sweep", "lpips", "--out", tmp_path / "rows.csv") == 1
    error = capsys.readouterr().err
    assert error.count("left out: no lpips and no torchvision; make test-peers installs them") == 2
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("named", [False, True])
def test_a_hopeless_dtype_of_plain_pytorch_is_left_out(named, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "HOPELESS", 0)
    words = ["--shapes", "1,5,32,32", "--targets", "labels", "--dry", "--no-memory"]
    words += ["--providers", *sweeps.COMMON] * named
    assert run_with(monkeypatch, *words, "--out", tmp_path / "rows.csv") == 0
    found = {row["provider"] for row in report.read_csv(tmp_path / "rows.csv")}
    assert found == {*sweeps.OURS, "eager-fp32", *["eager-bf16-cl"] * named}
    assert ("plain PyTorch's bfloat16 is left out" in capsys.readouterr().out) is not named


@pytest.mark.slow
def test_a_hopeless_dtype_of_plain_pytorch_still_judges_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "HOPELESS", 0)
    monkeypatch.setitem(gate.LIMITS, "gpl_fast-bf16", (0.0, 1.0))  # wrong but for the comparison
    words = ["--sweep", "net", "--dry", "--no-memory", "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words) == 0
    found = {row["provider"] for row in report.read_csv(tmp_path / "rows.csv")}
    assert found == {"eager-fp32", *sweeps.OURS}


@pytest.mark.parametrize("words", [[], ["--default-allocator"]])
def test_every_visit_is_a_process_of_its_own(words, monkeypatch, tmp_path):
    fresh, visits = measure.in_fresh_process, []

    def watched(function, *args):
        if function is run.take_rounds:
            visits.append((args[0].shape[1], args[-1]))
        return fresh(function, *args)

    monkeypatch.setattr(measure, "in_fresh_process", watched)
    words = ["--shapes", "1,5,32,32", "1,9,32,32", "--targets", "labels", "--dry", *words]
    words += ["--no-memory", "--providers", *sweeps.OURS, "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words) == 0
    kept = "--default-allocator" not in words
    assert visits == 2 * [(3, kept), (4, kept)]
    rows = report.read_csv(tmp_path / "rows.csv")
    assert {("--default-allocator" in row["command"]) for row in rows} == {not kept}


@pytest.mark.parametrize(("huge", "warmed_up"), [(False, (2, 5, 128, 104)), (True, (1, 5, 96, 96))])
def test_a_huge_step_is_warmed_up_on_a_crop(huge, warmed_up, monkeypatch):
    shapes = []

    def recording(classes, kind, device, net):
        def value(logits, *target):
            shapes.append(tuple(logits.shape))
            return logits.sum()

        return providers.Provider(value, list)

    monkeypatch.setitem(providers.PROVIDERS, "eager-fp32", recording)
    case = sweeps.Case("own", (2, 5, 128, 104), "topk", providers=("eager-fp32",))
    found = run.take_rounds(case, case.providers, huge, 0.0, False)
    assert [len(parts) for parts in found["eager-fp32"]] == [2]
    assert shapes == [warmed_up, case.shape]


def test_memory_is_measured_in_processes_of_their_own(monkeypatch, tmp_path):
    words = ["--shapes", "2,5,64,64", "--targets", "dense", "--dry", "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words, "--providers", "eager-fp32", "gpl_fast-bf16") == 0
    naive, ours = report.read_csv(tmp_path / "rows.csv")
    n, c, h, w = report.sizes_of(ours)
    for row in (naive, ours):
        assert row["peak_mib"] * 2**20 > 4 * n * c * h * w  # the gradient
    loss = gpl_fast.GenericPerceptualLoss(c, compute_dtype=torch.bfloat16, backend="fast")
    x = torch.randn(n, c, h, w)
    assert ours["saved_bytes"] == loss.explain(x, x).bytes_saved < naive["saved_bytes"] / 10


def test_a_wrong_provider_is_left_out_and_the_run_fails(monkeypatch, tmp_path, capsys):
    good = providers.PROVIDERS["gpl_fast-fp32"]

    def doubled(*args):
        provider = good(*args)
        return providers.Provider(lambda *a: 2 * provider.value(*a), provider.weights)

    monkeypatch.setitem(providers.PROVIDERS, "gpl_fast-fp32", doubled)
    words = ["--shapes", "1,5,40,48", "--targets", "labels", "--no-memory", "--dry"]
    words += ["--providers", "eager-fp32", "gpl_fast-fp32", "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words) == 1
    assert "gpl_fast-fp32 is left out: its value is off by 1.0e+00" in capsys.readouterr().err
    assert {r["provider"] for r in report.read_csv(tmp_path / "rows.csv")} == {"eager-fp32"}


def test_bfloat16_of_a_deep_network_is_judged_by_plain_pytorch_in_bfloat16():
    off = {"gpl_fast-bf16": (0.08, 0.93)}
    assert "gpl_fast-bf16" in gate.complaints(off)
    assert "gpl_fast-bf16" in gate.complaints({**off, "eager-bf16-cl": (0.03, 0.96)})
    assert not gate.complaints({**off, "eager-bf16-cl": (0.05, 0.96)})
    assert "gpl_fast-fp32" in gate.complaints({"gpl_fast-fp32": (0.08, 0.9), **off})
    assert gate.complaints({"gpl_fast-fp32": (math.nan, 1.0)})


# ------------------------------------------------------------------------------- what rows become


def a_row(**given):
    numbers = dict.fromkeys(report.NUMBERS)
    texts = dict.fromkeys(report.SHARED, "here")
    defaults = {"sweep": "classes", "shape": "1x19x256x256", "target": "labels", "peaked": True}
    defaults |= {"net": "1,1,1,1,1", "provider": "gpl_fast-bf16", "dtype": "bfloat16"}
    defaults |= {"threads": "2", "rounds": 4.0, "seconds_median": 1.0, "seconds_p20": 0.9}
    defaults |= {"seconds_p80": 1.1, "speedup_vs_eager_fp32": 4.0, "value_error": 1e-4}
    return {**numbers, **texts, **defaults, **given}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("AMD EPYC", "AMD EPYC, family 25, model 17 (avx512_bf16)"),
        ("AMD EPYC 9654", "AMD EPYC 9654 (avx512_bf16)"),
    ],
)
def test_a_cpu_without_a_number_is_told_by_family_and_model(name, told, monkeypatch):
    lines = ["cpu family\t: 25", "model\t\t: 17", f"model name\t: {name}"]
    text = "\n".join([*lines, "flags\t\t: avx2 avx512f avx512_bf16"])
    monkeypatch.setattr(report.os.path, "exists", lambda path: True)
    monkeypatch.setattr(report.Path, "read_text", lambda path: text)
    assert report.machine() == told


def test_rows_survive_the_csv(tmp_path):
    rows = [a_row(), a_row(peaked=False, peak_mib=12.5, shape="2x19x64x64")]
    path = tmp_path / "rows.csv"
    report.write_csv(rows, path)
    assert report.read_csv(path) == rows
    assert path.read_text().count("here") == len(report.SHARED) - 1  # once for all rows
    measured = roofline.read_measured(path)
    assert [row["shape"] for row in measured] == [(1, 19, 256, 256), (2, 19, 64, 64)]
    assert {row["machine"] for row in measured} == {"here"}


def test_published_rows_can_be_read():
    paths = list((report.ROOT / "benchmarks" / "results").glob("*.csv"))
    assert paths
    for path in paths:
        rows = report.read_csv(path)
        assert all(row["seconds_median"] > 0 for row in rows)
        assert len(roofline.read_measured(path)) == len(rows) > 0
        assert rows[0]["machine"] in report.page(rows)


def test_growth_is_told_beside_theory():
    rows = [a_row(sweep="batch", shape=f"{n}x19x64x64", seconds_median=0.1 * n, gflop=float(n),
                  peak_mib=10.0 + n, saved_bytes=100.0 * n) for n in (4, 1, 2)]  # fmt: skip
    (line,) = report.growth(rows)
    assert "batch, gpl_fast-bf16: N 1 to 4: time x4.0, peak x1.3, saved x4.0" in line
    assert "FLOPs x4.0, logits x4.0" in line


def test_where_it_is_not_faster_is_listed():
    mine = a_row(seconds_median=1.0)
    other = a_row(provider="eager-bf16-cl", seconds_median=1.05, speedup_vs_eager_fp32=3.81)
    single = a_row(provider="eager-fp32", dtype="float32", seconds_median=0.2)
    (line,) = report.slower([mine, other, single])
    assert "gpl_fast-bf16 against eager-bf16-cl: 1.05×" in line
    assert report.slower([mine, {**other, "speedup_vs_eager_fp32": 3.5}, single]) == []
    # Without the loss there is nothing to compare with.
    without = a_row(provider="cross-entropy", seconds_median=0.1, value_error=None)
    assert report.slower([mine, without]) == []
    assert "nowhere here." in report.page([mine])


def test_machines_are_set_side_by_side(tmp_path, monkeypatch, capsys):
    old = [a_row(machine="old"), a_row(machine="old", provider="eager-bf16-cl",
                                       speedup_vs_eager_fp32=0.75)]  # fmt: skip
    new = [a_row(machine="new", provider="gpl_fast-fp32", speedup_vs_eager_fp32=5.0),
           a_row(machine="new", sweep="training", net="vgg19", target="dense")]  # fmt: skip
    paths = [str(tmp_path / "old.csv"), str(tmp_path / "new.csv")]
    for rows, path in zip((old, new), paths, strict=True):
        report.write_csv(rows, Path(path))
    monkeypatch.setattr(sys, "argv", ["report.py", *paths, "--machines"])
    assert report.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        "| logits | target | old | new |",
        "|---|---|--:|--:|",
        "| 1×19×256×256 | labels, peaked | – · 4.0 · 0.8 | 5.0 · – · – |",
        "| 1×19×256×256, vgg19 | dense, peaked, training | – · – · – | – · 4.0 · – |",
    ]


def test_the_table_has_a_line_for_each_row():
    rows = [a_row(seconds_median=0.25, peak_mib=12.3, saved_bytes=2**21, conv_seconds=0.125),
            a_row(provider="eager-fp32", value_error=None, speedup_vs_eager_fp32=1.0)]  # fmt: skip
    ours, plain = report.table(rows)[2:]
    assert ours.startswith("| 1×19×256×256 | labels, peaked | gpl_fast-bf16 | 0.250 s (0.900 s–")
    assert "| 4.00× | 12 MiB | 2.0 MiB |" in ours
    assert ours.endswith("| 50% |")
    assert plain.startswith("|  |  | eager-fp32 |")
    assert plain.endswith("| 1.00× |  |  |  |  |  |")
