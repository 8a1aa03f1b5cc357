"""The journal loses nothing that `append` acknowledged, whatever is cut off after it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.errors import StoreError
from composer.store.journal import Damaged, Journal

few = settings(max_examples=40, deadline=None)  # each example waits for the disk

payloads = st.lists(
    st.binary(max_size=40).filter(lambda data: b"\n" not in data), min_size=1, max_size=12
)


def opened(root: Path, segment_bytes: int = 1 << 20) -> Journal:
    journal = Journal(root, segment_bytes=segment_bytes)
    journal.open()
    return journal


def everything(journal: Journal) -> list[bytes | Damaged]:
    journal.seal()
    return [line for path in journal.segments() for line in journal.read(path)]


@few
@given(batches=st.lists(payloads, min_size=1, max_size=4), size=st.sampled_from([1, 64, 1 << 20]))
def test_lines_come_back_in_order_across_segments(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[bytes]], size: int
) -> None:
    journal = opened(tmp_path_factory.mktemp("journal"), size)
    for batch in batches:
        journal.append(batch)
    assert everything(journal) == [line for batch in batches for line in batch]
    assert journal.size() == sum(path.stat().st_size for path in journal.segments())
    if size == 1:
        assert len(journal.segments()) == len(batches)
    journal.close()


@few
@given(lines=payloads, data=st.data())
def test_a_cut_at_any_byte_loses_at_most_the_line_it_hits(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data: st.DataObject
) -> None:
    journal = opened(tmp_path_factory.mktemp("journal"))
    ends = []
    for line in lines:
        journal.append([line])
        ends.append(journal.size())
    journal.close()
    path = journal.segments()[0]
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    # A line stands from its last byte on; the line break behind it is not needed.
    whole = sum(end - 1 <= cut for end in ends)
    assert list(Journal.read(path)) == lines[:whole]

    again = opened(path.parent.parent)  # and what comes after the cut starts a new segment
    again.append([b"after"])
    assert everything(again) == [*lines[:whole], b"after"]
    again.close()


@few
@given(lines=payloads, data=st.data())
def test_a_flipped_bit_is_seen_and_leaves_the_other_lines_alone(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], data: st.DataObject
) -> None:
    journal = opened(tmp_path_factory.mktemp("journal"))
    journal.append(lines)
    journal.close()
    path = journal.segments()[0]
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 2))  # without its last break, a line is a tail
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    hit = content[:at].count(b"\n")
    read = list(Journal.read(path))
    sound = [line for line in read if not isinstance(line, Damaged)]
    assert any(isinstance(line, Damaged) for line in read)
    assert sound[:hit] == lines[:hit]
    rest = sound[hit:]
    assert rest in (lines[hit + 1 :], lines[hit + 2 :])  # a line break that flips joins two


def test_the_segment_being_written_is_not_offered(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    assert journal.oldest_sealed() is None
    journal.append([b"a"])
    assert journal.oldest_sealed() is None
    assert (journal.oldest(), journal.newest()) == (1, 1)
    journal.seal()
    first = journal.oldest_sealed()
    assert first is not None
    journal.append([b"b"])
    assert journal.oldest_sealed() == first
    journal.remove(first)
    assert journal.oldest_sealed() is None
    assert journal.oldest() == 2
    journal.close()


def test_a_full_disk_acknowledges_nothing_and_tears_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path)
    journal.append([b"before"])
    write = os.write

    def short_write(file: int, data: bytes) -> int:
        if len(data) > 8:
            return write(file, data[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("composer.store.journal.os.write", short_write)
    with pytest.raises(OSError, match="No space left"):
        journal.append([b"lost in between"])
    monkeypatch.undo()
    journal.append([b"after"])
    assert everything(journal) == [b"before", b"after"]
    journal.close()


def test_a_failed_fsync_acknowledges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path)
    journal.append([b"before"])

    def broken(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("composer.store.journal.os.fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        journal.append([b"unsure"])
    monkeypatch.undo()
    journal.append([b"after"])
    assert everything(journal) == [b"before", b"after"]
    journal.close()


def test_rejected_lines_lie_apart_with_their_reason(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.reject(b'{"a":1}', "the database says no")
    journal.reject(b"\xff", "not text")
    lines = (tmp_path / "0" / "rejected.jsonl").read_bytes().splitlines()
    first, second = (orjson.loads(line) for line in lines)
    assert (first["payload"], first["reason"]) == ('{"a":1}', "the database says no")
    assert second["payload"] == "\ufffd"
    assert journal.segments() == []
    journal.close()


def test_two_live_journals_share_a_folder_and_a_dead_ones_lines_are_adopted(
    tmp_path: Path,
) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    first.append([b"one"])
    second.append([b"two"])
    second.seal()
    second.append([b"three"])
    third = opened(tmp_path)
    assert third.segments() == []  # both others live
    third.close()
    second.close()
    first.append([b"four"])
    first.close()
    heir = opened(tmp_path)
    assert everything(heir) == [b"one", b"four", b"two", b"three"]
    assert list((tmp_path / "1").glob("*.jsonl")) == []
    heir.close()


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys\n"
        "from composer.store.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1])); journal.open(); journal.append([b'x'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -9
    journal = opened(tmp_path)
    assert everything(journal) == [b"x"]
    assert journal.segments()[0].parent.name == "0"
    journal.close()


def test_an_unusable_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file cannot be used: .* COMPOSER_JOURNAL"):
        opened(tmp_path / "file")


def test_a_new_journal_and_its_segments_are_for_the_owner_alone(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append([b"private"])
    assert journal.segments()[0].stat().st_mode & 0o077 == 0
    journal.close()
