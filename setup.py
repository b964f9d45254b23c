"""Builds gpl_fast/libgpl_fast.so; everything else about the package is in pyproject.toml.

The library holds operators behind LibTorch's stable ABI and no CPython symbol, so one
`py3-none-<platform>` wheel serves every Python and every torch >= 2.11, on systems as old as that
torch's: csrc/oldest_glibc.py. ninja drives the compilers; docs/environment.md lists the variables,
for instance CXXFLAGS="-fsanitize=address,undefined -g" LDFLAGS="-fsanitize=address,undefined".

Where nvcc is found (CUDACXX, CUDA_HOME or PATH) the CUDA operators are built in too, whatever build
of torch is there, for TORCH_CUDA_ARCH_LIST or `ARCHITECTURES`; nvcc itself reads NVCC_APPEND_FLAGS.
Without nvcc the library holds the CPU operators only: then GPL_FAST_FORCE_CUDA=1 and
TORCH_CUDA_ARCH_LIST are errors.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = runpy.run_path(str(ROOT / "gpl_fast" / "environment.py"))
SOURCES = runpy.run_path(str(ROOT / "gpl_fast" / "sources.py"))
OLDEST_GLIBC = runpy.run_path(str(ROOT / "csrc" / "oldest_glibc.py"))
LIBRARY = "libgpl_fast.so"
# Of csrc/cpu these once, all others once for each instruction set: dispatch.cpp picks one of them
# at run time.
ONCE = ("dispatch", "memory")
X86_BUILDS = {
    # For CPUs from before 2013 (Intel) or 2015 (AMD), and yet the most work for the compiler, which
    # makes four registers of each vector: -O3 would take a third more of it.
    "default": "-march=x86-64-v2 -O1",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4",
}
# What TORCH_CUDA_ARCH_LIST is by default, as far as nvcc knows it; PTX of the first one serves
# every other GPU.
ARCHITECTURES = ("8.0+PTX", "8.6", "8.9", "9.0", "10.0", "12.0")


def variable(name: str) -> str | None:
    """What a variable of the environment holds; the build ends where it may not."""
    try:
        return ENVIRONMENT["value"](name)
    except ValueError as error:
        sys.exit(str(error))


# The largest source takes most of the time: its architectures in parallel.
NVCC_FLAGS = f"-std=c++17 -O3 --threads {variable('MAX_JOBS') or os.cpu_count()}"
NVCC_FLAGS += " -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"

NINJA = """\
ninja_required_version = 1.5
cxx = {cxx}
cxxflags = {cxxflags}
ldflags = {ldflags}
nvcc = {nvcc}
nvccflags = {nvccflags}

rule compile
  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule compile_cuda
  command = $nvcc -MMD -MF $out.d $nvccflags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out

rule link
  command = $cxx -shared $in -o $out $ldflags
  description = link $out

