"""Vectors kept on disk: made once, the same to the last bit, and a damaged file is told as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from composer.errors import SettingsError
from router_training.vectors import CHUNK, KeptVectors
from tests.routing.helpers import WordEmbedder


def test_a_text_is_embedded_once_in_all_runs(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(CHUNK + 3)]
    model = WordEmbedder()
    told: list[tuple[int, int]] = []
    kept = KeptVectors(model, tmp_path / "deep", lambda _, done, total: told.append((done, total)))
    first = kept.encode([*texts, texts[0]])
    np.testing.assert_array_equal(first[0], first[-1])
    assert model.encoded == texts
    assert told[-1] == (len(texts), len(texts))
    again = WordEmbedder()
    second = KeptVectors(again, tmp_path / "deep").encode([*texts[::-1], "new"])
    assert again.encoded == ["new"]
    np.testing.assert_array_equal(second[:-1], first[:-1][::-1])
    assert kept.encode([]).shape == (0, model.dim)


def test_what_was_made_before_a_failure_is_kept(tmp_path: Path) -> None:
    class Failing(WordEmbedder):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            if "bad" in texts:
                raise RuntimeError("out of memory")
            return super().encode(texts)

    texts = [f"text {i}" for i in range(CHUNK)]
    with pytest.raises(RuntimeError, match="out of memory"):
        KeptVectors(Failing(), tmp_path).encode([*texts, "bad"])
    after = WordEmbedder()
    KeptVectors(after, tmp_path).encode(texts)
    assert after.encoded == []


def test_models_do_not_share_vectors_and_damage_is_told(tmp_path: Path) -> None:
    KeptVectors(WordEmbedder(), tmp_path).encode(["a"])
    other = WordEmbedder()
    other.digest = "another"
    kept = KeptVectors(other, tmp_path)
    kept.encode(["a"])
    assert other.encoded == ["a"]
    kept.path.write_bytes(b"not a database, but long enough to look like one" * 50)
    with pytest.raises(SettingsError, match=r"cannot be used .*; delete the file"):
        kept.encode(["b"])
