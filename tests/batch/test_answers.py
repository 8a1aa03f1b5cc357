"""Whatever is cut off or damaged, whole answers stay and the rest is asked again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composer.batch.answers import Answers
from composer.errors import Conflict, StoreError

LINES = 8


def open_(path: Path, digest: str = "d", lines: int = LINES) -> Answers:
    return Answers(path, digest=digest, lines=lines)


async def filled(path: Path, *indices: int) -> None:
    answers = open_(path)
    for index in indices:
        await answers.put(index, 500 if index == 3 else 200, b'{"n": %d}' % index)
    await answers.aclose()


async def test_answers_are_there_again_in_the_inputs_order(tmp_path: Path) -> None:
    await filled(tmp_path / "p", 5, 3, 0)
    answers = open_(tmp_path / "p")
    assert answers.missing() == [1, 2, 4, 6, 7]
    assert (answers.answered, answers.failed) == (3, 1)
    assert answers.write(tmp_path / "all") == 3
    assert (tmp_path / "all").read_text() == '{"n": 0}\n{"n": 3}\n{"n": 5}\n'
    assert answers.write(tmp_path / "ok", ok=True) == 2
    assert answers.write(tmp_path / "bad", ok=False, otherwise=lambda i: b"-%d" % i) == 6
    assert (tmp_path / "bad").read_text() == '-1\n-2\n{"n": 3}\n-4\n-6\n-7\n'
    await answers.aclose()


async def test_many_at_once_are_committed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    answers = open_(tmp_path / "p", lines=500)
    before = len(synced)
    await asyncio.gather(*(answers.put(index, 200, b"{}") for index in range(500)))
    assert answers.answered == 500
    assert len(synced) - before <= 5
    await answers.aclose()


async def test_what_was_put_counts_though_who_put_it_has_left(tmp_path: Path) -> None:
    answers = open_(tmp_path / "p")
    putting = asyncio.create_task(answers.put(2, 200, b"{}"))
    await asyncio.sleep(0)
    putting.cancel()
    await answers.settled()
    assert answers.missing() == [0, 1, 3, 4, 5, 6, 7]
    await answers.aclose()


async def test_a_line_is_answered_once(tmp_path: Path) -> None:
    await filled(tmp_path / "p", 2)
    answers = open_(tmp_path / "p")
    with pytest.raises(ValueError, match="answered already"):
        await answers.put(2, 200, b"{}")
    await answers.aclose()


async def test_another_input_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    await filled(tmp_path / "p", 2)
    before = (tmp_path / "p").read_bytes()
    for digest, lines in (("other", LINES), ("d", LINES + 1)):
        with pytest.raises(Conflict, match="the input was changed since"):
            open_(tmp_path / "p", digest, lines)
    assert (tmp_path / "p").read_bytes() == before


async def test_one_process_at_a_time(tmp_path: Path) -> None:
    answers = open_(tmp_path / "p")
    with pytest.raises(Conflict, match="another process"):
        open_(tmp_path / "p")
    await answers.aclose()
    await open_(tmp_path / "p").aclose()


async def test_a_full_disk_is_told_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(tmp_path / "p", 1)
    answers = open_(tmp_path / "p")
    real = os.write

    def full(fd: int, data: memoryview) -> int:
        real(fd, data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match="No space left"):
        await answers.put(2, 200, b"{}")
    monkeypatch.setattr(os, "write", real)
    await answers.put(4, 200, b'{"n": 4}')
    await answers.aclose()
    again = open_(tmp_path / "p")
    assert again.missing() == [0, 2, 3, 5, 6, 7]
    assert again.write(tmp_path / "out") == 2
    await again.aclose()


async def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        open_(tmp_path / "none" / "p")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    order=st.permutations(range(LINES)),
    cut=st.floats(0, 1),
    tail=st.binary(max_size=20),
    flip=st.none() | st.floats(0, 0.999),
)
def test_after_any_damage_whole_answers_count_and_the_rest_can_be_put_again(
    tmp_path: Path, order: list[int], cut: float, tail: bytes, flip: float | None
) -> None:
    path = tmp_path / "p"
    path.unlink(missing_ok=True)

    async def go() -> None:
        await filled(path, *order)
        data = bytearray(path.read_bytes())
        data = data[: round(cut * len(data))] + tail
        if flip is not None and data:
            data[int(flip * len(data))] ^= 1
        path.write_bytes(data)
        answers = open_(path)
        kept = [index for index in range(LINES) if index in answers]
        assert set(kept) == set(order[: len(kept)])  # a prefix of what was put
        for index in answers.missing():
            await answers.put(index, 200, b'{"n": %d}' % index)
        await answers.aclose()
        again = open_(path)
        assert again.write(tmp_path / "out") == LINES
        await again.aclose()

    asyncio.run(go())
    want = "".join(f'{{"n": {index}}}\n' for index in range(LINES))
    assert (tmp_path / "out").read_text() == want
