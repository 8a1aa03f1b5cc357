"""What survives a crash of process or machine: framed lines, whole writes, names in folders.

Knows nothing of what is written. Everything here blocks.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path


def framed(payload: bytes) -> bytes:
    """The payload, which holds no line break, as a line that shows whether it is whole."""
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def unframed(line: bytes) -> bytes | None:
    """The payload of a framed line without its line break, None where the checksum fails."""
    checksum, payload = line[:9], line[9:]
    return payload if checksum == b"%08x " % zlib.crc32(payload) else None


def write_all(file: int, data: bytes) -> None:
    """To a file descriptor; one write may take less than all. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync_folder(folder: Path) -> None:
    """Makes names durable: a new file survives a power cut only with its folder's entry."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_contents(folder: Path) -> None:
    """Makes the files of a folder durable, and their names: to be called before it is moved to the
    name under which it counts as whole. Not what lies deeper."""
    for file in folder.iterdir():
        if file.is_file():
            _sync(file)
    sync_folder(folder)


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """The file is there as a whole or as it was, also after a crash. Raises OSError; what then
    stays of it is `path` with `.tmp` at its end, which the next try overwrites."""
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
