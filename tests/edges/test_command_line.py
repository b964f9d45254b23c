"""The command line: wrong words in one line and before any work, pipes and Ctrl-C, variables."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NotRequired, get_origin, get_type_hints

import pytest

import gpl_fast
from gpl_fast import backend, cli, demo, environment, ops, tiles
from gpl_fast.demo import experiment
from gpl_fast.fast import measured
from gpl_fast.tools import bench, info, launches, measure, roofline, workload

ROOT = Path(__file__).resolve().parents[2]
MODULE = [sys.executable, "-m", "gpl_fast"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [*environment.VARIABLES, *environment.unknown()]:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_work(monkeypatch):
    """Anything that would take a while fails."""

    def work(*args, **options):
        raise AssertionError("work was done")

    for module, name in ((bench, "run"), (roofline, "report"), (demo, "missing_packages")):
        monkeypatch.setattr(module, name, work)


def refused(words, capsys):
    """The one line on stderr with which the command ends, with status 2."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    assert status == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("gpl-fast")
    return said.err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"gpl-fast {gpl_fast.__version__}\n"


# ----------------------------------------------------------------------------------------- numbers

WHOLE = r"expected a whole number from 1 to 2147483647"
BAD = [
    (["bench", "--mine", 1, 5, "abc", 8], r"--mine: got 'abc', " + WHOLE),
    (["bench", "--mine", 1, 5, 0, 8], r"--mine: got '0', " + WHOLE),
    (["bench", "--mine", 1, -5, 32, 32], r"--mine: got '-5', " + WHOLE),
    (["bench", "--mine", 1, 5, 10**30, 32], r"--mine: got '1000+', " + WHOLE),
    (["bench", "--mine", 1, 5, "32.0", 32], r"--mine: got '32.0', " + WHOLE),
    (["bench", "--mine", 1, 5], r"--mine: expected 4 arguments"),
    *(
        (["bench", "--memory-gib", x], rf"--memory-gib: got '{x}', expected a number > 0")
        for x in ("nan", "inf", "-1", "0", "much")
    ),
    *(
        ([command, "--workspace-mb", x], rf"--workspace-mb: got '{x}', expected auto or a number")
        for command in ("bench", "demo")
        for x in ("nan", "0", "-3", "automatic")
    ),
    *(
        (["demo", "--gpl-weight", x], rf"--gpl-weight: got '{x}', expected a number >= 0")
        for x in ("nan", "-0.5", "heavy")
    ),
    (["demo", "--seeds", 1, "x"], r"--seeds: got 'x', expected a whole number from 0 to"),
    (["demo", "--seeds", -1], r"--seeds: got '-1', expected a whole number from 0 to"),
    (["demo", "--seeds", 2**64], rf"--seeds: got '{2**64}', expected a whole number from 0 to"),
    (["demo", "--seeds", 3, 4, 3], r"--seeds: got \[3, 4, 3\], expected each once"),
    (["demo", "--steps", "1e3"], r"--steps: got '1e3', " + WHOLE),
    (["demo", "--device", "meta"], r"--device meta: "),
    (["bench", "--quick", "--mine", 1, 5, 32, 32], r"not allowed with"),
    (["bench", "--csv", "rows.csv"], r"--csv needs --roofline"),
    (["bench", "--gpu", "a100"], r"--gpu needs --roofline"),
    *(
        (
            ["bench", *more, "--mine", 1, 1, 64, 64, "--target", "topk"],
            r"got 1 x 1 x 64 x 64, topk: expected N >= 1, top-k of C >= 2$",
        )
        for more in ([], ["--roofline"])
    ),
    (["bench", "--roofline", "--memory-gib", 2], r"--memory-gib is not for --roofline"),
    (["bench", "--roofline", "--quick"], r"--quick is not for --roofline"),
    (["bench", "--target", "soft"], r"--target: invalid choice: 'soft' .*'dense'"),
    (["info", "--josn"], r"unrecognized arguments: --josn"),
    (["train"], r"'train'.*'info', 'bench', 'demo'"),
    ([], r"info \| bench \| demo"),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(map(str, b[0])) for b in BAD])
def test_what_is_wrong_is_one_line_before_any_work(words, said, capsys, request):
    if "topk" in words:  # said by what would do the work
        assert re.search(said, refused(words, capsys))
        return
    if "meta" not in words:
        request.getfixturevalue("no_work")
        assert re.search(said, refused(words, capsys))
        return
    pytest.importorskip("rich")
    assert cli.main(list(words)) == 1
    assert re.search(said, capsys.readouterr().err)


