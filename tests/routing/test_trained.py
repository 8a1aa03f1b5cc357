"""Queries that were trained on are known again, but for case, white space and marks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.trained import TrainedQueries

WORDS = st.text("abcxyzß .?\n", max_size=12)


@settings(max_examples=80, deadline=None)
@given(st.lists(WORDS), WORDS, st.lists(WORDS))
def test_those_and_no_others_are_held(known: list[str], asked: str, more: list[str]) -> None:
    def plain(text: str) -> str:
        letters = "".join(text.casefold().split()).replace(".", "").replace("?", "")
        return letters or " ".join(text.split())

    trained = TrainedQueries.of(known)
    assert trained.hold([asked]).tolist() == [plain(asked) in map(plain, known)]
    assert trained.hold([f" {text.upper()}\n" for text in known]).all()
    both = trained.also(more)
    assert both.hold(known + more).all()
    assert both.digests.tolist() == TrainedQueries.of(known + more).digests.tolist()
    assert len(both.digests) == len({plain(text) for text in known + more})
    restored = TrainedQueries.restore(both.state())
    assert restored.hold([asked]).tolist() == both.hold([asked]).tolist()


def test_of_no_texts_there_are_none() -> None:
    assert TrainedQueries.of([]).hold(["a"]).tolist() == [False]
    assert TrainedQueries.of(["a"]).hold([]).tolist() == []
