"""Views of texts: shapes, scales, and the same after restoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import orjson
import pytest

from composer.routing.reading import read
from composer.routing.state import State
from composer.routing.views import VIEWS, Views, rows_of
from composer.types import FloatArray
from tests.routing.families.world import DIM, encode, questions

TEXTS = questions(80, seed=5)[0]


def test_shapes_and_lengths() -> None:
    views = Views.fit(TEXTS)
    features = views.transform(TEXTS, encode)
    assert tuple(features) == VIEWS
    assert features["embedding"].shape == features["stem"].shape == (80, DIM)
    assert {rows.dtype for rows in features.values()} == {np.dtype(np.float32)}
    words = np.sqrt(features["words"].multiply(features["words"]).sum(axis=1))
    np.testing.assert_allclose(words, 1, atol=1e-5)
    length = np.linalg.norm(features["format"], axis=1)
    assert 0.3 < float(np.median(length)) < 1.5


def test_the_stem_is_the_question_without_options() -> None:
    views = Views.fit(TEXTS)
    with_options, without = "rivers1 bread2?\nA. one\nB. two", "rivers1 bread2?"
    features = views.transform([with_options, without], encode)
    np.testing.assert_array_equal(features["stem"][0], features["embedding"][1])
    np.testing.assert_array_equal(features["stem"][1], features["embedding"][1])
    assert views.encoded([read(with_options)]) == [with_options, without]
    assert views.encoded([read(without)]) == [without]


def test_encode_is_called_once_and_only_where_a_view_needs_it() -> None:
    calls: list[list[str]] = []

    def counted(texts: Sequence[str]) -> FloatArray:
        calls.append(list(texts))
        return encode(texts)

    views = Views.fit(TEXTS)
    views.transform([*TEXTS, *TEXTS], counted)
    assert calls == [views.encoded([read(text) for text in TEXTS])]
    calls.clear()
    Views.fit(TEXTS, ("words", "format")).transform(TEXTS, counted)
    assert calls == []


def test_texts_read_before_look_the_same_without_being_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    views = Views.fit(TEXTS)
    fresh, readings = views.transform(TEXTS, encode), [read(text) for text in TEXTS]
    monkeypatch.setattr("composer.routing.views.read", None)
    again = views.of(readings, encode)
    for view in VIEWS:
        assert abs(fresh[view] - again[view]).max() == 0


@pytest.mark.parametrize(
    "names", [VIEWS, ("embedding",), ("words",), ("format", "stem")], ids=lambda n: "-".join(n)
)
def test_restores_to_the_last_bit(names: Sequence[str]) -> None:
    views = Views.fit(TEXTS, names)  # type: ignore[arg-type]
    state = views.state()
    restored = Views.restore(State(state.arrays, orjson.loads(orjson.dumps(state.values))))
    new = [*questions(30, seed=6)[0], "", "never seen words", "北京 été"]
    before, after = views.transform(new, encode), restored.transform(new, encode)
    assert set(before) == set(after) == set(names)
    for view in before:
        difference = abs(before[view] - after[view])
        assert difference.max() == 0


def test_one_text_as_among_many() -> None:
    views = Views.fit(TEXTS)
    many, one = views.transform(TEXTS, encode), views.transform(TEXTS[7:8], encode)
    for view, rows in rows_of(many, np.array([7])).items():
        assert abs(rows - one[view]).max() == 0


@pytest.mark.parametrize("texts", [[""], ["", " "], ["one"], ["one", "one"], ["?"]])
def test_few_and_empty_texts(texts: list[str]) -> None:
    views = Views.fit(texts)
    restored = Views.restore(views.state())
    features = restored.transform([*texts, "quite another text"], encode)
    for rows in features.values():
        assert rows.shape[0] == len(texts) + 1
        assert np.isfinite(rows.data if hasattr(rows, "nnz") else rows).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no texts to fit views on; give at least one"):
        Views.fit([])
    with pytest.raises(ValueError, match="no view 'letters'; choose from embedding, stem"):
        Views.fit(TEXTS, ["letters"])  # type: ignore[list-item]


def test_views_of_another_format_are_refused() -> None:
    state = Views.fit(TEXTS).state()
    other = replace(state, values={**state.values, "format": ["length"]})
    with pytest.raises(ValueError, match="other format features; train the router anew"):
        Views.restore(other)
