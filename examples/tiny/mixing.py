"""Trains experts for mixtures, all ten at once, each on the tokens of its own segments.

    python examples/tiny/mixing.py    # bases/instructed → experts/instructed, five core-minutes

Every token of a question runs under the adapter of its segment, in the prompt and in the answer, so
each expert learns its skill, and to answer beside another. (Experts trained on single questions
alone, as those of `experts/large`, lose sums, counts and capitals that stand second, or whose
prompt another adapter reads beside them.) Pairs of skills that are `unseen` are never trained on.

Adapters are on the upper half of the base. In the lower half no token of an answer can know which
segment it is in: it takes a layer to count the separators and another to look the instruction up;
so nothing could decide there which expert is needed. The start token, at which nothing has been
asked yet, runs under anyone. Knows no gate: whose a token is is given.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.tiny import experts, training
from examples.tiny.segments import NAMES, Owned, batches
from examples.tiny.tasks import SEPARATOR, SKILLS, composite_pairs

STEPS, RATE, TOKENS = 1600, 4e-3, 2000
COMPOSITES = 0.7
LAYERS = (2, 3)
HARD = {"add": 2.0, "count-letter": 5.0, "capital": 2.0, "spell-number": 2.0}
"""How much oftener a skill is asked for than the others: what is learnt slowly."""

PREFIX = "base_model.model."
ALPHA = 2 * experts.RANK


def draw(rng: random.Random) -> Owned:
    """A composite of a seen pair, or a question of one skill, of training inputs."""
    names: tuple[str, ...]
    if rng.random() < COMPOSITES:
        pairs = composite_pairs("seen")
        names = rng.choices(pairs, [HARD.get(a, 1) * HARD.get(b, 1) for a, b in pairs])[0]
    else:
        names = tuple(rng.choices(NAMES, [HARD.get(name, 1) for name in NAMES]))
    items = [SKILLS[name].item(SKILLS[name].draw(rng, "train")) for name in names]
    prompt = SEPARATOR.join(item.prompt for item in items)
    return prompt, SEPARATOR.join(item.answer for item in items), names


class Adapter(nn.Module):
    """All experts' adapters of one linear layer, stacked: A [Σr, d_in] and B [d_out, Σr]. They
    start as peft's do, B at zero."""

    def __init__(self, layer: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        ranks, d_in = len(NAMES) * experts.RANK, layer.in_features
        start = torch.rand(ranks, d_in, generator=generator) * 2 - 1
        self.a = nn.Parameter(start / d_in**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, ranks))
        self.chosen = torch.zeros(0)  # [B, T, Σr]: 1 for the ranks of the token's own expert

    def add(self, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """As a forward hook of the layer."""
        hidden = (args[0] @ self.a.T) * self.chosen
        return out + ALPHA / experts.RANK * hidden @ self.b.T

    def of(self, place: int) -> tuple[Tensor, Tensor]:
        """A [r, d_in] and B [d_out, r] of the expert at ``place`` of ``NAMES``."""
        ranks = slice(place * experts.RANK, (place + 1) * experts.RANK)
        return self.a.detach()[ranks], self.b.detach()[:, ranks]


def train(root: Path, steps: int = STEPS) -> None:
    """Writes `experts/instructed` below `root`."""
    base, tokenizer = experts.load_base("instructed", root)
    base.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    adapters: dict[str, Adapter] = {}
    for number in LAYERS:
        prefix = f"model.layers.{number}."
        for name, layer in base.get_submodule(prefix[:-1]).named_modules():
            if name.rpartition(".")[2] in experts.TARGETS:
                adapters[prefix + name] = Adapter(layer, generator)
                layer.register_forward_hook(adapters[prefix + name].add)
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random("joint")
    stream = batches(lambda: draw(rng), tokenizer, TOKENS, random.Random("joint/order"))
    each = torch.eye(len(NAMES)).repeat_interleave(experts.RANK, 1)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * training.schedule(step, steps, 20)
        ids, labels, owners = next(stream)
        owners[:, 0] = torch.randint(len(NAMES), (len(owners),), generator=generator)
        for adapter in adapters.values():
            adapter.chosen = each[owners.clamp(min=0)]  # whose padding is does not matter
        loss = training.loss_of(base, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 25 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}", flush=True)
    for place, name in enumerate(NAMES):
        _save(root, name, {module: adapter.of(place) for module, adapter in adapters.items()})


def _save(root: Path, name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    folder = experts.expert_folder("instructed", name, root)
    config = LoraConfig(
        r=experts.RANK,
        lora_alpha=ALPHA,
        target_modules=experts.TARGETS,
        layers_to_transform=list(LAYERS),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=experts.base_name("instructed"),
    )
    config.save_pretrained(str(folder))
    experts.tidy_config(folder)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.to(torch.bfloat16).contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.to(torch.bfloat16).contiguous()
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=experts.HERE, help="read from and written to")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.root, options.steps)
