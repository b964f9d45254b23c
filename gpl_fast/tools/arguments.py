"""Arguments of the command line: errors in one line, numbers, and where output goes.

Where something is to be written is looked at before any work is done.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def count(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1)


def seed(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def amount(text: str) -> float:
    """A finite number above 0."""
    return _number(text, "a number > 0", lambda x: x > 0)


def weight(text: str) -> float:
    """A finite number from 0 on."""
    return _number(text, "a number >= 0", lambda x: x >= 0)


def workspace(text: str) -> float | str:
    """Megabytes, or "auto": `gpl_fast.GenericPerceptualLoss`'s ``workspace_mb``."""
    return "auto" if text == "auto" else _number(text, "auto or a number > 0", lambda x: x > 0)


def output_file(text: str) -> Path:
    """A file that can be written: a new one in a folder that is there, or another one's place."""
    return _checked(text, _check_file)


def output_folder(text: str) -> Path:
    """A folder that can be written into or, with its parents, made."""
    return _checked(text, _check_folder)


def _whole(text: str, least: int) -> int:
    try:
        found = int(text)
    except ValueError:
        found = -1
    if not least <= found <= MOST:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a whole number from {least} to {MOST}"
        )
    return found


def _number(text: str, expected: str, allows: Callable[[float], bool]) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and allows(found)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return found


def _checked(text: str, check: Callable[[Path], Any]) -> Path:
    path = Path(text)
    try:
        check(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {why}") from None
    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError("it is a folder, expected a file")
    if not path.exists():
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {str(path.parent)!r}")
        _check_folder(path.parent)
    elif not os.access(path, os.W_OK):
        raise ValueError("the file may not be written")


def _check_folder(path: Path) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{str(there)!r} is a file, expected a folder")
    with tempfile.TemporaryFile(dir=there):
        pass
