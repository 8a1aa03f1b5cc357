"""What survives a crash of process or machine: framed lines, whole writes, names in folders.

Knows nothing of what is written. Everything here blocks.
"""

from __future__ import annotations

import os
import zlib
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
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
