"""The package as installed: what importing costs and touches, command line, explain, README."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import setuptools
import torch
from cases import NARROW, make_target
from torch.utils.flop_counter import FlopCounterMode

import gpl_fast
from gpl_fast import cli, ops
from gpl_fast.fast import policy

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(gpl_fast.__file__).parent


def run_python(code, *arguments, cwd=ROOT, **environment):
    """Standard output of `python -c code`, with this gpl_fast importable from anywhere."""
    variables = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=variables,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# ------------------------------------------------------------------------------------------ import

_IMPORT = """
import json, sys, time
sys.modules.update(dict.fromkeys({blocked!r}))  # importing them ends in ModuleNotFoundError
import torch
before = set(sys.modules)
start = time.perf_counter()
import gpl_fast
seconds = time.perf_counter() - start
own = {{name.split(".")[0] for name in set(sys.modules) - before}}
compiler = "torch._dynamo" in set(sys.modules) - before
loss = gpl_fast.GenericPerceptualLoss(3, net="1", widths=(4,))
x = torch.zeros(1, 3, 8, 8, requires_grad=True)
loss(x, torch.zeros(1, 8, 8, dtype=torch.long)).backward()
print(json.dumps({{
    "seconds": seconds,
    "new": sorted(own),
    "compiler": compiler,
    "cuda": torch.cuda.is_initialized(),
    "grad": float(x.grad.abs().sum()),
    "threads": torch.get_num_threads(),
}}))
"""

OPTIONAL = ("triton", "sklearn", "matplotlib", "rich", "PIL", "pandas", "scipy", "torchvision")


@pytest.fixture(scope="module")
def imported():
    """What a fresh process finds when every optional package is missing."""
    return json.loads(run_python(_IMPORT.format(blocked=OPTIONAL)))


def test_import_needs_nothing_optional_and_the_loss_works(imported):
    assert imported["grad"] > 0
    assert "gpl_fast" in imported["new"]


def test_import_brings_nothing_of_its_own():
    found = json.loads(run_python(_IMPORT.format(blocked=())))
    heavy = {*OPTIONAL, "numpy", "safetensors", "setuptools", "ninja", "pybind11"}
    assert not heavy & set(found["new"])  # numpy comes with torch, before
    assert not found["compiler"]  # torch._dynamo alone costs two seconds


def test_import_is_quick(imported):
    assert imported["seconds"] < 1.5


def test_import_touches_no_gpu(imported):
    assert imported["cuda"] is False


def test_import_prints_and_warns_nothing():
    code = "import torch, warnings; warnings.simplefilter('error'); import gpl_fast"
    assert run_python(code) == ""


def test_public_names_exist_and_are_documented():
    for name in gpl_fast.__all__:
        assert getattr(gpl_fast, name).__doc__, name
    names = ["GenericPerceptualLoss", "SegmentationLoss", "PerceptualLoss", "LossNet", "TopK"]
    assert {*names, "TargetFeatures", "BackendUnavailable"} <= set(gpl_fast.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", gpl_fast.__version__)
    assert 'version = {attr = "gpl_fast.__version__"}' in (ROOT / "pyproject.toml").read_text()


# --------------------------------------------------------------------------------- the oracle alone


def imports_of(path):
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def test_reference_imports_torch_only():
    assert imports_of(PACKAGE / "reference.py") <= {"torch", "collections", "typing", "__future__"}


def test_reference_runs_alone(tmp_path):
    (tmp_path / "oracle.py").write_text((PACKAGE / "reference.py").read_text())
    code = """
import sys
sys.path.insert(0, "")
import oracle, torch
from types import SimpleNamespace as Layer
names = {"c": "conv", "r": "relu", "p": "maxpool"}
layers = [Layer(name=name, kind=kind) for name, kind in names.items()]
w = {"c": torch.ones(1, 2, 1, 1)}
def extract(y, taps):
    return oracle.features(y, layers, {k: v.to(y.dtype) for k, v in w.items()}, taps)
