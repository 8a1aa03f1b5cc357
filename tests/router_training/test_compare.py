"""Comparison: the same questions for all, ours against the bar, Markdown that says it."""

from __future__ import annotations

from functools import cache

import numpy as np

from router_training.compare import BAR, Comparison, compare, over_pools
from router_training.comparison import markdown
from tests.router_training.synthetic import stamp, table
from tests.routing.helpers import WordEmbedder

FEW = ("category", "clusters")


@cache
def compared(name: str = "all", *, priced: bool = True, experts: int = 3) -> Comparison:
    train, dev = table(priced=priced), table(250, seed=2, priced=priced)
    some = train.experts[:experts]
    encode = WordEmbedder().encode
    return compare("t", name, train.of(some), dev.of(some), encode, stamp(), families=FEW)


def test_every_method_is_judged_on_the_same_questions() -> None:
    c = compared()
    assert [m.name for m in c.methods] == [*FEW, BAR]
    for m in c.methods:
        assert len(m.values) == len(c.group) == 250
        assert m.card["avg_acc"] == np.mean(m.values)
    assert c.best in FEW
    assert c.why.startswith(c.best)
    ahead = c.ahead("category")
    assert ahead is not None
    expected = c.of("category").values.mean() - c.of(BAR).values.mean()
    np.testing.assert_allclose(ahead.mean, expected, atol=1e-12)


def test_the_markdown_has_every_table_that_the_pools_allow() -> None:
    priced, plain, two = compared(), compared("plain", priced=False), compared("two", experts=2)
    text = markdown([priced, plain, two])
    first, second, third, last = text.split("\n## ")
    for name in (*FEW, BAR, "random", "best single", "best by category, label known", "oracle"):
        assert f"| {name} " in first or f"| **{name}** " in first
    assert "| random mix of single experts |" in first
    assert "The knob of" in first
    assert "US dollars" not in second
    assert "synthetic: APGR, CPT50, CPT80" in third
    assert "## Over" not in first
    assert last.startswith("Over 3 pools")
    assert "None" not in text
    assert "nan" not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_verdict_holds_what_was_chosen_against_the_bar() -> None:
    c = compared()
    v = over_pools([c], None)
    np.testing.assert_allclose(v.overall.mean, c.of(c.best).values.mean() - c.of(BAR).values.mean())
    same = over_pools([c], c.best, c.best)
    assert not same.better
    assert same.overall.mean == 0
