"""benchmarks/run.py and report.py: every sweep at tiny sizes, and what is made of the rows."""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpl_fast
from gpl_fast import ops
from gpl_fast.tools import measure

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ceiling
import findings
import gate
import providers
import report
import run

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


@pytest.mark.parametrize("sweep", [name for name in run.SWEEPS if name not in ("crop", "batch")])
def test_every_sweep_runs(sweep, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ceiling, "SECONDS", 0.0)  # the fewest calls
    monkeypatch.setattr(run, "HOPELESS", math.inf)  # no provider
    table, image = tmp_path / "table.md", tmp_path / "plot.png"
    words = ["--sweep", sweep, "--dry", "--out", tmp_path / "rows.csv", "--markdown", table]
    words += ["--no-memory"]
    pytest.importorskip("matplotlib")
    assert run_with(monkeypatch, *words, "--plot", image) == 0
    rows = report.read_csv(tmp_path / "rows.csv")
    cases = [case.on_few_pixels() for case in run.SWEEPS[sweep]]
    measured = [(row["shape"], row["target"], row["provider"]) for row in rows]
    for case in cases:
        for provider in case.providers:
            assert ("x".join(map(str, case.shape)), case.kind, provider) in measured
    for row in rows:
        assert row["sweep"] == sweep
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
        ours = row["provider"].startswith("gpl_fast")
        assert (row["later_seconds"] is not None) == (sweep == "classes" and ours)
    assert image.exists() == (sweep in findings.VARIED)
    page = table.read_text()
    assert f"`python benchmarks/run.py --sweep {sweep}`" in page
    assert all(f"| {row['provider']} |" in page for row in rows)
    if sweep == "training":
        assert "cross-entropy" in {row["provider"] for row in rows}
    out = capsys.readouterr().out
    assert "growth, classes, gpl_fast-bf16: C 5 to 11: time x" in out or sweep != "classes"


@pytest.mark.parametrize("named", [False, True])
def test_a_hopeless_dtype_of_plain_pytorch_is_timed_once(named, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "HOPELESS", 0)  # all of them but the baseline
    words = ["--shapes", "1,5,32,32", "1,9,32,32", "--targets", "labels", "--dry", "--no-memory"]
    words += ["--providers", *run.COMMON] * named
    assert run_with(monkeypatch, *words, "--out", tmp_path / "rows.csv") == 0
    rows = report.read_csv(tmp_path / "rows.csv")
    first = {row["provider"] for row in rows if row["shape"] == rows[0]["shape"]}
    second = {row["provider"] for row in rows if row["shape"] != rows[0]["shape"]}
    left_out = first - second
    assert left_out == (set() if named else {"eager-bf16", "eager-bf16-cl"})
    out = capsys.readouterr().out
    assert all(f"{name} is left out" in out for name in left_out)
    assert all(row["value_error"] < 0.2 for row in rows)


