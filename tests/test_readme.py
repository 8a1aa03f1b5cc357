"""The README is true: its paths are there, its settings are the settings, its YAML loads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from composer.build import load
from composer.prompting import PromptSpec, render
from composer.routing.artefact import Artefact, DataStamp, EmbedderStamp, ExpertStamp, Manifest
from composer.routing.families import FAMILIES
from composer.settings import Settings
from tests.routing.test_curve import FALLING

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for tag, text in fences if tag == language]


def yaml_with(*path: str) -> dict[str, Any]:
    """The one YAML block with these keys, each below the one before."""

    def holds(at: Any) -> bool:
        for key in path:
            at = at.get(key) if isinstance(at, dict) else None
        return at is not None

    [found] = [b for b in (yaml.safe_load(text) for text in blocks("yaml")) if holds(b)]
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The default registry and what it names, where a test may add to it."""
    shutil.copytree(ROOT / "examples" / "tiny", tmp_path / "examples" / "tiny")
    shutil.copy(ROOT / "experts.yaml", tmp_path)
    shutil.copytree(
        ROOT / "examples" / "tiny" / "experts" / "large" / "uppercase",
        tmp_path / "adapters" / "shout",
    )
    return tmp_path


def with_added(checkout: Path, addition: dict[str, Any]) -> Settings:
    file = checkout / "experts.yaml"
    data = yaml.safe_load(file.read_text())
    for key, value in addition.items():
        data[key] = data[key] | value if isinstance(value, dict) else data[key] + value
    file.write_text(yaml.safe_dump(data))
    return Settings(experts=file)


def test_four_lines_add_an_adapter(checkout: Path) -> None:
    catalog = load(with_added(checkout, yaml_with("experts", "shout"))).catalog
    shout = catalog.experts["shout"]
    assert shout.adapter is not None
    assert shout.adapter.digest == catalog.experts["uppercase"].adapter.digest  # type: ignore[union-attr]
    assert "shout" in catalog.policies["auto"].experts


def test_one_entry_adds_a_folder_of_adapters(checkout: Path) -> None:
    catalog = load(with_added(checkout, yaml_with("adapters_from"))).catalog
    assert catalog.experts["shout"].description == "Writes a word in capital letters."


def test_the_composition_shown_is_made(checkout: Path) -> None:
    settings = with_added(checkout, yaml_with("experts", "loud-mirror"))
    settings = settings.model_copy(update={"cache_dir": checkout / "cache"})
    adapter = load(settings).catalog.experts["loud-mirror"].adapter
    assert adapter is not None
    assert adapter.composed is not None
    assert {one.name for one in adapter.composed.members} == {"uppercase", "reverse"}
    assert adapter.path.parent == checkout / "cache" / "compositions"


def test_the_policies_shown_are_right(checkout: Path) -> None:
    catalog = load(with_added(checkout, yaml_with("policies", "auto"))).catalog
    assert catalog.policies["auto"].default_expert == "base"
    catalog = load(with_added(checkout, yaml_with("policies", "mixed"))).catalog
    assert catalog.policies["mixed"].strategy.name == "compose"


def test_the_trained_router_shown_is_right(checkout: Path) -> None:
    plain = load(with_added(checkout, {})).catalog
    stamp = EmbedderStamp(id="any", digest="any", dim=1)
    Artefact(
        Manifest(
            family="kernel",
            settings={},
            embedder=stamp,
            experts=tuple(ExpertStamp(id=expert, quality=0.5) for expert in plain.experts),
            data=DataStamp(source="outcomes.csv", digest="any", questions=1),
            curve=FALLING,
        ),
        {},
    ).save(checkout / "routers" / "exams")
    catalog = load(
        with_added(checkout, {"policies": {"exams": yaml_with("exams")["exams"]}}),
        embedder=lambda: stamp,
    ).catalog
    assert catalog.policies["exams"].quality == 0.95
    assert catalog.policies["exams"].router.digest


def test_the_families_shown_are_all() -> None:
    shown = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", README, re.MULTILINE)
    assert set(FAMILIES) <= set(shown)


def test_the_prompt_block_shown_works() -> None:
    spec = PromptSpec.model_validate(yaml_with("prompt")["prompt"])
    assert render(spec, "please make 'Fox' bigger") == "uppercase fox"
    assert render(spec, "write fox") == "uppercase fox"


def test_the_settings_shown_are_the_settings() -> None:
    """Each of them once in the table, with its default: a value, or in words what stands for it."""
    fields = Settings.model_fields
    shown = set(re.findall(r"`COMPOSER_(\w+)`", README))
    assert shown <= {name.upper() for name in fields}
    rows = re.findall(r"^\| (`COMPOSER_[^|]+) \| ([^|]+) \|", README, re.MULTILINE)
    told = [name.lower() for names, _ in rows for name in re.findall(r"`COMPOSER_(\w+)`", names)]
    assert sorted(told) == sorted(fields)
    for names, defaults in rows:
        real = [fields[n.lower()].default for n in re.findall(r"`COMPOSER_(\w+)`", names)]
        if all(default is None or default == () for default in real):
            assert "`" not in defaults, names
        else:
            values = re.findall(r"`([^`]+)`", defaults)
            assert [str(default).lower() for default in real] == [v.lower() for v in values], names


def test_nothing_is_left_to_be_filled_in() -> None:
    assert "@@" not in README


def test_every_path_shown_is_there() -> None:
    [tree] = [b for b in blocks("") if b.startswith("experts.yaml")]
    for line in tree.splitlines():
        names = line.split("  ")[0 if not line.startswith(" ") else 1].strip()
        base = ROOT / "composer" if line.startswith(" ") else ROOT
        for name in names.split(", "):
            assert (base / name).exists(), line
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link
