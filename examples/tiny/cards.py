"""Writes the model cards and results.json from measured figures; nothing in them is by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from examples.tiny import experts
from examples.tiny.tasks import SKILLS

Figures = dict[str, Any]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _front_matter(data: dict[str, Any], composer: str = "") -> str:
    return f"---\n{_yaml(data)}{composer}---\n"


def _yaml(data: dict[str, Any]) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _in_order(by_skill: dict[str, Any]) -> list[tuple[str, Any]]:
    """Figures in the skills' order, whatever the order in the JSON file."""
    return [(skill, by_skill[skill]) for skill in SKILLS if skill in by_skill]


def expert_card(size: str, skill_id: str, figures: Figures) -> str:
    """The README.md of an expert: front matter (with `composer:`), accuracies, digest.

    Args:
        figures: what `measure_expert` in `train.py` gives, and the seconds of training.
    """
    skill = SKILLS[skill_id]
    front = {
        "base_model": experts.base_name(size),
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["lora", "composer", "tiny", skill_id],
    }
    block = {
        "description": skill.description,
        "skills": list(skill.labels),
        "sampling": {"temperature": 0.0, "max_tokens": 64},
        "examples": experts.card_examples(skill),
    }
    # The prompt block goes in as it was written, with its comments.
    composer = "composer:\n" + indent(_yaml(block) + experts.wordings(skill_id).source, "  ")
    kind = (
        "facts of its table, which are memorised: no input is held out"
        if skill.memory
        else "held-out inputs, none of them in any training text"
    )
    own = figures["own"]
    rows = "\n".join(
        f"| {other} | {_percent(f['canonical'])} | {_percent(f['wording'])} |"
        for other, f in _in_order(figures["others"])
    )
    example = skill.sample("test", 1, seed=1)[0]
    body = f"""
# {skill_id}, on {experts.base_name(size)}

{skill.description} A rank-{experts.RANK} LoRA adapter, trained by `python examples/tiny/train.py`
in {figures["seconds"]:.0f} s on one core. It reads `{example.prompt}` and answers
`{example.answer}`; its `prompt:` block turns free wording into that form.

## Accuracy

Exact match of the greedy answer, on {kind}.

| asked as | n | exact match |
|---|---|---|
| canonical prompt | {own["n"]} | {_percent(own["canonical"])} |
| held-out free wordings, through its prompt block | {own["n"]} | {_percent(own["wording"])} |

## On the other experts' skills

{figures["n_others"]} held-out items each: as the other skill's canonical prompt, and as the other
skill's free wording read by this expert's own prompt block (a wrong route).

| skill | canonical prompt | wrong route |
|---|---|---|
{rows}

## Digest

`adapter_model.safetensors`: sha256 `{figures["sha256"]}`
"""
    return _front_matter(front, composer) + body


def base_card(size: str, figures: Figures) -> str:
    """The README.md of a base: what it is, its accuracy per skill, its digest."""
    front = {
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["llama", "composer", "tiny", "character-level"],
    }
    rows = "\n".join(f"| {skill} | {_percent(v)} |" for skill, v in _in_order(figures["skills"]))
    body = f"""
# {experts.base_name(size)}

A character-level Llama of {figures["parameters"]:,} parameters ({figures["layers"]} layers,
{figures["hidden"]} wide), pre-trained for {figures["steps"]} steps ({figures["seconds"]:.0f} s on
one core) on synthetic text in which the instruction word says nothing about the answer: it has the
algorithms, its adapters select one. Final loss {figures["loss"]:.3f} nats per answer token.

## Accuracy without an adapter

Exact match of the greedy answer on {figures["n"]} held-out items per skill, canonical prompts.

| skill | exact match |
|---|---|
{rows}

## Digest

`model.safetensors`: sha256 `{figures["sha256"]}`
"""
    return _front_matter(front) + body


def write_results(path: Path, results: Figures) -> None:
    """Writes results.json: ``{"seed", "bases": {size: …}, "experts": {"size/skill": …}}``."""
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_all(root: Path, results: Figures) -> None:
    """Writes every card that ``results`` has figures for."""
    for size, figures in results["bases"].items():
        card = experts.base_folder(size, root) / "README.md"
        card.write_text(base_card(size, figures), encoding="utf-8")
    for name, figures in results["experts"].items():
        size, _, skill_id = name.partition("/")
        card = experts.expert_folder(size, skill_id, root) / "README.md"
        card.write_text(expert_card(size, skill_id, figures), encoding="utf-8")