@pytest.mark.slow
def test_a_hopeless_dtype_of_plain_pytorch_still_judges_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "HOPELESS", 0)
    monkeypatch.setitem(gate.LIMITS, "gpl_fast-bf16", (0.0, 1.0))  # wrong but for the comparison
    words = ["--sweep", "net", "--dry", "--no-memory", "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words) == 0
    rows = report.read_csv(tmp_path / "rows.csv")
    second = {row["provider"] for row in rows if row["target"] == "dense"}
    assert second == {"eager-fp32", *run.OURS}


def test_cases_are_visited_in_turns(monkeypatch, tmp_path, capsys):
    words = ["--shapes", "1,5,32,32", "1,9,32,32", "--targets", "labels", "--dry", "--no-memory"]
    words += ["--providers", "eager-fp32", "gpl_fast-fp32", "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ("own:", "visi")]
    cases = [f"own: 1x{c}x32x32 labels, flat, 1,1,1,1,1" for c in (3, 4)]
    assert titles == [*cases, "visit 2", *cases, *cases]  # the last ones are the rows'
    assert {row["rounds"] for row in report.read_csv(tmp_path / "rows.csv")} == {2}
    # A clock that is read before and after each of four visits, and once more before each of those
    # that minutes allow for: at 9, 12 and 15 of 18 seconds.
    clock = SimpleNamespace(monotonic=map(float, itertools.count()).__next__)
    monkeypatch.setattr(run, "time", clock)
    assert run_with(monkeypatch, *words, "--minutes", 0.3) == 0
    rounds = {(row["shape"], row["rounds"]) for row in report.read_csv(tmp_path / "rows.csv")}
    assert len(rounds) == 2
    assert sum(number for _, number in rounds) == 2 + 2 + 3


def visited(took, **shortest):
    one = object.__new__(run.Measurement)
    one.took, one.shortest, one.hopeless = took, shortest, {}
    return one


def test_more_visits_go_to_the_case_whose_shortest_steps_are_least_certain():
    found = visited(1.0, base=[3.0, 9.0, 3.0], ours=[2.0, 1.0, 1.0])
    near = visited(2.0, base=[3.0, 3.0], ours=[1.5, 2.0, 1.2])
    far = visited(2.0, base=[4.0, 3.0, 5.0], ours=[1.0, 1.0, 1.0])
    once = visited(3.0, base=[3.0], ours=[1.0])
    assert found.doubt() == 0.0
    assert near.doubt() == pytest.approx(0.25 / 3)
    assert far.doubt() == pytest.approx(1 / 9)
    assert once.doubt() == math.inf
    assert visited(1.0).doubt() == 0.0  # all of its providers are wrong
    once.hopeless = {"ours": {}, "base": {}}  # no more visits to these
    assert once.doubt() == 0.0
    once.hopeless = {}
    cases = [found, near, far, once]
    assert run.least_certain(cases, 3.5) is once
    assert run.least_certain(cases, 2.5) is far
    assert run.least_certain(cases, 1.5) is found
    assert run.least_certain(cases, 0.5) is None


@pytest.mark.parametrize("words", [[], ["--default-allocator"]])
def test_every_visit_is_a_process_of_its_own(words, monkeypatch, tmp_path):
    fresh, visits = measure.in_fresh_process, []

    def watched(function, *args):
        if function is run.take_rounds:
            visits.append((args[0].shape[1], args[-1]))
        return fresh(function, *args)

    monkeypatch.setattr(measure, "in_fresh_process", watched)
    words = ["--shapes", "1,5,32,32", "1,9,32,32", "--targets", "labels", "--dry", *words]
    words += ["--no-memory", "--providers", *run.OURS, "--out", tmp_path / "rows.csv"]
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
    case = run.Case("own", (2, 5, 128, 104), "topk", providers=("eager-fp32",))
    found = run.take_rounds(case, case.providers, huge, 2, 0.0, False)
    assert [len(parts) for parts in found["eager-fp32"]] == [2, 2]
    assert shapes == [warmed_up, *2 * [case.shape]]


def test_memory_is_measured_in_processes_of_their_own(monkeypatch, tmp_path):
    words = ["--shapes", "2,5,64,64", "--targets", "dense", "--dry", "--out", tmp_path / "rows.csv"]
    assert run_with(monkeypatch, *words, "--providers", "eager-fp32", "gpl_fast-bf16") == 0
    naive, ours = report.read_csv(tmp_path / "rows.csv")
    n, c, h, w = findings.sizes_of(ours)
    gradient = 4 * findings.elements(ours)
    for row in (naive, ours):
        assert row["peak_mib"] * 2**20 > gradient
    loss = gpl_fast.GenericPerceptualLoss(c, compute_dtype=torch.bfloat16, backend="fast")
    x = torch.randn(n, c, h, w)
    assert ours["saved_bytes"] == loss.explain(x, x).bytes_saved < naive["saved_bytes"] / 10


def test_the_command_of_a_case_measures_that_case(monkeypatch):
    for case in [case for cases in run.SWEEPS.values() for case in cases]:
        words = shlex.split(case.command())[2:]
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        (again,) = run.parse_arguments().cases
        same = ("shape", "kind", "peaked", "net", "providers", "floor")
        assert all(getattr(again, k) == getattr(case, k) for k in same)


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
    numbers = dict.fromkeys(k for k in report.FIELDS if k not in report.TEXTS)
    texts = dict.fromkeys(report.TEXTS, "here")
    defaults = {"sweep": "classes", "shape": "1x19x256x256", "target": "labels", "peaked": True}
    defaults |= {"net": "1,1,1,1,1", "provider": "gpl_fast-bf16", "dtype": "bfloat16"}
    defaults |= {"threads": 2.0, "rounds": 4.0, "seconds_median": 1.0, "seconds_p20": 0.9}
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
    report.write_csv(rows, tmp_path / "rows.csv")
    assert report.read_csv(tmp_path / "rows.csv") == rows


def test_rows_of_an_older_run_can_be_read():
    for path in (report.ROOT / "benchmarks" / "results").glob("*.csv"):
        rows = report.read_csv(path)
        assert rows
        assert all(row["seconds_median"] > 0 for row in rows)


def test_a_slope_is_the_exponent():
    assert findings.slope({c: 3.0 * c**0.9 for c in (19, 150, 1203)}) == pytest.approx(0.9)
    assert findings.slope({2: 1.0, 8: 64.0}) == pytest.approx(3.0)


def classes_rows(exponent, later=None, **given):
    """Seconds ~ C^exponent beyond 0.2, which one class and the later blocks take."""
    return [
        a_row(shape=f"1x{c}x256x256", seconds_median=0.2 + (0.001 * c**exponent if c > 1 else 0),
              read_seconds=1e-6 * c, later_seconds=later, **given)
        for c in (1, 19, 150, 847, 1203)
    ]  # fmt: skip


@pytest.mark.parametrize("later", [None, 0.2])
def test_what_does_not_depend_on_the_classes_is_subtracted(later):
    rows = {findings.classes_of(row): row for row in classes_rows(1.0, later)}
    beyond = findings.beyond_fixed(rows)
    assert sorted(beyond) == [19, 150, 847, 1203]
    assert beyond[150] == pytest.approx(0.15)
    rows[1]["seconds_median"] += 0.1  # of one class only where nothing better was measured
    assert findings.beyond_fixed(rows)[150] == pytest.approx(0.05 if later is None else 0.15)


@pytest.mark.parametrize("later", [None, 0.2])
@pytest.mark.parametrize(("exponent", "verdict"), [(0.95, "met"), (1.2, "NOT MET")])
def test_growth_with_the_classes_is_checked(exponent, verdict, later):
    (line,) = findings.checks(classes_rows(exponent, later))
    assert f"~ C^{exponent:.2f} (reading the logits C^1.00), at most C^1.05: {verdict}" in line
    assert findings.checks(classes_rows(exponent, later, provider="eager-fp32")) == []


def test_load_may_hide_the_growth_with_the_classes():
    (line,) = findings.checks(classes_rows(0.95, later=9.0))
    assert line.endswith("a step took no longer than its later blocks: not told")


def test_speed_and_memory_of_many_classes_are_checked():
    gradient = 4 * 1203 * 512 * 512
    given = {"sweep": "large", "shape": "1x1203x512x512", "peak_mib": (gradient + 2e8) / 2**20}
    lines = findings.checks([a_row(**given, speedup_vs_eager_fp32=4.6)])
    assert "4.60 times as fast as eager-fp32, at least 4.5: met" in lines[0]
    assert "0.200 GB, at most 0.3 GB: met" in lines[1]
    given["peak_mib"] = (gradient + 4e8) / 2**20
    lines = findings.checks([a_row(**given, target="dense", speedup_vs_eager_fp32=2.9)])
    assert "at least 3: NOT MET" in lines[0]
    assert "0.400 GB, at most 0.3 GB: NOT MET" in lines[1]
    assert findings.checks([a_row(**given, peaked=False)]) == []


def test_growth_is_told_beside_theory():
    rows = [a_row(sweep="batch", shape=f"{n}x19x64x64", seconds_median=0.1 * n, gflop=float(n),
                  peak_mib=10.0 + n, saved_bytes=100.0 * n) for n in (4, 1, 2)]  # fmt: skip
    (line,) = findings.growth(rows)
    assert "batch, gpl_fast-bf16: N 1 to 4: time x4.0, peak x1.3, saved x4.0" in line
    assert "FLOPs x4.0, logits x4.0" in line


def test_where_it_is_not_faster_is_listed():
    mine = a_row(seconds_median=1.0)
    other = a_row(provider="eager-bf16-cl", seconds_median=1.05, speedup_vs_eager_fp32=3.81)
    single = a_row(provider="eager-fp32", dtype="float32", seconds_median=0.2)
    (line,) = findings.slower([mine, other, single])
    assert "gpl_fast-bf16 1000 ms, eager-bf16-cl 1050 ms: 1.05×" in line
    assert findings.slower([mine, {**other, "speedup_vs_eager_fp32": 3.5}, single]) == []
    # Without the loss there is nothing to compare with.
    without = a_row(provider="cross-entropy", seconds_median=0.1, value_error=None)
    assert findings.slower([mine, without]) == []
    assert "Nowhere here." in report.markdown([mine])


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


def test_a_summary_has_a_line_for_each_row(tmp_path, monkeypatch, capsys):
    rows = [a_row(seconds_median=0.25, peak_mib=12.3, saved_bytes=2**21, conv_share=0.5),
            a_row(provider="eager-fp32", value_error=None, grad_cosine=None, peak_mib=None,
                  saved_bytes=None, speedup_vs_eager_fp32=1.0)]  # fmt: skip
    report.write_csv(rows, tmp_path / "a.csv")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "a.csv"), "--summary"])
    assert report.main() == 0
    ours, plain = capsys.readouterr().out.splitlines()[2:]
    assert ours.startswith("| 1×19×256×256 | labels, peaked | gpl_fast-bf16 | 0.250 s | 4.00× |")
    assert "| 12 MiB | 2.0 MiB |" in ours
    assert ours.endswith("| 50% |")
    assert plain.startswith("|  |  | eager-fp32 |")
    assert plain.endswith("| 1.00× |  |  |  |  |  |")


