"""Trains the large base's experts a second time, all at once, to keep to their own segments.

    python examples/tiny/mixing.py        # experts/large → experts/mixed, about nine core-minutes

Experts of `experts/large` know single questions only. Switched at the boundary of a composite's
segments they get 25 % of composites right: a sum, a count or a capital that stands second, or whose
prompt another adapter reads beside it, is lost. Here every token of a question runs under the
adapter of its segment, in the prompt and in the answer, so each learns to answer beside another.
Pairs of skills that are `unseen` are never trained on; three questions in ten are of one skill,
drawn as for the first training. Knows no gate: which adapter a token runs under is given.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from examples.tiny import experts, training
from examples.tiny.modeling import ANSWER, EOS
from examples.tiny.tasks import SEPARATOR, SKILLS, composite_pairs

NAMES = tuple(SKILLS)
STEPS, RATE, TOKENS = 900, 2e-3, 2000
COMPOSITES = 0.7
HARD = {"add": 3.0, "count-letter": 3.0, "capital": 2.0, "reverse": 1.5}
"""How much oftener a skill is asked for than the others: what was learnt slowly the first time."""

PREFIX = "base_model.model."
SCALE = 2.0  # alpha / rank of the experts

Owned = tuple[str, str, tuple[str, str]]  # prompt, answer, the skill of each segment


def draw(rng: random.Random) -> Owned:
    """A composite of a seen pair, or a question of one skill."""
    if rng.random() >= COMPOSITES:
        name = rng.choices(NAMES, [HARD.get(n, 1) for n in NAMES])[0]
        prompt, answer = experts.draw_example(SKILLS[name], rng)
        return prompt, answer, (name, name)
    pairs = composite_pairs("seen")
    pair = rng.choices(pairs, [HARD.get(a, 1) * HARD.get(b, 1) for a, b in pairs])[0]
    items = [SKILLS[name].item(SKILLS[name].draw(rng, "train")) for name in pair]
    prompt = SEPARATOR.join(item.prompt for item in items)
    return prompt, SEPARATOR.join(item.answer for item in items), pair


def segments(ids: Tensor, separator: int, answer: int) -> Tensor:
    """[B, T] token ids → [B, T] 0 or 1: a segment begins with the separator, and the answer begins
    with the first one again."""
    mark = ids == answer
    before = (ids == separator).cumsum(1)
    at_mark = (before * mark).max(1, keepdim=True).values
    return torch.where(mark.cumsum(1) > 0, before - at_mark, before).clamp(max=1)


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (ids, labels, weights): [B, T], [B, T] and [B, T, Σr], the last 1 for the ranks of
    the token's own adapter and 0 for all others."""
    vocabulary = tokenizer.get_vocab()
    separator, answer = vocabulary[SEPARATOR], vocabulary[ANSWER]
    while True:
        drawn = [draw(rng) for _ in range(1024)]
        texts = [f"{prompt}{ANSWER}{reply}{EOS}" for prompt, reply, _ in drawn]
        rows = [
            (ids, [NAMES.index(name) for name in pair])
            for ids, (_, _, pair) in zip(tokenizer(texts)["input_ids"], drawn, strict=True)
        ]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > TOKENS:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            ids = torch.full((len(group), len(group[-1][0])), tokenizer.pad_token_id)
            labels = torch.full_like(ids, training.IGNORE)
            for i, (row_ids, _) in enumerate(group):
                start = row_ids.index(answer) + 1
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                labels[i, start : len(row_ids)] = ids[i, start : len(row_ids)]
            owners = torch.tensor([pair for _, pair in group])
            who = owners.gather(1, segments(ids, separator, answer))
            yield ids, labels, torch.eye(len(NAMES))[who].repeat_interleave(experts.RANK, -1)


def train(root: Path, steps: int = STEPS) -> None:
    """Writes `experts/mixed` below `root`."""
    base, tokenizer = experts.load_base("large", root)
    base.requires_grad_(False)
    own = {
        name: load_file(experts.expert_folder("large", name, root) / "adapter_model.safetensors")
        for name in NAMES
    }
    a_end = ".lora_A.weight"
    modules = [k[len(PREFIX) : -len(a_end)] for k in own[NAMES[0]] if k.endswith(a_end)]

    def stacked(module: str, side: str, dim: int) -> nn.Parameter:
        key = f"{PREFIX}{module}.lora_{side}.weight"
        return nn.Parameter(torch.cat([own[name][key].float() for name in NAMES], dim))

    a = {module: stacked(module, "A", 0) for module in modules}
    b = {module: stacked(module, "B", 1) for module in modules}
    weights = torch.zeros(0)

    def adding(module: str):  # type: ignore[no-untyped-def]
        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + SCALE * ((args[0] @ a[module].T) * weights) @ b[module].T

        return add

    for module in modules:
        base.get_submodule(module).register_forward_hook(adding(module))
    parameters = [*a.values(), *b.values()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    stream = batches(tokenizer, random.Random("joint"))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * training._schedule(step, steps, 20)
        ids, labels, weights = next(stream)
        loss = training.loss_of(base, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 25 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}", flush=True)
    for i, name in enumerate(NAMES):
        ranks = slice(i * experts.RANK, (i + 1) * experts.RANK)
        tensors = {}
        for module in modules:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a[module].data[ranks]
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b[module].data[:, ranks]
        _save(root, name, tensors)


def _save(root: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """With the config of the expert that it was."""
    folder = experts.expert_folder("mixed", name, root)
    folder.mkdir(parents=True, exist_ok=True)
    config = experts.expert_folder("large", name, root) / "adapter_config.json"
    (folder / "adapter_config.json").write_bytes(config.read_bytes())
    kept = {key: t.to(torch.bfloat16).contiguous() for key, t in tensors.items()}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=experts.HERE, help="read from and written to")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.root, options.steps)
