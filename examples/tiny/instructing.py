"""Trains the large base on, so that its instruction words mean something.

    python examples/tiny/instructing.py    # bases/large → bases/instructed, four core-minutes

To `bases/large` an instruction word says nothing, so its hidden states do not carry it, and a
gate, which reads nothing else, cannot know which expert a token needs. Bases that people use do
carry their instructions. So does this one, by two means:

- Six answers in ten are the input in a cipher whose shift is the instruction word's own: no skill,
  but the segment's instruction is needed at every token of the answer. The other four are of a task
  drawn at random, as in pre-training, so that nothing is unlearnt.
- A linear head on the hidden states of the upper half, thrown away afterwards, tells at every token
  the instruction of its segment, and its loss counts too. In a deep base what a token is about is
  there long before it is used; this one has four layers, and looks an instruction up as late as it
  can: halfway up a probe finds it in 86 % of tokens without the head, and in all with it.

Pairs of instructions are those of `seen` pairs of skills, and each with itself. Knows no expert
and no gate.
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
from torch import Tensor, nn

from examples.tiny import experts, pretraining, training
from examples.tiny.inputs import Split
from examples.tiny.segments import NAMES, Owned, batches
from examples.tiny.tasks import SEPARATOR, SKILLS, composite_pairs

NAME = "instructed"
STEPS, RATE, TOKENS = 800, 2e-3, 2500
SINGLE, CIPHERED, FITTING = 0.3, 0.6, 0.75
"""Shares: of questions with one segment, of answers in cipher, of inputs of the kind that the
instruction goes with."""

TOLD, TELLING = 2, 0.3
"""The first layer whose output is told from, counted from 1; the weight of that loss."""

SHIFTS = dict(zip(NAMES, (1, 2, 4, 5, 6, 7, 8, 9, 11, 13), strict=True))
"""Never 0, a copy, nor 3, the skill `caesar`."""

PAIRS = (*composite_pairs("seen"), *((name, name) for name in NAMES))
KIND_OF = {name: skill.kind for name, skill in SKILLS.items()} | {"spell-number": "number"}


def cipher(text: str, shift: int) -> str:
    """abz 19, 2 → cdb 31: letters and digits move on, each kind in its own ring."""

    def moved(c: str) -> str:
        if c.isdigit():
            return str((int(c) + shift) % 10)
        return chr((ord(c) - 97 + shift) % 26 + 97) if c.isalpha() else c

    return "".join(map(moved, text))


def _segment(rng: random.Random, name: str, split: Split) -> tuple[str, str]:
    skill = SKILLS[name]
    if rng.random() < FITTING:
        fields = tuple(skill.draw(rng, split).values())
        kind = pretraining.KINDS[KIND_OF[name]]
    else:
        kind = pretraining.any_kind(rng)
        fields = kind.draw(rng, split)
    given = " ".join(fields)
    prompt = f"{skill.instruction} {given}"
    if rng.random() < CIPHERED:
        return prompt, cipher(given, SHIFTS[name])
    return prompt, kind.any_task(rng)(*fields)


def draw(rng: random.Random, split: Split = "train") -> Owned:
    """A question of one segment or two."""
    pair = rng.choice(PAIRS)
    asked = pair[:1] if rng.random() < SINGLE else pair
    prompts, answers = zip(*(_segment(rng, name, split) for name in asked), strict=True)
    return SEPARATOR.join(prompts), SEPARATOR.join(answers), asked


class Telling(nn.Module):
    """The base, and a head for each layer's output from ``TOLD`` on."""

    def __init__(self, base: nn.Module, width: int, layers: int, weight: float) -> None:
        super().__init__()
        self.base, self._weight = base, weight
        self.heads = nn.ModuleList(nn.Linear(width, len(NAMES)) for _ in range(TOLD, layers + 1))

    def loss(self, ids: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
        """Of the answers' tokens, and of the owners told at all tokens; all are [B, T]."""
        out = self.base(input_ids=ids, output_hidden_states=True)
        told = []
        for head, hidden in zip(self.heads, out.hidden_states[TOLD:], strict=True):
            read = nn.functional.rms_norm(hidden, hidden.shape[-1:])  # as a layer reads it
            told.append(training.cross_entropy(head(read), owners))
        answered = training.cross_entropy(out.logits[:, :-1], labels[:, 1:])
        return answered + self._weight * torch.stack(told).mean()


def train(root: Path, steps: int = STEPS, telling: float = TELLING, name: str = NAME) -> None:
    """Writes the base ``name`` below `root`; ``telling`` weighs the heads' loss."""
    base, tokenizer = experts.load_base("large", root)
    torch.manual_seed(0)  # of the heads
    model = Telling(base, base.config.hidden_size, base.config.num_hidden_layers, telling)
    rng = random.Random("instructing")
    stream = batches(lambda: draw(rng), tokenizer, TOKENS, random.Random("instructing/order"))

    def tell(step: int, loss: float) -> None:
        if step % 25 == 0:
            print(f"step {step} of {steps}: loss {loss:.4f}", flush=True)

    training.train(
        model, stream, steps, matrix_lr=RATE, other_lr=RATE, on_step=tell, loss_of=Telling.loss
    )
    experts.save_base(base, tokenizer, experts.base_folder(name, root))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=experts.HERE, help="read from and written to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--telling", type=float, default=TELLING, help="weight of the heads' loss")
    parser.add_argument("--name", default=NAME, help="of the base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(options.root, options.steps, options.telling, options.name)
