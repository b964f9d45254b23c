"""Links against the glibc that torch asks for, whatever newer one this machine has.

The linker takes a symbol in its newest version: pthread_create of GLIBC_2.34, though the one of
GLIBC_2.2.5 is there too and is the only one that older systems have. A library without code that
offers such symbols in the newest version that torch could have goes before libc. It is called
libpthread.so.0: every glibc has one, with these versions, and at run time a symbol is looked up by
name and version in all libraries, so that it is found where a system keeps it.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

STANDS_FOR = "libpthread.so.0"
BESIDE = ("libdl.so.2", "librt.so.1")  # where else older systems keep what newer ones have in libc

Version = tuple[int, ...]


def link_flags(compiler: list[str], torch_library: Path, folder: Path) -> list[str] | None:
    """Flags that go before all other libraries', with files in `folder`; None where that cannot be
    done, which is said: without glibc, or without binutils."""
    try:
        pthread = _find(compiler, STANDS_FOR)
        if any(symbol == "pthread_create" for symbol, _ in _functions(pthread)):
            first = f"-l:{STANDS_FOR}"  # from before 2.34, where nothing had moved yet
        else:
            first = str(_stub(compiler, pthread, max(_needed(torch_library)), folder))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"the library needs a libc that is as new as this system's: {error}")
        return None
    return [first, *(f"-l:{name}" for name in BESIDE)]


def _stub(compiler: list[str], pthread: str, newest: Version, folder: Path) -> Path:
    """A library of the functions of libc and libm that have versions up to `newest` and above."""
    offered = {v for v in _versions(_run("objdump", "-p", pthread)) if v <= newest}
    found: dict[str, set[Version]] = {}
    for name in ("libc.so.6", "libm.so.6"):
        for symbol, version in _functions(_find(compiler, name)):
            found.setdefault(symbol, set()).add(version)
    older = {
        symbol: max(versions & offered)
        for symbol, versions in sorted(found.items())
        if max(versions) > newest and versions & offered
    }
    folder.mkdir(parents=True, exist_ok=True)
    source, script, stub = (folder / name for name in ("stub.c", "stub.map", STANDS_FOR))
    line = 'void stub_{0}(void) {{}}\n__asm__(".symver stub_{0}, {1}@@{2}");\n'
    lines = [line.format(i, s, _text(v)) for i, (s, v) in enumerate(older.items())]
    source.write_text("".join(lines))
    script.write_text("".join(f"{_text(v)} {{}};\n" for v in sorted(set(older.values()))))
    flags = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{STANDS_FOR}"]
    flags.append(f"-Wl,--version-script={script}")
    _run(*compiler, "-x", "c", *flags, str(source), "-o", str(stub))
    return stub


def _needed(library: Path) -> list[Version]:
    """The versions of glibc that a library asks for."""
    return _versions(_run("objdump", "-p", str(library)).partition("Version References:")[2])


def _functions(library: str) -> Iterator[tuple[str, Version]]:
    """Those that a library has, with each of their versions."""
    for line in _run("objdump", "-T", library).splitlines():
        found = re.search(r" (?:DF|iD) .*\s\(?GLIBC_(\d[\d.]*)\)?\s+(\w+)$", line)
        if found and "*UND*" not in line:
            yield found[2], _version(found[1])


def _versions(text: str) -> list[Version]:
    return [_version(found) for found in re.findall(r"\bGLIBC_(\d[\d.]*)", text)]


def _version(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def _text(version: Version) -> str:
    return "GLIBC_" + ".".join(map(str, version))


def _find(compiler: list[str], name: str) -> str:
    path = Path(_run(*compiler, f"-print-file-name={name}").strip())
    if not path.is_absolute():
        raise FileNotFoundError(f"{compiler[0]} finds no {name}")
    return str(path)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