{edges}
default {library}
"""


@dataclass(frozen=True)
class Cuda:
    """nvcc, the toolkit that it belongs to, its version, and what it is to compile for."""

    nvcc: str
    toolkit: Path
    version: str
    architectures: tuple[str, ...]  # "80", "90a", …; "80+PTX" for PTX beside it

    @property
    def description(self) -> str:
        """What the library says about itself: "13.0 80+PTX 86 …"."""
        return " ".join([self.version, *self.architectures])


def find_nvcc() -> str | None:
    """CUDACXX, or nvcc of CUDA_HOME, or of PATH."""
    if named := variable("CUDACXX"):
        return shutil.which(named)
    home = variable("CUDA_HOME")
    return (shutil.which(str(Path(home, "bin", "nvcc"))) if home else None) or shutil.which("nvcc")


def find_cuda() -> Cuda | None:
    """The CUDA build, or None where it is left out."""
    forced = variable("GPL_FAST_FORCE_CUDA")
    if forced == "0":
        print("GPL_FAST_FORCE_CUDA=0: building the CPU operators only")
        return None
    nvcc, listed = find_nvcc(), variable("TORCH_CUDA_ARCH_LIST")
    if nvcc is None:
        if forced or listed:
            cause = "GPL_FAST_FORCE_CUDA" if forced else "TORCH_CUDA_ARCH_LIST"
            sys.exit(
                f"{cause} asks for the CUDA operators, but there is no nvcc: set CUDA_HOME to a "
                "CUDA toolkit, put its nvcc on PATH, or unset the variable to install the CPU "
                "operators only"
            )
        print("no nvcc: building the CPU operators only")
        return None
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    # nvcc may be a script that calls another one: it says itself where it lives.
    toolkit = re.search(
        r"^#\$ TOP=(.*)$", _output(nvcc, "--dryrun", "-E", "-x", "cu", "none"), re.M
    )
    known = set(re.findall(r"compute_(\d+)", _output(nvcc, "--list-gpu-arch")))
    if not (version and toolkit and known):
        sys.exit(f"{nvcc} does not answer like nvcc: set CUDACXX or CUDA_HOME to a CUDA toolkit")
    if int(version[1].split(".")[0]) < 12:  # the first to know Hopper's tensor maps
        sys.exit(
            f"{nvcc} is of CUDA {version[1]}, expected 12.0 or newer: set CUDACXX or CUDA_HOME to "
            "one, or GPL_FAST_FORCE_CUDA=0 to install the CPU operators only"
        )
    return Cuda(nvcc, Path(toolkit[1]).resolve(), version[1], architectures(listed, known))


def architectures(listed: str | None, known: set[str]) -> tuple[str, ...]:
    """`listed` as torch reads it ("8.0;9.0+PTX"), or `ARCHITECTURES`; `known` is nvcc's "80", …"""
    out: dict[str, str] = {}
    for entry in re.split("[ ;,]+", listed.strip()) if listed else ARCHITECTURES:
        found = re.fullmatch(r"(\d+)\.(\d)a?(\+PTX)?", entry)
        if not found:
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries like 8.0, 9.0a, 12.0+PTX"
            )
        number = found[1] + found[2]
        if int(number) < 80:
            print(f"TORCH_CUDA_ARCH_LIST: {entry} is left out: the kernels need 8.0 or newer")
        elif number in known:
            # Hopper's own instructions need "a"; no other GPU has its number.
            out[number] = ("90a" if number == "90" else number) + (found[3] or "")
        elif listed:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: this nvcc does not know {entry}, only {sorted(known)}")
    if not out:
        sys.exit("TORCH_CUDA_ARCH_LIST: got nothing from 8.0 on; unset it for the default")
    return tuple(out.values())


