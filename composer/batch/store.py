"""Batches on the disk, in a folder that several processes share. Runs nothing.

    FOLDER/batch_…/batch.json        the batch as callers see it
    FOLDER/batch_…/input.jsonl       its input, a link: the file may be deleted meanwhile
    FOLDER/batch_…/answers           see `answers`: who has it open runs the batch
    FOLDER/batch_…/cancel            that it is to be cancelled, put down by any process

All but `batch.json` are gone when a batch has ended. It is written by the process that runs the
batch; the others can only leave their wish, which that one looks for. A lock on the batch's folder
orders the two: shared by those who wish, exclusive (`seal`) from the moment at which the batch's
end is decided. So a wish is either taken before that or refused. Everything here blocks.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import orjson

from composer.batch.status import CANCELLABLE, Batch
from composer.durable import replace_file, sync_folder
from composer.errors import Conflict, NotFound, StoreError

_ID = re.compile(r"batch_[0-9a-f]{32}")


class BatchStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def input(self, id: str) -> Path:
        return self._folder / id / "input.jsonl"

    def answers(self, id: str) -> Path:
        return self._folder / id / "answers"

    # --- batches -------------------------------------------------------------------------

    def add(self, batch: Batch, source: Path) -> None:
        """A new one, with its input. Raises StoreError; then nothing is left of it."""
        folder = self._folder / batch.id
        try:
            folder.mkdir()
            try:
                os.link(source, self.input(batch.id))
            except OSError:  # a file system without links
                shutil.copyfile(source, self.input(batch.id))
            self.save(batch)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise StoreError(f"the batch cannot be kept: {error.strerror}") from error
        except StoreError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def load(self, id: str) -> Batch:
        """Raises NotFound."""
        if _ID.fullmatch(id):
            with suppress(FileNotFoundError):
                return self._load(id)
        raise _unknown(id)

    def all(self) -> list[Batch]:
        """The newest first."""
        found = [self._load(path.parent.name) for path in self._folder.glob("batch_*/batch.json")]
        return sorted(found, key=lambda batch: (batch.created_ns, batch.id), reverse=True)

    def save(self, batch: Batch) -> None:
        """Raises StoreError; then it is as it was."""
        text = orjson.dumps(asdict(batch))
        try:
            replace_file(self._folder / batch.id / "batch.json", [text])
        except OSError as error:
            raise StoreError(f"batch {batch.id} cannot be kept: {error.strerror}") from error

    def clear(self, id: str) -> None:
        """Takes away what an ended batch needs no more."""
        for path in (self.answers(id), self.input(id), self._mark(id)):
            with suppress(OSError):
                path.unlink()

    def _load(self, id: str) -> Batch:
        batch = Batch(**orjson.loads((self._folder / id / "batch.json").read_bytes()))
        if batch.status in CANCELLABLE:
            with suppress(FileNotFoundError):
                batch.become("cancelling", at=self._mark(id).stat().st_mtime)
        return batch

    # --- cancelling ----------------------------------------------------------------------

    def cancel(self, id: str) -> None:
        """Leaves the wish, for the process that runs the batch and for those after it. Raises
        NotFound, StoreError, and Conflict for a batch that has ended or is about to."""
        if self.load(id).status == "cancelling":
            return
        try:
            with self._locked(id, fcntl.LOCK_SH | fcntl.LOCK_NB):
                status = self.load(id).status
                if status in CANCELLABLE:
                    self._mark(id).touch()
                    sync_folder(self._folder / id)
                    return
        except BlockingIOError:  # sealed
            status = "finalizing"
        except OSError as error:
            raise StoreError(f"the cancel cannot be kept: {error.strerror}; try again") from error
        if status != "cancelling":
            raise Conflict(f"batch {id!r} is {status}: there is nothing to cancel")

    def cancelled(self, id: str) -> bool:
        """Whether the wish is there, and its batch has not ended."""
        return os.path.exists(self._mark(id))

    @contextmanager
    def seal(self, id: str) -> Iterator[bool]:
        """Held by the process that runs the batch while it ends it: nobody can cancel it any more.
        Gives whether somebody had. Raises NotFound, StoreError."""
        with ExitStack() as held:
            try:
                # Those who cancel have it for one write.
                held.enter_context(self._locked(id, fcntl.LOCK_EX))
            except OSError as error:
                raise StoreError(f"batch {id} cannot be kept: {error.strerror}") from error
            yield self.cancelled(id)

    @contextmanager
    def _locked(self, id: str, how: int) -> Iterator[None]:
        try:
            fd = os.open(self._folder / id, os.O_RDONLY)
        except FileNotFoundError:
            raise _unknown(id) from None
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)  # and gives the lock back

    def _mark(self, id: str) -> Path:
        return self._folder / id / "cancel"


def _unknown(id: str) -> NotFound:
    return NotFound(f"there is no batch {id!r}; GET /v1/batches lists them", param="batch_id")
