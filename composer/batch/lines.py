"""A batch's input file: checked as a whole first, then read line by line at known offsets.

Knows what is around a line's body (OpenAI's batch format), and nothing of the body:

    {"custom_id": "…", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from composer.batch.base import Line
from composer.errors import RequestError

MAX_LINE = 5 * 2**20
"""Bytes of a line: the edge's limit of a body, and room for what stands around it."""

SHOWN_PROBLEMS = 20
"""Problems named in one message; the rest are counted."""

MOST_PROBLEMS = 1000
"""Problems collected before the rest of the file is not looked at any more."""

MAX_ID = 512

WRITE_AN_OBJECT = "write one request, a JSON object, a line"


@dataclass(frozen=True, slots=True)
class LineProblem:
    """What is wrong with a line, in OpenAI's words for `batch.errors`; `message` says how to mend
    it, too. Lines count from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        return asdict(self)


class InvalidBatch(RequestError):
    """The input file cannot be run as it is; nothing of it has been. Always holds a problem."""

    code = "invalid_batch"

    def __init__(self, file: Path, problems: Sequence[LineProblem]) -> None:
        said = [
            f"{file}: {problem.message}"
            if problem.line is None
            else f"{file}:{problem.line}: {problem.message}"
            for problem in problems[:SHOWN_PROBLEMS]
        ]
        if len(problems) > SHOWN_PROBLEMS:
            said.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
        super().__init__("\n".join(said), param="input_file_id")
        self.problems = tuple(problems)


class Lines:
    """A checked input file, kept open: 20 bytes of memory a line. `digest` is the file's sha256.

    A file that is replaced under its name stays readable here; one that is overwritten is
    noticed at the next read.
    """

    def __init__(self, path: Path, endpoints: Collection[str], *, key: str = "") -> None:
        """Reads the whole file, so it blocks. `key` is that of every line. Raises
        InvalidBatch with every problem found, and RequestError for a file that cannot be read."""
        self._path, self._key = path, key
        self._at, self._sizes = array("q"), array("q")
        self._numbers = array("l")
        self._hashes = array("Q")
        self._problems: list[LineProblem] = []
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self._stamp = self._stamped()
            self.digest = self._scan(endpoints)
            self._refuse_duplicates()
            if not self._problems and not len(self):
                words = "there are no requests in it; write one a line"
                self._problems.append(LineProblem("empty_file", words))
            if self._problems:
                raise InvalidBatch(path, sorted(self._problems, key=lambda p: p.line or 0))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._at)

    def __getitem__(self, index: int) -> Line:
        """Raises RequestError when the file has been written to since it was checked."""
        raw = os.pread(self._file.fileno(), self._sizes[index], self._at[index])
        if self._stamped() != self._stamp:
            raise RequestError(
                f"{self._path} was changed while it was being answered; put it back as it was, "
                "or begin anew"
            )
        parsed = orjson.loads(raw)
        return Line(index, parsed["custom_id"], parsed["url"], parsed["body"], self._key)

    def custom_ids(self) -> Iterator[str]:
        return (self[index].custom_id for index in range(len(self)))

    def close(self) -> None:
        self._file.close()

    # --- checking ------------------------------------------------------------------------

    def _stamped(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _scan(self, endpoints: Collection[str]) -> str:
        digest = hashlib.sha256()
        number, at = 0, 0
        for raw, whole in _raw_lines(self._file, digest):
            number += 1
            start, at = at, at + whole
            if len(self._problems) >= MOST_PROBLEMS or not raw.strip():
                continue
            if whole > MAX_LINE:
                words = f"the line has {whole} bytes; make it {MAX_LINE} at most"
                self._problems.append(LineProblem("line_too_long", words, number))
                continue
            custom_id = _custom_id(number, raw, endpoints)
            if not isinstance(custom_id, str):
                self._problems.extend(custom_id)
                continue
            self._at.append(start)
            self._sizes.append(len(raw))
            self._numbers.append(number)
            self._hashes.append(_hash(custom_id))
        return digest.hexdigest()

    def _refuse_duplicates(self) -> None:
        """By hashes first, so that the ids themselves need not be kept."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(np.diff(hashes[order]) == 0)
        suspects = sorted({int(i) for at in same for i in (order[at], order[at + 1])})
        first: dict[str, int] = {}
        for index in suspects:
            custom_id, number = self[index].custom_id, self._numbers[index]
            earlier = first.setdefault(custom_id, number)
            if earlier != number:
                words = f"custom_id {custom_id!r} is also that of line {earlier}; give it another"
                self._problems.append(
                    LineProblem("duplicate_custom_id", words, number, "custom_id")
                )


def _raw_lines(file: BinaryIO, digest: Any) -> Iterator[tuple[bytes, int]]:
    """Lines and their lengths in bytes; of one that is too long, only the beginning."""
    while raw := file.readline(MAX_LINE + 1):
        digest.update(raw)
        whole, part = len(raw), raw
        while len(part) == MAX_LINE + 1 and not part.endswith(b"\n"):
            part = file.readline(MAX_LINE + 1)
            digest.update(part)
            whole += len(part)
        yield raw, whole


def _custom_id(number: int, raw: bytes, endpoints: Collection[str]) -> str | list[LineProblem]:
    """The line's id where all around its body is right; else everything that is not."""
    problems: list[LineProblem] = []

    def wrong(code: str, message: str, param: str | None = None) -> list[LineProblem]:
        problems.append(LineProblem(code, message, number, param))
        return problems

    try:
        line = orjson.loads(raw.rstrip())
    except orjson.JSONDecodeError as error:
        # Its own message counts lines too, from the start of this one.
        words = f"not JSON ({error.msg}, column {error.colno}); {WRITE_AN_OBJECT}"
        return wrong("invalid_json_line", words)
    if not isinstance(line, dict):
        return wrong("invalid_json_line", f"not a JSON object; {WRITE_AN_OBJECT}")
    custom_id: Any = line.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID:
        words = f"no usable custom_id; give it a text of 1 to {MAX_ID} characters, its own"
        wrong("missing_required_parameter", words, "custom_id")
    if line.get("method") != "POST":
        wrong("invalid_method", 'the method is not POST; write "method": "POST"', "method")
    url = line.get("url")
    if not isinstance(url, str) or url not in endpoints:
        words = f"the url cannot be asked; write {' or '.join(sorted(endpoints))}"
        wrong("invalid_url", words, "url")
    if not isinstance(line.get("body"), dict):
        words = "the body is not a JSON object; write the request's fields into one"
        wrong("missing_required_parameter", words, "body")
    return problems or custom_id


def _hash(custom_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "little")