def nvcc_targets(source: Path, architectures: tuple[str, ...]) -> list[str]:
    """Machine code for every architecture, PTX where asked for; of a `*_sm90.cu`, whose kernels are
    empty elsewhere, for sm_90a alone.

    All of 8.x come from the PTX of the lowest one listed, and all from 10.0 on from the lowest of
    those: nvcc 13.0 makes the same machine code of it as of their own, and PTX is half of its work.
    Beside a `*_sm90.cu`, sm_90a's share comes from 8.x's PTX too: float32, and shapes that are too
    large for its own kernels. There bfloat16 conversions become other instructions.
    """
    if source.stem.endswith("_sm90"):
        architectures = tuple(a for a in architectures if a.startswith("90a")) or architectures
    beside = source.with_name(f"{source.stem}_sm90{source.suffix}").exists()

    def version(entry: str) -> int:
        return int(entry.removesuffix("+PTX").removesuffix("a"))

    flags: list[str] = []
    lowest: dict[int, str] = {}  # by generation
    for entry in sorted(architectures, key=version):
        number, generation = entry.removesuffix("+PTX"), min(version(entry) // 10, 10)
        ptx = lowest.setdefault(8 if beside and generation == 9 else generation, number)
        flags.append(f"-gencode=arch=compute_{ptx},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_link_flags(cuda: Cuda) -> list[str]:
    """The runtime, static and not visible from outside: torch may bring one of its own."""
    folders = ["lib64", "lib", f"targets/{platform.machine()}-linux/lib"]
    runtimes = [cuda.toolkit / folder / "libcudart_static.a" for folder in folders]
    runtime = next((path for path in runtimes if path.exists()), None)
    if runtime is None:
        sys.exit(f"{cuda.toolkit} has no libcudart_static.a: install it, or take nvcc off PATH")
    return [str(runtime), f"-Wl,--exclude-libs,{runtime.name}", "-ldl", "-lrt", "-lpthread"]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def torch_folder() -> Path:
    return Path(next(iter(importlib.util.find_spec("torch").submodule_search_locations)))


def compiler() -> str:
    return variable("CXX") or "c++"


def build_ninja(library: Path, libc: list[str] | None = None) -> str:
    """What ninja does; `libc` are flags that go before those of all other libraries."""
    cuda, torch_dir = find_cuda(), torch_folder()
    csrc = ROOT / "csrc"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    builds = X86_BUILDS if x86 else {"default": ""}
    common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    common += ["-DGPL_FAST_X86"] if x86 else []
    # Errors name a source by its place in the project, not on the machine that built the library.
    for folder in (ROOT, torch_dir / "include"):
        common.append(shlex.quote(f"-ffile-prefix-map={folder}/="))
    # No contraction: a fused y' - y would not be exactly 0 for equal inputs. GCC 12's AVX-512
    # headers set off -Wmaybe-uninitialized. Winograd's innermost loop is up to a sixth slower where
    # it happens to lie across cache lines.
    kernel = "-ffp-contract=off -Wno-maybe-uninitialized -fno-math-errno -falign-loops=64"
    torch_flags = f"-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem {torch_dir / 'include'}"

    edges, objects = [], []

    def compile_edge(source: Path, name: str, flags: str) -> None:
        edges.append(f"build {name}: compile {escape(source)}\n  flags = {flags}\n")
        objects.append(name)

    if cuda:
        print(f"CUDA {cuda.version} at {cuda.toolkit}: {' '.join(cuda.architectures)}")
        torch_flags += f""" '-DGPL_FAST_CUDA="{cuda.description}"'"""
    for source in sorted((csrc / "cuda").rglob("*.cu")) if cuda else []:
        objects.append(f"{source.stem}.cuda.o")
        flags = " ".join(nvcc_targets(source, cuda.architectures))
        edges.append(f"build {objects[-1]}: compile_cuda {escape(source)}\n  flags = {flags}\n")
    compile_edge(csrc / "oldest_libstdcxx.cpp", "oldest_libstdcxx.o", "")
    for source in sorted((csrc / "operators").glob("*.cpp")):
        compile_edge(source, f"{source.stem}.operator.o", torch_flags)
    for name in ONCE:
        compile_edge(csrc / "cpu" / f"{name}.cpp", f"{name}.o", "")
    for build, march in builds.items():
        for source in sorted((csrc / "cpu").glob("*.cpp")):
            if source.stem not in ONCE:
                flags = f"{march} {kernel} -DGPL_CPU_NAMESPACE=cpu_{build}"
                compile_edge(source, f"{source.stem}.{build}.o", flags)
    edges.append(f"build {escape(library)}: link {' '.join(objects)}\n")
    linked = ["-Wl,--no-as-needed", *map(shlex.quote, libc or ())]
    linked += [f"-L{torch_dir / 'lib'}", "-ltorch"]
    linked += [f"-Wl,--build-id=0x{SOURCES['digest'](csrc).hex()}"]  # ops.py looks for it
    linked += cuda_link_flags(cuda) if cuda else []
    return NINJA.format(
        cxx=compiler(),
        cxxflags=" ".join([*common, variable("CXXFLAGS") or ""]).strip(),
        ldflags=" ".join([*linked, variable("LDFLAGS") or ""]).strip(),
        nvcc=cuda.nvcc if cuda else "",
        nvccflags=NVCC_FLAGS,
        edges="\n".join(edges),
        library=escape(library),
    )


class Build(build_ext):
    """One library by ninja, into the build tree or, in place, into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve()
        if self.editable_mode:  # whose folder is temporary; the next build needs the objects
            build_dir = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        torch_library = torch_folder() / "lib" / "libtorch_cpu.so"
        libc = OLDEST_GLIBC["link_flags"](
            shlex.split(compiler()), torch_library, build_dir / "libc"
        )
        (build_dir / "build.ninja").write_text(build_ninja(library, libc))
        module = importlib.util.find_spec("ninja")
        ninja = [sys.executable, "-m", "ninja"] if module else ["ninja"]
        command = [*ninja, "-C", str(build_dir)]
        if jobs := variable("MAX_JOBS"):
            command += ["-j", jobs]
        subprocess.run(command, check=True)


class Wheel(bdist_wheel):
    """Every CPython: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if not (compiled := sys.platform == "linux"):
    print(f"no compiled operators for {platform.system()}: the reference backend will run")

setup(
    ext_modules=[Extension("gpl_fast.libgpl_fast", sources=[])] if compiled else [],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