def test_two_runs_are_compared_by_their_ratios(tmp_path, monkeypatch, capsys):
    first = [a_row(), a_row(shape="1x150x256x256", speedup_vs_eager_fp32=3.0),
             a_row(provider="eager-fp32", speedup_vs_eager_fp32=1.0)]  # fmt: skip
    second = [{**row, "seconds_median": 9.0} for row in first]
    second[1] = {**second[1], "speedup_vs_eager_fp32": 3.3}
    changes = [round(change, 6) for change, *_ in findings.compare(first, second)]
    assert changes == [0.1, 0.0]
    assert changes == [round(change, 6) for change, *_ in findings.compare(second, first)]
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for rows, path in zip((first, second), paths, strict=True):
        report.write_csv(rows, path)
    monkeypatch.setattr(sys, "argv", ["report.py", str(paths[0]), "--compare", str(paths[1])])
    assert report.main() == 0
    assert "largest change is 10.0%, at most 15%: met" in capsys.readouterr().out
    second[1]["speedup_vs_eager_fp32"] = 2.5
    report.write_csv(second, paths[1])
    assert report.main() == 1
    assert "20.0%, at most 15%: NOT MET" in capsys.readouterr().out
    report.write_csv([a_row(sweep="own")], paths[1])
    assert report.main() == 1
