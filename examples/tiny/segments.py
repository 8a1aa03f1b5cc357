"""Questions of several skills as batches in which every token knows whose it is.

A token's *owner* is the skill of its segment. In a prompt a segment begins after the separator,
with its instruction, since nothing earlier tells which skill comes next; in an answer it begins
with the separator, from which its first token is said. Knows no base, no adapter and no gate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.tiny import training
from examples.tiny.modeling import ANSWER, EOS
from examples.tiny.tasks import SEPARATOR, SKILLS

NAMES = tuple(SKILLS)
POOL = 1024  # questions sorted by length at a time, so that batches hold little padding

Owned = tuple[str, str, tuple[str, ...]]  # prompt, answer, the skill of each segment


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that end a segment and a prompt."""

    separator: int
    answer: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Marks:
        """Those of ``tokenizer``."""
        vocabulary = tokenizer.get_vocab()
        return cls(vocabulary[SEPARATOR], vocabulary[ANSWER])

    def answering(self, ids: Tensor) -> Tensor:
        """[B, T] ids → [B, T] bool: from the answer's mark on."""
        return (ids == self.answer).cumsum(1) > 0

    def segments(self, ids: Tensor) -> Tensor:
        """[B, T] ids → [B, T] 0 or 1: the answer begins with the first segment again."""
        separators = (ids == self.separator).long()
        so_far = separators.cumsum(1)
        in_prompt = (separators * ~self.answering(ids)).sum(1, keepdim=True)
        return torch.where(self.answering(ids), so_far - in_prompt, so_far - separators).clamp(
            max=1
        )


def batches(
    draw: Callable[[], Owned], tokenizer: PreTrainedTokenizerFast, tokens: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (ids, labels, owners) of about ``tokens`` tokens each, all [B, T].

    Labels are ``training.IGNORE`` outside the answer and its end token; owners, places in
    ``NAMES``, on padding. Questions have one segment or two.
    """
    marks = Marks.of(tokenizer)
    while True:
        drawn = [draw() for _ in range(POOL)]
        texts = [f"{prompt}{ANSWER}{answer}{EOS}" for prompt, answer, _ in drawn]
        rows = [
            (ids, [NAMES.index(name) for name in (skills * 2)[:2]])
            for ids, (_, _, skills) in zip(tokenizer(texts)["input_ids"], drawn, strict=True)
        ]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            ids = torch.full((len(group), len(group[-1][0])), tokenizer.pad_token_id)
            labels = torch.full_like(ids, training.IGNORE)
            skills = torch.tensor([own for _, own in group])
            for i, (row_ids, _) in enumerate(group):
                start = row_ids.index(marks.answer) + 1
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                labels[i, start : len(row_ids)] = ids[i, start : len(row_ids)]
            owners = skills.gather(1, marks.segments(ids))
            yield ids, labels, owners.masked_fill(ids == tokenizer.pad_token_id, training.IGNORE)
