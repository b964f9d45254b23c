"""The compiled library: it asks for no newer system than torch, and says why it does not load."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import setuptools
import torch

import gpl_fast
from gpl_fast import BackendUnavailable, backend, environment, ops, sources

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent / "lib"
FAMILIES = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")
COMPILER = os.environ.get("CXX") or "c++"


def objdump(*arguments):
    done = subprocess.run(["objdump", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def newest(library):
    """The newest version of each family of symbols that a library needs."""
    needed = objdump("-p", library).partition("Version References:")[2]
    found = {}
    for family in FAMILIES:
        texts = re.findall(rf"\b{family}_([\d.]+)", needed)
        found[family] = max((tuple(map(int, t.split("."))) for t in texts), default=())
    assert not re.search(r"GLIBC_(?!\d|PRIVATE)", needed), "a feature instead of a version"
    return found


def undefined(library):
    """(symbol, version or "") of what a library takes from others."""
    lines = [line for line in objdump("-T", library).splitlines() if "*UND*" in line]
    return [(line.split()[-1], "".join(re.findall(r"\((\w+_[\d.]+)\)", line))) for line in lines]


# ------------------------------------------------------------------------ as old systems as torch's


def test_the_library_needs_nothing_newer_than_torch_does():
    own = newest(ops.LIBRARY)
    assert own["GLIBC"] >= (2, 2)
    for family, version in own.items():
        assert version <= newest(TORCH / "libtorch_cpu.so")[family], family


def test_every_symbol_of_the_system_has_a_version():
    """One without would be any system's newest, or nowhere."""
    bare = {symbol for symbol, version in undefined(ops.LIBRARY) if not version}
    offered = set()
    for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6"):
        path = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        lines = [x.split() for x in objdump("-T", path).splitlines() if "*UND*" not in x]
        offered |= {words[-1] for words in lines if len(words) > 5}
    assert {"malloc", "exp", "_ZNSt8ios_base4InitC1Ev"} <= offered
    assert not bare & offered


def test_it_loads_with_every_symbol_there():
    """Those of older versions too: the loader usually looks when they are called."""
    code = "import ctypes, os, sys, torch; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    run = [sys.executable, "-c", code, str(ops.LIBRARY)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_messages_are_put_together_as_before():
    """By string streams, whose default constructors are the library's own."""
    assert ops.load() is None
    maps = torch.zeros(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match=r"mask .* \[1, 2, 3, 1\], got \[1, 9, 3, 1\]"):
        ops.relu_bwd(maps, mask=torch.zeros(1, 9, 3, 1, dtype=torch.uint8), dz=maps.clone())


