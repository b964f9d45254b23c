"""Builds gpl_fast/libgpl_fast.so; everything else about the package is in pyproject.toml.

The library holds operators behind LibTorch's stable ABI and no CPython symbol, so one
`py3-none-<platform>` wheel serves every Python and every torch >= 2.11. ninja drives the compiler;
CXX, CXXFLAGS, LDFLAGS and MAX_JOBS mean what they usually do, for instance
CXXFLAGS="-fsanitize=address,undefined -g" LDFLAGS="-fsanitize=address,undefined".
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libgpl_fast.so"
KERNELS = ["softmax_pack", "label_conv", "relu", "relu_pool", "diff_reduce", "softmax_bwd"]
# The same sources, once for each instruction set; dispatch.cpp picks one at run time.
X86_BUILDS = {
    "default": "-march=x86-64-v2",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4",
}

NINJA = """\
ninja_required_version = 1.5
cxx = {cxx}
cxxflags = {cxxflags}
ldflags = {ldflags}

rule compile
  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule link
  command = $cxx -shared $in -o $out $ldflags
  description = link $out

{edges}
default {library}
"""


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build_ninja(library: Path) -> str:
    torch_dir = Path(next(iter(importlib.util.find_spec("torch").submodule_search_locations)))
    csrc = ROOT / "csrc"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    builds = X86_BUILDS if x86 else {"default": ""}
    common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    common += ["-DGPL_FAST_X86"] if x86 else []
    # No contraction: a fused y' - y would not be exactly 0 for equal inputs. GCC 12's AVX-512
    # headers set off -Wmaybe-uninitialized.
    kernel = "-ffp-contract=off -Wno-maybe-uninitialized -fno-math-errno"
    torch_flags = f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {torch_dir / 'include'}"

    edges, objects = [], []

    def compile_edge(source: Path, name: str, flags: str) -> None:
        edges.append(f"build {name}: compile {escape(source)}\n  flags = {flags}\n")
        objects.append(name)

    compile_edge(csrc / "ops.cpp", "ops.o", torch_flags)
    compile_edge(csrc / "cpu" / "dispatch.cpp", "dispatch.o", "")
    for build, march in builds.items():
        for name in KERNELS:
            flags = f"{march} {kernel} -DGPL_CPU_NAMESPACE=cpu_{build}"
            compile_edge(csrc / "cpu" / f"{name}.cpp", f"{name}.{build}.o", flags)
    edges.append(f"build {escape(library)}: link {' '.join(objects)}\n")
    linked = [f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
    return NINJA.format(
        cxx=os.environ.get("CXX", "c++"),
        cxxflags=" ".join([*common, os.environ.get("CXXFLAGS", "")]).strip(),
        ldflags=" ".join([*linked, os.environ.get("LDFLAGS", "")]).strip(),
        edges="\n".join(edges),
        library=escape(library),
    )


class Build(build_ext):
    """One library by ninja, into the build tree or, in place, into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(build_ninja(library))
        command = [sys.executable, "-m", "ninja", "-C", str(build_dir)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)


class Wheel(bdist_wheel):
    """Every CPython: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("gpl_fast.libgpl_fast", sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
