"""Where bases and experts lie on disk, and how they are loaded, saved and asked.

Everything is in standard Hugging Face and PEFT form, in bfloat16; computation is in float32.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from composer.prompting import PromptSpec, render
from examples.tiny import evaluate, training
from examples.tiny.tasks import SKILLS, Item, Skill

HERE = Path(__file__).parent
RANK = 8
OTHER_SHARE = 0.2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS: dict[str, tuple[str, ...]] = {
    "large": tuple(SKILLS),
    "small": ("uppercase", "sort-digits", "plural", "drop-vowels"),
}


@dataclass(frozen=True)
class Wordings:
    """What people write for a skill, and how its experts read it (``wordings/<skill>.yaml``).

    Attributes:
        prompt: the expert's prompt block, checked.
        source: the same block as it is written, from ``prompt:`` to its end.
        shown: templates that become the examples of the card.
        held_out: templates that are on no card; the extractor is judged on them.
    """

    prompt: PromptSpec
    source: str
    shown: tuple[str, ...]
    held_out: tuple[str, ...]


@cache
def wordings(skill: str) -> Wordings:
    """The wordings of a skill. Raises FileNotFoundError when it has none."""
    text = (HERE / "wordings" / f"{skill}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    return Wordings(
        PromptSpec.model_validate(data["prompt"]),
        text[text.index("prompt:\n") : text.index("wordings:\n")],
        tuple(data["wordings"]),
        tuple(data["held_out"]),
    )


def base_name(size: str) -> str:
    """The stable name that adapters give as their base, e.g. ``composer/tiny-large``."""
    return f"composer/tiny-{size}"


def base_folder(size: str, root: Path = HERE) -> Path:
    """Folder of a base."""
    return root / "bases" / size


def expert_folder(size: str, skill: str, root: Path = HERE) -> Path:
    """Folder of an expert."""
    return root / "experts" / size / skill


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights (bfloat16), configuration and tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # a temporary file's mode otherwise
    tokenizer.save_pretrained(folder)


def load_base(size: str, root: Path = HERE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A base in float32 with its tokenizer. Raises OSError when it has not been trained yet."""
    folder = base_folder(size, root)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def load_expert(
    size: str, skill: str, root: Path = HERE
) -> tuple[PeftModel, PreTrainedTokenizerFast]:
    """An expert on a base of its own, in float32. Raises OSError when its files are missing."""
    model, tokenizer = load_base(size, root)
    return PeftModel.from_pretrained(model, expert_folder(size, skill, root)).eval(), tokenizer


def draw_example(skill: Skill, rng: random.Random) -> training.Example:
    """A training question for a skill's expert; a fact table has only train inputs.

    One in five asks for another skill, canonically or in a free wording, and the answer repeats
    the input, as the base does: without these, practice in one skill blurs what the base does
    with other inputs, and a wrong route could be right by chance.
    """
    if rng.random() >= OTHER_SHARE:
        item = skill.item(skill.draw(rng, "train"))
        return item.prompt, item.answer
    other = rng.choice([s for s in SKILLS.values() if s.id != skill.id])
    item = other.item(other.draw(rng, "train"))
    repeated = " ".join(item.fields.values())
    if rng.random() < 0.3:
        return item.wording(rng.choice(wordings(other.id).shown)), repeated
    return item.prompt, repeated


def train_expert(
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    skill: Skill,
    steps: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> PeftModel:
    """Trains a rank-8 adapter on one skill; ``base`` is wrapped in place."""
    torch.manual_seed(seed)
    model = get_peft_model(
        base,
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    rng = random.Random(f"{seed}/expert/{skill.id}")
    stream = training.batches(
        lambda: draw_example(skill, rng), tokenizer, tokens=1200, rng=random.Random(seed)
    )
    training.train(model, stream, steps, matrix_lr=0.0, other_lr=3e-3, on_step=on_step)
    return model


def save_expert(model: PeftModel, size: str, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors (bfloat16)."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name(size)
    # Without the flag peft looks for the base's config on the hub, by the name set above.
    model.save_pretrained(folder, save_embedding_layers=False)
    tidy_config(folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)


def tidy_config(folder: Path) -> None:
    """Orders an adapter_config.json: peft keeps its targets as a set, in a new order each time."""
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["target_modules"].sort()
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def asked(skill: Skill, n: int, seed: int, templates: tuple[str, ...]) -> list[tuple[Item, str]]:
    """``n`` held-out items, each with a free wording; the templates are taken in turn."""
    items = skill.sample("test", n, seed)
    return [(item, item.wording(templates[i % len(templates)])) for i, item in enumerate(items)]


def canonical_accuracy(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, skill: Skill, n: int, seed: int = 0
) -> float:
    """Exact match on ``n`` held-out items (of a fact table: its facts) in canonical form."""
    items = skill.sample("test", n, seed)
    answers = evaluate.answer(model, tokenizer, [item.prompt for item in items])
    return evaluate.exact_match(answers, [item.answer for item in items])


def wording_accuracy(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    skill: Skill,
    prompt: PromptSpec,
    n: int,
    seed: int = 0,
) -> float:
    """Exact match on ``n`` items of ``skill`` in held-out wordings, read by ``prompt``.

    With another expert's prompt block, this is what a wrong route gives.
    """
    pairs = asked(skill, n, seed, wordings(skill.id).held_out)
    answers = evaluate.answer(model, tokenizer, [render(prompt, text) for _, text in pairs])
    return evaluate.exact_match(answers, [item.answer for item, _ in pairs])


def card_examples(skill: Skill, seed: int = 0) -> list[str]:
    """The shown wordings, each filled with another training input."""
    templates = wordings(skill.id).shown
    items = skill.sample("train", len(templates), seed)
    return [items[i % len(items)].wording(template) for i, template in enumerate(templates)]
