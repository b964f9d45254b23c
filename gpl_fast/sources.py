"""What the compiled library was built from: a digest that the linker writes into it.

``setup.py`` runs this file by itself: it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

KINDS = {".cpp", ".h", ".cu", ".cuh"}


def digest(csrc: Path) -> bytes:
    """Of the sources in a folder, their names and contents."""
    found = hashlib.sha1(usedforsecurity=False)
    for path in sorted(csrc.rglob("*")):
        if path.suffix in KINDS:
            content = path.read_bytes()
            found.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode())
            found.update(content)
    return found.digest()