x = torch.zeros(1, 2, 4, 4, requires_grad=True)
y = oracle.one_hot(torch.zeros(1, 4, 4, dtype=torch.long), 2, torch.float32)
e = extract(2 * y, ("p",))
terms = oracle.perceptual_terms(
    oracle.prediction_map(x, "softmax", 1.0, None), extract, e, {}, {"p": 1.0}, {}, torch.float32)
terms["feature"].sum().backward()
assert not any(name.startswith("gpl_fast") for name in sys.modules)
print(float(terms["feature"]))
"""
    out = run_python(code, cwd=tmp_path, PYTHONPATH="")
    assert float(out) == 1.0  # (1 - 2)^2 at every pixel


# ------------------------------------------------------------------------------------ command line


def test_info(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in (gpl_fast.__version__, torch.__version__, "cpu", "reference", "fast"):
        assert word in out
    assert gpl_fast.LossNet.vgg(19).fingerprint() in out


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpl_fast"] == gpl_fast.__version__
    assert found["devices"]["cpu"]["reference"] == "available"
    assert found["devices"]["cpu"]["fast"].startswith(("available", "unavailable: "))
    assert found["fingerprint"] == gpl_fast.LossNet.vgg(19).fingerprint()


def test_info_check_as_a_module():
    run = [sys.executable, "-W", "error", "-m", "gpl_fast", "info", "--check", "--json"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["check"]
    assert all(row["ok"] for row in rows)
    assert {row["target"] for row in rows} == {"dense", "labels", "topk"}
    assert {row["backend"] for row in rows} >= {"reference"}


def test_info_check_fails_on_a_mismatch(capsys, monkeypatch):
    from gpl_fast.tools import info

    good = {"device": "cpu", "backend": "fast", "dtype": "float32", "target": "labels"}
    rows = [{**good, "value_error": 0.5, "grad_cosine": 0.1, "ok": False}]
    monkeypatch.setattr(info, "check", lambda: rows)
    assert cli.main(["info", "--check"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_unknown_commands_list_the_known_ones(capsys):
    for argv in ([], ["train"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
    error = capsys.readouterr().err
    for command in ("info", "bench", "demo"):
        assert command in error


def test_demo_help(capsys):
    demo = pytest.importorskip("gpl_fast.demo")
    if not hasattr(demo, "add_arguments"):
        pytest.skip("gpl_fast.demo has no add_arguments yet")
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--help"])
    assert caught.value.code == 0
    assert "usage: gpl-fast demo" in capsys.readouterr().out
    demo.add_arguments(ArgumentParser())  # needs none of the demo's own packages


def test_info_says_what_the_library_holds(capsys, monkeypatch):
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"]["library"] == str(ops.LIBRARY)
    assert found["operators"]["cpu"].startswith(ops.cpu_capability())
    build = ops.parse_cuda_build(ops.cuda_build())
    assert found["operators"]["cuda"] == (
        str(build) if build else "none: it was built without nvcc"
    )
    if not torch.cuda.is_available():
        assert found["missing"]["cuda"]
    monkeypatch.setattr(ops, "load", lambda: "it is not there")
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"] == {"library": "unavailable: it is not there"}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system lists no CPU features")
def test_the_arithmetic_follows_from_the_systems_list():
    """By CPUID, and by what Linux makes of it."""
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    text = Path("/proc/cpuinfo").read_text()
    flags = set((re.search(r"^flags\s*:(.*)$", text, re.M) or [""] * 2)[1].split())
    wide, amd = ops.cpu_capability() == "avx512", "AuthenticAMD" in text
    if wide and "amx_bf16" in flags:
        wanted = "matrix", "own"
    elif wide and amd and "avx512_bf16" in flags:
        wanted = "pairs", "mixed"
    else:
        wanted = "none", "float32"
    cpu = policy.named("cpu")
    assert (cpu.bfloat16, cpu.arithmetic(torch.bfloat16)) == wanted
    assert cpu.arithmetic(torch.float32) == cpu.arithmetic(torch.float16) == "float32"


# ------------------------------------------------------------------------------------------- build


def build_script(monkeypatch, **environment):
    """The names of setup.py, which builds nothing here."""
    for name in ("CUDACXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "GPL_FAST_FORCE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def fake_nvcc(folder, known=("80", "86", "90", "120"), version="12.9"):
    """A toolkit whose nvcc answers questions and compiles nothing."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    listed = "".join(f"compute_{number}\n" for number in known)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        f"--dryrun) echo '#$ TOP={folder}' >&2;;\n"
        f"--list-gpu-arch) printf '{listed}';;\nesac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def test_without_nvcc_the_cpu_operators_are_all_there_is(monkeypatch, tmp_path):
    script = build_script(monkeypatch, PATH=tmp_path, CUDA_HOME=tmp_path / "none")
    assert script["find_cuda"]() is None
    assert ".cu" not in script["build_ninja"](tmp_path / "lib.so")