def test_shapes_that_no_machine_holds_are_said_first(capsys, no_work):
    for more in ([], ["--roofline"]):
        said = refused(["bench", "--mine", 2147483647, 5, 32768, 32768, *more], capsys)
        assert "--mine: got 2147483647 x 5 x 32768 x 32768, expected at most" in said


# ------------------------------------------------------------------------------------ output paths


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("there/is/none.json", "there is no folder '.*there/is'"),
        ("", "it is a folder, expected a file"),
        ("file/rows.json", "there is no folder '.*file'"),
        ("/proc/rows.json", "."),  # not even root may
        ("x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--roofline"]], ids=["bench", "roofline"])
def test_where_rows_cannot_go_is_said_first(path, why, more, tmp_path, capsys, no_work):
    (tmp_path / "file").touch()
    said = refused(["bench", *more, "--json", tmp_path / path], capsys)
    assert re.search(rf"--json: cannot write '.*': {why}", said)


@pytest.mark.parametrize(
    ("path", "why"),
    [("file", "is a file, expected a folder"), ("file/out", "is a file"), ("/proc/out", ".")],
)
def test_where_a_report_cannot_go_is_said_first(path, why, tmp_path, capsys, no_work):
    (tmp_path / "file").touch()
    said = refused(["demo", "--out", tmp_path / path], capsys)
    assert re.search(rf"--out: cannot write '.*': .*{why}", said)


def test_the_default_folder_is_looked_at_too(tmp_path, capsys, no_work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_out").touch()
    assert "--out: cannot write 'demo_out'" in refused(["demo"], capsys)


def test_looking_leaves_nothing_behind(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run", lambda *a, **b: seen.append(list(tmp_path.iterdir())) or {})
    monkeypatch.setattr(bench, "table", lambda report: "")
    (tmp_path / "old.json").write_text("kept until the work is done")
    for name in ("new.json", "old.json"):
        assert cli.main(["bench", "--json", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name).read_text()) == {}
    assert seen[0] == [tmp_path / "old.json"]
    assert cli.main(["bench", "--json", "/dev/null"]) == 0


# --------------------------------------------------------------------------------- JSON of floors


@pytest.mark.parametrize("workspace_mb", [2048, 16])
def test_the_roofline_as_data_is_what_the_table_says(workspace_mb, tmp_path, capsys):
    path = tmp_path / "floors.json"
    words = ["bench", "--roofline", "--gpu", "a100", "--mine", "1", "40", "256", "128"]
    words += ["--target", "dense", "--json", str(path)]
    words += [] if workspace_mb == 2048 else ["--workspace-mb", "16"]
    assert cli.main(words) == 0
    (work,) = (found := json.loads(path.read_text()))["workloads"]
    assert found["workspace_mb"] == workspace_mb
    assert (work["shape"], work["kind"], work["measured"]) == ([1, 40, 256, 128], "dense", [])
    forward, backward = launches.launches(
        launches.Workload((1, 40, 256, 128), "dense"), workspace_mb, "sm_80"
    )
    assert sum(stage["launches"] for stage in work["stages"]) == len(forward) + len(backward)
    flops = sum(launch.flops for launch in (*forward, *backward))
    assert sum(stage["flops"] for stage in work["stages"]) == pytest.approx(flops)
    assert found["rates"][0]["tflops"] == 312
    table = capsys.readouterr().out
    for stage in work["stages"]:
        (line,) = [x for x in table.splitlines() if f" {stage['half']}: {stage['stage']} |" in x]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[2] == str(stage["launches"])
        assert cells[6] == f"{1e3 * stage['floor_seconds'][0]:.2f}"


DEEP = "[" * 10**5 + "]" * 10**5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", DEEP.encode()),
        ("bytes.csv", b"\xff\xfe"),
        ("long.csv", b"seconds_median\n" + b"1" * 2**18),  # csv's own limit of a field
        ("folder.csv", None),
    ],
)
def test_a_file_that_holds_no_measured_rows_is_named(name, text, tmp_path, capsys):
    path = tmp_path / name
    path.mkdir() if text is None else path.write_bytes(text)
    words = ["bench", "--roofline", "--mine", 1, 3, 32, 32, "--csv", path]
    assert f"gpl-fast bench: {path}: " in refused(words, capsys)


# --------------------------------------------------------------------------------------- workspace


