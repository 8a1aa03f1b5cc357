"""The wordings that judge the router stand in nothing that the router or an expert has seen."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from string import Formatter

import pytest
import yaml

from examples.tiny.tasks import SKILLS

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = yaml.safe_load((ROOT / "tests" / "data" / "unseen_wordings.yaml").read_text())


def bare(wording: str) -> str:
    """Letters and placeholders only, which of two numbers comes first aside."""
    text = re.sub(r"[^a-z{}]+", " ", wording.lower()).strip()
    return text.replace("{a}", "{n}").replace("{b}", "{n}")


def seen() -> set[str]:
    """Every wording an expert's file shows or holds out."""
    files = (ROOT / "examples" / "tiny" / "wordings").glob("*.yaml")
    lists = chain.from_iterable(yaml.safe_load(file.read_text()).values() for file in files)
    return {bare(w) for ws in lists if isinstance(ws, list) for w in ws if isinstance(w, str)}


@pytest.mark.parametrize("skill", SKILLS)
def test_none_is_among_those_shown(skill: str) -> None:
    assert len(seen()) > 400
    assert [w for w in UNSEEN[skill] if bare(w) in seen()] == []


@pytest.mark.parametrize("skill", SKILLS)
def test_at_least_fifteen_with_every_placeholder_once(skill: str) -> None:
    assert len({bare(w) for w in UNSEEN[skill]}) >= 15
    wanted = sorted(SKILLS[skill].sample("test", 1, seed=0)[0].fields)
    for wording in UNSEEN[skill]:
        fields = [name for _, name, _, _ in Formatter().parse(wording) if name is not None]
        assert sorted(fields) == wanted, wording