@pytest.mark.parametrize("name", ["GPL_FAST_FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"])
def test_cuda_that_was_asked_for_and_cannot_be_built_is_an_error(monkeypatch, tmp_path, name):
    value = {"GPL_FAST_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}[name]
    script = build_script(monkeypatch, PATH=tmp_path, **{name: value})
    with pytest.raises(SystemExit, match=rf"{name} asks for .* no nvcc: set CUDA_HOME"):
        script["find_cuda"]()


def test_an_empty_variable_asks_for_nothing(monkeypatch, tmp_path):
    names = ["GPL_FAST_FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME", "MAX_JOBS"]
    names += ["CXX", "CXXFLAGS", "LDFLAGS"]
    script = build_script(monkeypatch, PATH=tmp_path, **dict.fromkeys(names, ""))
    assert script["find_cuda"]() is None
    assert "\ncxx = c++\n" in script["build_ninja"](tmp_path / "lib.so")


@pytest.mark.parametrize(("name", "word"), [("GPL_FAST_FORCE_CUDA", "yes"), ("MAX_JOBS", "all")])
def test_a_word_that_the_build_does_not_know_is_an_error(monkeypatch, tmp_path, name, word):
    with pytest.raises(SystemExit, match=rf"{name}: got '{word}', expected .*; or unset it"):
        build_script(monkeypatch, PATH=tmp_path, **{name: word})["find_cuda"]()


def test_a_wrong_cudacxx_is_an_error(monkeypatch, tmp_path):
    script = build_script(monkeypatch, CUDACXX=tmp_path / "nvcc")
    with pytest.raises(SystemExit, match=r"CUDACXX: got .* expected an nvcc"):
        script["find_cuda"]()


def test_an_old_nvcc_is_an_error_with_a_way_out(monkeypatch, tmp_path):
    script = build_script(monkeypatch, CUDACXX=fake_nvcc(tmp_path, version="11.8"))
    with pytest.raises(SystemExit, match=r"CUDA 11.8, expected 12.0 .* GPL_FAST_FORCE_CUDA=0"):
        script["find_cuda"]()


def test_nvcc_is_found_by_each_name(monkeypatch, tmp_path):
    toolkits = [tmp_path / name for name in ("named", "home", "path")]
    named, home, path = (fake_nvcc(toolkit) for toolkit in toolkits)
    tools = f"{path.parent}:/usr/bin:/bin"
    asked = {"CUDACXX": named, "CUDA_HOME": toolkits[1], "PATH": tools}
    for nvcc in (named, home, path):
        found = build_script(monkeypatch, **asked)["find_cuda"]()
        assert found.nvcc == str(nvcc)
        assert found.toolkit == nvcc.parents[1]
        asked = dict(list(asked.items())[1:])
    assert found.description == "12.9 80+PTX 86 90a 120"  # of the default what this nvcc knows


def test_the_architectures_are_those_that_torch_would_read(monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path)
    script = build_script(monkeypatch, CUDACXX=nvcc, TORCH_CUDA_ARCH_LIST="7.5 8.0;9.0+PTX,12.0")
    cuda = script["find_cuda"]()
    assert cuda.architectures == ("80", "90a+PTX", "120")
    hopper = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_90a,code=compute_90a"]
    others = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_120,code=sm_120"]
    targets = script["nvcc_targets"]
    assert targets(Path("relu.cu"), cuda.architectures) == [others[0], *hopper, others[1]]
    assert targets(Path("conv_sm90.cu"), cuda.architectures) == hopper
    assert targets(Path("conv_sm90.cu"), ("80", "120")) == others
    # 8.x from one PTX, 10.0 and newer from another one.
    made = targets(Path("relu.cu"), ("80+PTX", "86", "90a", "100", "120"))
    pairs = [
        re.fullmatch(r"-gencode=arch=compute_(\w+),code=(\w+)", flag).groups() for flag in made
    ]
    wanted = [("80", "sm_80"), ("80", "compute_80"), ("80", "sm_86"), ("90a", "sm_90a")]
    assert pairs == [*wanted, ("100", "sm_100"), ("100", "sm_120")]
    # Beside kernels of sm_90's own.
    beside = ROOT / "csrc" / "cuda" / "conv_block" / "conv_block_bwd.cu"
    assert targets(beside, ("80", "90a")) == [others[0], "-gencode=arch=compute_80,code=sm_90a"]
    assert targets(beside, ("90a+PTX",)) == hopper
    for wrong in ("Hopper", "9", "10.0", "7.0"):
        script = build_script(monkeypatch, CUDACXX=nvcc, TORCH_CUDA_ARCH_LIST=wrong)
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
            script["find_cuda"]()


def test_every_cuda_source_is_built(monkeypatch, tmp_path):
    script = build_script(monkeypatch, CUDACXX=fake_nvcc(tmp_path))
    ninja = script["build_ninja"](tmp_path / "lib.so")
    sources = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    assert sources
    for source in sources:
        assert f"compile_cuda {source}" in ninja
    assert 'DGPL_FAST_CUDA="12.9 80+PTX 86 90a 120"' in ninja
    assert str(tmp_path / "lib64" / "libcudart_static.a") in ninja


@pytest.mark.parametrize(
    ("text", "capability", "served"),
    [
        ("13.0 80 86 90a", (8, 0), True),
        ("13.0 80 90a", (8, 9), True),  # the same generation, newer
        ("13.0 86", (8, 0), False),
        ("13.0 90a", (9, 0), True),
        ("13.0 100 90a", (10, 3), True),
        ("13.0 80 90a", (12, 0), False),
        ("13.0 80+PTX", (12, 1), True),
        ("13.0 90a+PTX", (10, 0), False),  # "a" runs nowhere else, as PTX neither
        ("13.0 80+PTX", (7, 5), False),
    ],
)
def test_which_gpu_a_build_serves(text, capability, served):
    assert ops.parse_cuda_build(text).serves(*capability) is served


def test_why_the_cuda_operators_cannot_run(monkeypatch):
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    device = torch.device("cuda", 0)
    assert "not for 'cpu'" in ops.cuda_obstacle(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in ops.cuda_obstacle(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    build = ops.parse_cuda_build(ops.cuda_build())
    expected = "nothing for sm_75" if build else "built without nvcc"
    assert expected in ops.cuda_obstacle(device)
    if build:
        major, minor = divmod(int(build.architectures[0].rstrip("a")), 10)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        assert ops.cuda_obstacle(device) is None


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_needs_no_python_and_no_cuda(monkeypatch):
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    table = subprocess.run(
        ["nm", "-D", str(ops.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-2:] for line in table.splitlines()]
    needed = {name.split("@")[0] for kind, name in symbols if kind == "U"}
    assert needed
    assert not [n for n in needed if n.startswith(("Py", "_Py", "cuda", "cu", "__cuda"))]
    offered = [name for kind, name in symbols if kind in "TWBD"]
    assert not [name for name in offered if "cuda" in name]  # torch may bring another runtime


# ----------------------------------------------------------------------------------------- explain

KINDS = ("dense", "labels", "topk", "features")


def bytes_kept(loss, pred, target, mask=None):
    """Bytes that autograd keeps on the CPU, beside the caller's tensors and the weights."""
    x = pred.clone().requires_grad_()
    loss(x, target, mask)  # the weights are cast once, before the count
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(x, target, mask)
    own = [x, mask, *loss.net.cached_tensors(), getattr(target, "values", None), target]
    own += [*list(getattr(target, "features", {}).values()), getattr(target, "indices", None)]
    for t in own:
        if isinstance(t, torch.Tensor):
            storages.pop(t.untyped_storage().data_ptr(), None)
    value.backward()
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
def test_explain_counts_the_bytes_that_autograd_keeps(backend, kind, masked):
    loss = gpl_fast.GenericPerceptualLoss(5, widths=NARROW, backend=backend)
    pred, target = torch.randn(2, 5, 37, 45), make_target(kind, (2, 5, 37, 45), loss)
    mask = torch.rand(2, 37, 45) > 0.2 if masked and kind != "features" else None
    found = loss.explain(pred, target, mask)
    assert found.backend == backend
    assert found.bytes_saved == bytes_kept(loss, pred, target, mask)
    assert found.bytes_saved > 0


def test_explain_counts_flops_as_torch_and_by_hand():
    loss = gpl_fast.GenericPerceptualLoss(5, net="1,1", widths=(4, 6), backend="reference")
    x, target = torch.randn(2, 5, 9, 12, requires_grad=True), torch.randn(2, 5, 9, 12)
    found = loss.explain(x, target)
    # 2 K^2 C_in C_out pixels, for the prediction, its data gradient and the target
    by_hand = 3 * 2 * 9 * 2 * (5 * 4 * 9 * 12 + 4 * 6 * 4 * 6)
    assert found.flops == by_hand
    with FlopCounterMode(display=False) as counter:
        loss(x, target).backward()
    assert found.flops == counter.get_total_flops()
    encoded = loss.explain(x, loss.encode(target))
    assert encoded.flops == by_hand * 2 // 3


def test_explain_stops_at_the_last_level_used():
    loss = gpl_fast.GenericPerceptualLoss(5, widths=NARROW, level_weights=(0, 1, 0, 0, 0))
    found = loss.explain(torch.randn(1, 5, 32, 32), torch.randn(1, 5, 32, 32))
    assert [layer.name for layer in found.layers][-1] == "pool2"
    assert found.layers[-1].shape == (1, NARROW[1], 8, 8)


def test_explain_prints_what_a_user_asks_for():
    loss = gpl_fast.GenericPerceptualLoss(5, widths=NARROW)
    pred, target = torch.randn(2, 5, 37, 45), torch.randint(5, (2, 37, 45))
    found = loss.explain(pred, target)
    text = str(found)
    for word in (found.backend, found.reason, "float32", "GFLOP", "MiB", "workspace", "conv5_1"):
        assert word in text
    assert f"{found.bytes_saved / 2**20:.2f} MiB" in text
    double = str(loss.explain(pred.double(), target))
    assert "reference" in double
    assert "float64" in double


@pytest.mark.parametrize("arithmetic", ["own", "mixed", "float32"])
def test_explain_says_where_half_precision_is_computed(arithmetic, decide):
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    decide(convolutions=arithmetic)
    loss = gpl_fast.GenericPerceptualLoss(5, widths=NARROW)
    pred, target = torch.randn(1, 5, 32, 32).bfloat16(), torch.randint(5, (1, 32, 32))
    found = loss.explain(pred, target)
    assert found.compute_dtype == torch.bfloat16
    assert found.float32_convolutions is (arithmetic == "float32")
    assert ("convolutions in float32" in str(found)) is (arithmetic == "float32")
    assert "convolutions in" not in str(loss.explain(pred.float(), target))


def test_explain_changes_nothing():
    loss = gpl_fast.GenericPerceptualLoss(5, widths=NARROW)
    pred, target = torch.randn(2, 5, 37, 45), torch.randint(5, (2, 37, 45))
    value = loss(pred, target)
    loss.explain(pred.requires_grad_(), target)
    assert pred.grad is None
    assert torch.equal(loss(pred, target).detach(), value)


# ------------------------------------------------------------------------------------------ README


def quick_start():
    """The first python block under the heading that says "Quick start"."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"^#+ .*quick start.*?^```python\n(.*?)^```", text, re.I | re.M | re.S)
    assert found, "README.md has no python block under a heading 'Quick start'"
    return found[1]


def test_readme_quick_start_runs_as_it_stands(tmp_path):
    code = quick_start()
    assert "gpl_fast" in code
    (tmp_path / "quick_start.py").write_text(code)
    run_python("import runpy; runpy.run_path('quick_start.py')", cwd=tmp_path)