PROGRAM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <sys/mman.h>
static void* twice(void* x) { *(double*)x *= 2; return x; }
double run(double x) {
  pthread_t thread;
  if (pthread_create(&thread, 0, twice, &x) || pthread_join(thread, 0)) return -1;
  if (!dlsym(RTLD_DEFAULT, "malloc") || shm_unlink("/there-is-none-of-this-name") == 0) return -2;
  return exp(x);
}
"""


def test_what_has_moved_or_changed_is_taken_in_its_older_version(tmp_path, monkeypatch):
    """exp of 2.29 and the threads of 2.34 by those of the first glibc; run, they do the same."""
    link_flags = runpy.run_path(str(ROOT / "csrc" / "oldest_glibc.py"))["link_flags"]
    flags = link_flags([COMPILER], TORCH / "libtorch_cpu.so", tmp_path)
    source, library = tmp_path / "program.c", tmp_path / "program.so"
    source.write_text(PROGRAM)
    command = [COMPILER, "-x", "c", "-shared", "-fPIC", str(source), "-x", "none", "-o"]
    subprocess.run([*command, str(library), "-Wl,--no-as-needed", *flags, "-lm"], check=True)
    needed = dict(undefined(library))
    for symbol in ("pthread_create", "pthread_join", "dlsym", "shm_unlink", "exp"):
        assert needed[symbol]
    assert newest(library)["GLIBC"] <= newest(TORCH / "libtorch_cpu.so")["GLIBC"]
    code = (
        "import ctypes, sys; run = ctypes.CDLL(sys.argv[1]).run; run.restype = ctypes.c_double;"
        "run.argtypes = [ctypes.c_double]; print(run(0.5))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(2.718281828459045, rel=1e-15)


@pytest.mark.parametrize("missing", ["objdump", "libpthread.so.0"])
def test_a_system_where_that_cannot_be_done_builds_as_usual(missing, tmp_path, monkeypatch, capfd):
    link_flags = runpy.run_path(str(ROOT / "csrc" / "oldest_glibc.py"))["link_flags"]
    compiler = tmp_path / "compiler"  # of another libc: it finds no such file and echoes the name
    compiler.write_text("#!/bin/sh\necho ${1#-print-file-name=}\n")
    compiler.chmod(0o755)
    if missing == "objdump":
        compiler.unlink()
        compiler.symlink_to(shutil.which(COMPILER))
        monkeypatch.setenv("PATH", str(tmp_path))
    assert link_flags([str(compiler)], TORCH / "libtorch_cpu.so", tmp_path / "made") is None
    out = capfd.readouterr().out
    assert "as new as this system's" in out
    assert missing in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(("system", "modules"), [("darwin", 0), ("win32", 0), ("linux", 1)])
def test_other_systems_install_without_the_library(system, modules, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.setattr(sys, "platform", system)
    runpy.run_path(str(ROOT / "setup.py"))
    assert len(given["ext_modules"]) == modules
    assert ("the reference backend" in capsys.readouterr().out) is not modules


# ---------------------------------------------------------------------------- why it does not load


@pytest.fixture
def other_library(monkeypatch, tmp_path):
    """Makes another file the library, for a process that has asked for none yet."""

    def choose(content=None):
        path = tmp_path / "elsewhere" / "libgpl_fast.so"
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(ops, "LIBRARY", path)
        monkeypatch.setattr(ops, "load", ops.load.__wrapped__)
        monkeypatch.setattr(ops, "broken", ops.broken.__wrapped__)
        monkeypatch.setattr(backend, "_warned", set())
        return path

    return choose


def of_a_newer_system(folder):
    """A library that needs a glibc that nobody has."""
    (folder / "new.c").write_text('void own(void) {}\n__asm__(".symver own, f@@GLIBC_2.99");\n')
    (folder / "map").write_text("GLIBC_2.99 {};\n")
    (folder / "use.c").write_text("void f(void); void g(void) { f(); }\n")
    shared = [COMPILER, "-x", "c", "-shared", "-fPIC", "-nostdlib"]
    named = ["-Wl,-soname,libc.so.6", f"-Wl,--version-script={folder}/map"]
    subprocess.run([*shared, *named, f"{folder}/new.c", "-o", f"{folder}/libc.so.6"], check=True)
    use = [f"{folder}/use.c", "-x", "none", f"{folder}/libc.so.6"]
    subprocess.run([*shared, *use, "-o", f"{folder}/use.so"], check=True)
    return (folder / "use.so").read_bytes()


def test_the_reason_is_the_loaders_own(other_library, tmp_path):
    other_library(of_a_newer_system(tmp_path))
    reason = ops.load()
    assert "GLIBC_2.99' not found" in reason
    assert "reinstall gpl-fast" in reason
    assert torch.__version__ in reason


@pytest.mark.parametrize(
    ("kept", "said"), [(0, "file too short"), (100, "is cut off"), (10**5, "is cut off")]
)
def test_a_library_that_was_cut_off_is_a_reason_too(kept, said, other_library):
    """The loader ends the process with SIGBUS where only the first pages are there."""
    other_library(ops.LIBRARY.read_bytes()[:kept])
    assert said in ops.load()


def test_operators_that_are_missing_are_named_with_the_way_out(monkeypatch):
    monkeypatch.setattr(ops, "_NAMES", (*ops._NAMES, "winograd_of_tomorrow"))
    reason = ops.load.__wrapped__()
    assert "another version" in reason
    assert "has no winograd_of_tomorrow" in reason
    assert f"build them in {ROOT}: make build, or pip install --no-build-isolation" in reason


def test_auto_says_once_why_a_library_that_is_there_is_not_used(other_library):
    other_library(b"no library at all" * 9)
    loss, pred = gpl_fast.GenericPerceptualLoss(3, widths=(4,) * 5), torch.randn(1, 3, 32, 32)
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    with pytest.warns(UserWarning, match=r"reference backend runs: .* invalid ELF header.*reinst"):
        value = loss(pred, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loss(pred, target), value)
        gpl_fast.GenericPerceptualLoss(3, backend="reference")(pred, target)
    fast = gpl_fast.GenericPerceptualLoss(3, backend="fast")
    with pytest.raises(BackendUnavailable, match="invalid ELF header"):
        fast(pred, target)


def test_a_broken_library_is_no_reason_where_it_would_not_be_used(other_library):
    other_library(b"no library at all" * 9)
    loss, pred = gpl_fast.GenericPerceptualLoss(3), torch.randn(1, 3, 32, 32).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(pred, torch.zeros(1, 32, 32, dtype=torch.long))


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_where_there_is_no_library_nothing_warns(system, other_library, monkeypatch):
    other_library()
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ops.platform, "system", lambda: "Darwin")
    loss, pred = gpl_fast.GenericPerceptualLoss(3), torch.randn(1, 3, 32, 32)
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(pred, target)
    said = {"linux": "libgpl_fast.so is missing", "darwin": "no compiled operators for Darwin"}
    assert said[system] in loss.explain(pred, target).reason


# ------------------------------------------------------------------------------- of older sources


def test_the_library_knows_its_sources(monkeypatch):
    assert not ops._is_stale(), "csrc has changed since the library was built"
    monkeypatch.setattr(sources, "digest", lambda folder: bytes(20)[:-1] + b"\xff" * 3)
    assert ops._is_stale()


def test_any_change_of_the_sources_counts(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = sources.digest(tmp_path / "csrc")
    assert before == sources.digest(ROOT / "csrc")
    (tmp_path / "csrc" / "notes.txt").write_text("nothing that is compiled")
    assert sources.digest(tmp_path / "csrc") == before
    changed = tmp_path / "csrc" / "cuda" / "relu.cu"
    text = changed.read_text()
    changed.write_text(text + "\n")
    assert sources.digest(tmp_path / "csrc") != before
    changed.rename(changed.with_name("relu2.cu")).write_text(text)
    assert sources.digest(tmp_path / "csrc") != before


def test_a_library_of_older_sources_is_said_once():
    code = """
