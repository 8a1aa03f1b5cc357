"""Files that callers bring and fetch: a folder each, its content and what is known of it.

    FOLDER/file-…/content
    FOLDER/file-…/meta.json      written last: without it there is no file

Knows no HTTP and nothing of what files hold. Everything here blocks.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar
from uuid import uuid4

import orjson

from composer.durable import replace_file, sync_folder
from composer.errors import NotFound, StoreError

Purpose = Literal["batch", "batch_output"]
Order = Literal["asc", "desc"]

ABANDONED_S = 24 * 3600
"""Age at which what has no `meta.json` is nobody's upload any more, in seconds."""

_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class File:
    """`created_ns` is in Unix nanoseconds, so that lists have an order."""

    id: str
    bytes: int
    created_ns: int
    filename: str
    purpose: Purpose

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_ns // 10**9,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Files:
    """Several processes may share the folder: a file never changes once it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        """Raises StoreError when the folder cannot be used."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("file-*"):
                there = (path / "meta.json").exists()
                if not there and time.time() - path.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise StoreError(
                f"the folder {self.folder} cannot be used: {error}; make it writable, or set "
                "COMPOSER_FILES_DIR to another"
            ) from error

    def add(self, content: BinaryIO, filename: str, purpose: Purpose) -> File:
        """Keeps a copy. Raises StoreError when it cannot; then nothing is left of it."""

        def copy(path: Path) -> None:
            with path.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())

        return self.make(f"file-{uuid4().hex}", copy, filename, purpose)

    def make(
        self, id: str, write: Callable[[Path], object], filename: str, purpose: Purpose
    ) -> File:
        """The file of this id with the content that `write` puts at a path; done again, it
        replaces the one before. Raises StoreError."""
        folder = self.folder / id
        try:
            folder.mkdir(exist_ok=True)
            write(folder / "content")
            size = (folder / "content").stat().st_size
            file = File(id, size, time.time_ns(), filename, purpose)
            replace_file(folder / "meta.json", [orjson.dumps(asdict(file))])
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StoreError(f"the file cannot be kept: {error.strerror}") from error
        return file

    def get(self, id: str) -> File:
        """Raises NotFound."""
        if _ID.fullmatch(id):
            try:
                return File(**orjson.loads((self.folder / id / "meta.json").read_bytes()))
            except FileNotFoundError:
                pass
        raise NotFound(f"there is no file {id!r}; GET /v1/files lists them", param="file_id")

    def content(self, id: str) -> Path:
        """Where its bytes lie. Raises NotFound."""
        return self.folder / self.get(id).id / "content"

    def all(self) -> list[File]:
        """The newest first."""
        found = []
        for path in self.folder.glob("file-*/meta.json"):
            with suppress(FileNotFoundError):  # deleted meanwhile
                found.append(File(**orjson.loads(path.read_bytes())))
        return sorted(found, key=lambda file: (file.created_ns, file.id), reverse=True)

    def delete(self, id: str) -> None:
        """Raises NotFound. Batches that run on it have it still."""
        folder = self.folder / self.get(id).id
        (folder / "meta.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


class Listed(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def body(self) -> dict[str, Any]: ...


L = TypeVar("L", bound=Listed)


def page(items: Iterable[L], *, after: str | None, limit: int) -> dict[str, Any]:
    """One page of a list in OpenAI's shape. Raises NotFound for an `after` that is not in it."""
    found = list(items)
    start = 0
    if after is not None:
        start = next((i + 1 for i, item in enumerate(found) if item.id == after), -1)
        if start < 0:
            raise NotFound(f"there is nothing called {after!r} in this list", param="after")
    data = [item.body for item in found[start : start + limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > start + limit,
    }
