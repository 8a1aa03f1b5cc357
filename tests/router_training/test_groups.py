"""Rows that are one question share a group, and no others do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from composer.routing.trained import normalised
from router_training.groups import groups_of


def test_signs_and_case_make_no_other_question() -> None:
    assert normalised("What is 2?") == normalised("  what IS_2") == "whatis2"
    assert normalised("?!") != normalised("!!")


def test_texts_and_labels_join_through_each_other() -> None:
    texts = ["a", "b", "A.", "c", "d"]
    assert groups_of(texts, [None, "g", "g", None, None]).tolist() == [0, 0, 0, 1, 2]


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abcdef"), st.none() | st.sampled_from("xyz")), min_size=1
    )
)
def test_groups_are_the_least_that_keep_equals_together(rows: list[tuple[str, str | None]]) -> None:
    texts, labels = [r[0] for r in rows], [r[1] for r in rows]
    expected = list(range(len(rows)))
    changed = True
    while changed:  # by definition: equal by text or label, until nothing moves
        changed = False
        for i in range(len(rows)):
            for j in range(i):
                alike = texts[i] == texts[j] or (labels[i] is not None and labels[i] == labels[j])
                if alike and expected[i] != expected[j]:
                    expected[i] = expected[j] = min(expected[i], expected[j])
                    changed = True
    number = {g: i for i, g in enumerate(dict.fromkeys(expected))}
    assert groups_of(texts, labels).tolist() == [number[g] for g in expected]