import torch, gpl_fast
from gpl_fast import sources
sources.digest = lambda folder: b"the sources of tomorrow"
loss, pred = gpl_fast.GenericPerceptualLoss(3, backend="fast"), torch.randn(1, 3, 32, 32)
for _ in range(2):
    loss(pred, torch.zeros(1, 32, 32, dtype=torch.long))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("was built from other sources than those in csrc") == 1
    assert "make build" in done.stderr


# ---------------------------------------------------------------------- variables that it reads


@pytest.mark.parametrize("name", ["GPL_FAST_CPU_CAPABILITY", "GPL_FAST_SM90A"])
def test_words_that_the_library_would_ignore_are_errors(name, monkeypatch):
    monkeypatch.setattr(ops, "load", ops.load.__wrapped__)
    monkeypatch.setenv(name, "avx")
    loss, pred = gpl_fast.GenericPerceptualLoss(3), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=rf"{name}: got 'avx', expected .* or \w+; or unset it"):
        loss(pred, torch.zeros(1, 32, 32, dtype=torch.long))


def test_every_variable_that_is_read_is_listed():
    read = set()
    for folder, pattern in (("gpl_fast", "*.py"), ("csrc", "*.c*"), (".", "setup.py")):
        for path in (ROOT / folder).rglob(pattern) if folder != "." else [ROOT / pattern]:
            text = path.read_text()
            read |= set(re.findall(r"getenv\(\"(\w+)\"\)", text))
            read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", text))
            read |= set(re.findall(r"(?:value|rows|variable)\(\"([A-Z_0-9]+)\"\)", text))
    assert len(read) >= 10
    assert read <= set(environment.VARIABLES)
