"""Reading and writing safetensors files; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from gpl_fast.real_tensors import real_tensors


def read_safetensors(
    path: str | PathLike[str], key: str, writer: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object under `key` in the file's metadata, and its tensors.

    The tensors lie on the CPU, own their memory (a later write to the file reaches none of them),
    and may enter a graph even if they are read under ``torch.inference_mode``.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not a safetensors file, truncated, without that key, or with one whose text is
            no JSON object; the message begins with the path.
    """
    from safetensors import SafetensorError, safe_open

    path = os.fsdecode(path)
    with open(path, "rb"):  # the system's own errors: they name the path
        pass
    try:
        with real_tensors(), safe_open(path, framework="pt", device="cpu") as f:
            metadata = f.metadata() or {}
            tensors = {name: _owned(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: got a file that is not safetensors or is truncated ({why}), expected one "
            f"written by {writer}; pickles are never read"
        ) from error
    if key not in metadata:
        raise ValueError(f"{path}: got a foreign safetensors file, expected one of {writer}")
    try:
        header = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is malformed: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its metadata is malformed: got {type(header).__name__}")
    return header, tensors


@real_tensors()
def write_safetensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]
) -> None:
    """Write `tensors`, of any device and layout, and `header` as JSON under `key`.

    The file appears under its name when it is complete, and the umask decides who may read it.

    Raises:
        OSError: the folder does not exist, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = os.fsdecode(path)
    if os.path.basename(path) in ("", os.curdir, os.pardir):  # which realpath would cut off
        raise IsADirectoryError(errno.EISDIR, "names a folder, expected a file", path)
    path = os.path.realpath(path)  # a link stays one
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder, create it first", folder)
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "exists and is no regular file", path)
    # Copies: tensors that share their memory cannot be written.
    copies = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    part = os.path.join(folder, f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as f:
            mode = os.fstat(f.fileno()).st_mode
        try:
            save_file(copies, part, metadata={key: json.dumps(header)})
        except SafetensorError as error:
            raise OSError(errno.EIO, f"could not be written ({error})", path) from error
        os.chmod(part, mode)  # save_file may make a private file of it
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _owned(t: Tensor) -> Tensor:
    """A copy; of a bool tensor one whose bytes are 0 and 1, whatever a file holds."""
    return t.view(torch.uint8) != 0 if t.dtype == torch.bool else t.clone()