def test_bench_passes_the_workspace_on(monkeypatch, capsys):
    if (reason := ops.load()) is not None:
        pytest.fail(reason)
    words = ["bench", "--mine", "1", "5", "64", "64", "--workspace-mb"]
    assert cli.main([*words, "0.001"]) == 2
    assert "workspace_mb" in capsys.readouterr().err
    given = {}

    def run(shapes, kind, **options):
        given.update(options)
        return {}

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setattr(bench, "table", lambda report: "")
    for word, value in (("96.5", 96.5), ("auto", "auto")):
        assert cli.main([*words, word]) == 0
        assert given["workspace_mb"] == value
    assert cli.main(words[:-1]) == 0
    assert given["workspace_mb"] == "auto"
    for value in (96.5, "auto"):
        assert workload.make_loss("fast", 5, value).options.workspace_mb == value


def test_the_demo_passes_the_workspace_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(demo, "missing_packages", lambda *_: [])
    settings = []

    def run(given, observe):
        settings.append(given)
        raise ValueError("workspace_mb: it needs more")

    monkeypatch.setattr(experiment, "run_experiment", run)
    for word in ("12", "auto"):
        assert cli.main(["demo", "--workspace-mb", word, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "gpl-fast demo: workspace_mb: it needs more\n" * 2
    assert [s.workspace_mb for s in settings] == [12.0, "auto"]


# ------------------------------------------------------------------------------- pipes and Ctrl-C


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "gpl-fast: interrupted\n"


SLOW = """
import sys, time
from pathlib import Path

def used_by(*args):
    Path(sys.argv[1]).touch()
    time.sleep(60)
"""
INTERRUPTED = """
import sys
import slow
from gpl_fast import cli
from gpl_fast.tools import batch
batch.used_by = slow.used_by
sys.exit(cli.main(["bench", "--mine", "1", "3", "32", "32"]))
"""


def test_ctrl_c_reaches_a_benchmarks_processes_and_stays_one_line(tmp_path):
    """As a terminal does it: to the whole group of processes."""
    (tmp_path / "slow.py").write_text(SLOW.replace("sys.argv[1]", repr(str(tmp_path / "at_work"))))
    (tmp_path / "main.py").write_text(INTERRUPTED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=env, cwd=tmp_path, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "at_work").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (tmp_path / "at_work").exists()
    assert (process.returncode, out, err) == (130, "", "gpl-fast: interrupted\n")


@pytest.mark.parametrize("words", [["info", "--json"], ["bench", "--help"]])
def test_a_reader_that_is_gone_is_no_error(words):
    with subprocess.Popen(
        [*MODULE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141 or "--help" in words  # argparse may have seen to that itself


FLOORS = ["bench", "--roofline", "--mine", "1", "3", "32", "32"]


@pytest.mark.parametrize("words", [["info"], ["--version"], FLOORS], ids=lambda words: words[0])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["flush", "write"])  # which of both fails
def test_a_full_disk_is_one_line(words, unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MODULE, *words], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env,
            check=False,
        )  # fmt: skip
    assert done.stderr == f"gpl-fast: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}\n"
    assert done.returncode == 1


def test_what_the_terminal_cannot_show_is_escaped():
    """Whatever bytes a path has, and in a terminal of few characters."""
    env = {**os.environb, b"CXXFLAGS": b"\xff" + "é".encode(), b"PYTHONIOENCODING": b"ascii"}
    done = subprocess.run([*MODULE, "info"], env=env, capture_output=True, cwd=ROOT, check=False)
    assert done.stderr == b""
    assert re.search(rb"CXXFLAGS +\\udcff\\xe9\n", done.stdout)


# --------------------------------------------------------------------------------------- variables


def shown(capsys):
    status = cli.main(["info", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_info_shows_every_variable(capsys, monkeypatch, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    held = {"GPL_FAST_BACKEND": "reference", "GPL_FAST_TILES": str(rows), "CXXFLAGS": "-g"}
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    status, found = shown(capsys)
    assert status == 0
    assert set(found["environment"]) == set(environment.VARIABLES)
    for name, state in found["environment"].items():
        assert (state["value"], state["error"]) == (held.get(name), None)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name in environment.VARIABLES:
        assert re.search(rf"^  {name} +{re.escape(held.get(name, 'unset'))}", text, re.M)


WRONG = {
    "GPL_FAST_BACKEND": "cuda",
    "GPL_FAST_CHECK": "yes",
    "GPL_FAST_CPU_CAPABILITY": "avx",
    "GPL_FAST_SM90A": "no",
    "GPL_FAST_TILES": "no-such-file.json",
    "GPL_FAST_DATA_GRADIENT": __file__,
    "GPL_FAST_SOFTMAX_BWD": __file__,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_word_that_is_not_known_is_an_error(name, capsys, monkeypatch):
    monkeypatch.setenv(name, WRONG[name])
    with pytest.raises(ValueError, match=rf"^{name}: got '.*', expected .*; or unset it$"):
        environment.value(name)
    status, found = shown(capsys)
    assert status == 1
    assert found["environment"][name]["error"].startswith("expected ")
    assert cli.main(["info"]) == 1
    assert re.search(rf"^  {name} .* ERROR: expected ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("jobs", ["many", "0", "-1", "9" * 5000], ids=lambda jobs: jobs[:4])
def test_a_variable_of_the_build_does_not_fail_what_runs(jobs, capsys, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", jobs)
    status, found = shown(capsys)
    assert status == 0
    assert found["environment"]["MAX_JOBS"]["error"] == "expected a whole number > 0"


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_is_an_unset_one(empty, capsys, monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.setenv(name, empty)
        assert environment.value(name) is None
    assert backend.requested_backend("auto") == "auto"
    measured.rows.cache_clear()
    assert isinstance(measured.rows(), list)
    measured.rows.cache_clear()
    status, found = shown(capsys)
    assert status == 0
    assert {state["value"] for state in found["environment"].values()} == {None}


def test_a_name_that_nothing_reads_is_said_with_the_nearest_one(capsys, monkeypatch):
    monkeypatch.setenv("GPL_FAST_BACKENDS", "fast")
    monkeypatch.setenv("GPL_FAST_TEST_DEVICE", "cpu")  # the test suite's
    status, found = shown(capsys)
    assert status == 0
    assert found["unknown"] == {"GPL_FAST_BACKENDS": "GPL_FAST_BACKEND"}
    cli.main(["info"])
    assert "nothing reads it: did you mean GPL_FAST_BACKEND?" in capsys.readouterr().out


def test_rows_of_one_s_own_are_read_and_their_file_is_named(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    for text in ('{"arch": 80}', "[1, 2]", "[{", ""):
        path.write_text(text)
        monkeypatch.setenv("GPL_FAST_DATA_GRADIENT", str(path))
        measured.rows.cache_clear()
        with pytest.raises(ValueError, match=r"GPL_FAST_DATA_GRADIENT: got '.*rows\.json'"):
            measured.rows()
    path.write_text(json.dumps([RIGHT["GPL_FAST_DATA_GRADIENT"]]))
    assert measured.rows()[0] == RIGHT["GPL_FAST_DATA_GRADIENT"]
    measured.rows.cache_clear()


RIGHT = {
    "GPL_FAST_TILES": {
        "arch": 90, "dtype": "bfloat16", "form": "diff", "c_in": 64, "c_out": 128,
        "c_out_max": 128, "tile": [8, 16, 64, 64], "warps": 8, "stages": 3, "descriptors": False,
        "measured": "here",
    },
    "GPL_FAST_DATA_GRADIENT": {
        "arch": 90, "dtype": "float32", "first": True, "in_channels": 19, "out_channels": 64,
        "kernel_size": 3, "stride": 1, "kernel_ms": 1, "aten_ms": 0.5, "measured": "here",
    },
    "GPL_FAST_SOFTMAX_BWD": {
        "arch": 90, "classes": 150, "cuda_ms": 1, "triton_ms": 0.5, "measured": "here",
    },
}  # fmt: skip
ROWS = {"GPL_FAST_TILES": tiles.Row, "GPL_FAST_DATA_GRADIENT": measured.Row,
        "GPL_FAST_SOFTMAX_BWD": measured.SoftmaxRow}  # fmt: skip
BAD_VALUES = {
    "arch": ["90", 9.5, True, 0, None],
    "dtype": ["bf16", 16, ["bfloat16"], {}],
    "form": ["dif", None, []],
    "tile": [[8, 16, 64], [8, 16, 64, "64"], [8, 16, 64, 48], [8, 16, 64, 0], 64, {}, "8888"],
    "warps": [3, 4.0, True, "8"],
    "stages": [0, "3"],
    "descriptors": [0, "false", None],
    "c_in": [None, 1.5],
    "c_out_max": [0, "64"],
    "first": [1, "yes"],
    "in_channels": [0, -19],  # a ratio is taken
    "kernel_ms": ["1", float("nan"), float("inf"), -1, True],
    "aten_ms": [0, None],
    "measured": [1],
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_row_has_the_keys_that_its_reader_takes(name, monkeypatch, tmp_path):
    hints = get_type_hints(ROWS[name], include_extras=True)
    optional = {key for key, hint in hints.items() if get_origin(hint) is NotRequired}
    right, path = RIGHT[name], tmp_path / "rows.json"
    assert set(right) == set(hints)
    monkeypatch.setenv(name, str(path))

    def read(*rows):
        path.write_text(json.dumps(rows))
        return environment.rows(name)

    assert read(right, right) == [right, right]
    for key in hints:
        without = {k: v for k, v in right.items() if k != key}
        if key in optional:
            assert read(without) == [without]
            continue
        with pytest.raises(ValueError, match=rf": row 2 of 2: {key} is missing, expected .*; or"):
            read(right, without)
    for key, value in [(k, v) for k in hints for v in BAD_VALUES.get(k, [])]:
        with pytest.raises(ValueError, match=rf": row 2 of 2: {key}: expected .*, got .*; or"):
            read(right, right | {key: value})
    # It would be taken for all channels, or for none.
    with pytest.raises(ValueError, match=r"row 1 of 1: nothing reads 'c_inn': did you mean \w+\?"):
        read(right | {"c_inn": 3})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[{}]", "row 1 of 1: arch is missing, expected a whole number > 0"),
        (b"[[]]", "row 1 of 1: expected an object, got a list"),
        (b"{}", "it holds no list"),
        (DEEP.encode(), "it is nested too deeply"),
        (b'[{"arch": ' + DEEP.encode() + b"}]", "it is nested too deeply"),
        (b'["\xff"]', "'utf-8' codec can't decode byte 0xff"),
        (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
        (None, "Is a directory"),
    ],
    ids=["empty", "list", "object", "deep", "deep-value", "bytes", "digits", "folder"],
)
@pytest.mark.parametrize("name", RIGHT)
def test_info_says_why_a_file_holds_no_rows(name, content, why, capsys, monkeypatch, tmp_path):
    path = tmp_path / "rows"
    path.mkdir() if content is None else path.write_bytes(content)
    monkeypatch.setenv(name, str(path))
    state = environment.states()[name]
    assert re.fullmatch(r"expected a JSON file, .*: " + re.escape(why) + r".*", state["error"])
    with pytest.raises(ValueError, match=rf"^{name}: got '.*', {re.escape(state['error'])}; or un"):
        environment.rows(name)
    monkeypatch.setattr(info, "collect", lambda: {"environment": environment.states()})
    assert cli.main(["info"]) == 1
    assert f"ERROR: {state['error']}" in capsys.readouterr().out


def test_the_docs_list_the_same_variables():
    text = (ROOT / "docs" / "environment.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", text, re.M)
    assert rows == [(v.name, v.expected, v.does) for v in environment.VARIABLES.values()]
    run, build = text.split("Read by `setup.py`")
    for variable in environment.VARIABLES.values():
        assert (f"`{variable.name}`" in build) is variable.of_build
        assert (f"| `{variable.name}`" in run) is not variable.of_build


# -------------------------------------------------------------------------------------------- info


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_info_without_a_library_says_so(system, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "load", ops.load.__wrapped__)
    monkeypatch.setattr(ops, "LIBRARY", tmp_path / "libgpl_fast.so")
    monkeypatch.setattr(sys, "platform", system)
    said = "is missing" if system == "linux" else "there are no compiled operators for "
    status, found = shown(capsys)
    assert status == 0
    assert said in found["operators"]["library"]
    assert said in found["devices"]["cpu"]["fast"]
    assert found["devices"]["cpu"]["reference"] == "available"
    assert cli.main(["info", "--check"]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "check        cpu reference float32 labels: " in out
    assert "cpu fast" not in out


def test_info_stays_json_where_a_result_is_no_number(capsys, monkeypatch):
    nan = float("nan")
    row = {"device": "cpu", "backend": "fast", "value_error": nan, "grad_cosine": nan, "ok": False}
    monkeypatch.setattr(info, "check", lambda: [row])
    assert cli.main(["info", "--check", "--json"]) == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["check"][0]["value_error"] is None


def test_what_is_measured_elsewhere_comes_back_in_a_thread_too():
    """Where signals are not for the asking."""
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(measure.in_fresh_process(abs, -3)))
    thread.start()
    thread.join()
    assert found == [3]


CONSOLE_SCRIPT = "import sys; from gpl_fast.cli import main; sys.exit(main())"  # as pip writes it


@pytest.mark.parametrize("command", [["-m", "gpl_fast"], ["-c", CONSOLE_SCRIPT]])
def test_ctrl_c_while_torch_is_imported(command):
    """The first two seconds of a command."""
    process = subprocess.Popen(
        [sys.executable, *command, "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "gpl-fast: interrupted\n"
