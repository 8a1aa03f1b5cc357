"""Questions as batches of tokens. Knows tokenizers and no model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from router_training.errors import TrainingError
from router_training.gates.questions import Question

IGNORED = -100
"""The label of a token that no loss is taken of, as torch's cross-entropy has it."""

POOL = 256
"""Questions sorted by length at a time, so that batches hold little padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """All (rows, columns): padded on the right, where a causal model needs no mask. `labels` are
    the answers' tokens alone; `real` is False on padding. `places` (rows,): which questions they
    are."""

    ids: Tensor
    labels: Tensor
    real: Tensor
    places: Tensor


Row = tuple[list[int], int]
"""The tokens of prompt and answer, and where the answer begins."""


def encoded(tokenizer: Any, questions: Sequence[Question], longest: int | None = None) -> list[Row]:
    """The prompt as the model's chat template writes it, else as it stands; the answer, and the end
    token. Raises TrainingError where one is longer than `longest` tokens."""
    rows = []
    for question in questions:
        if getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": question.prompt}]
            prompt = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            prompt = tokenizer(question.prompt)["input_ids"]
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*prompt, *answer, *end]
        if longest is not None and len(ids) > longest:
            raise TrainingError(
                f"the question {question.prompt[:60]!r} has {len(ids)} tokens with its answer, and "
                f"the model reads {longest}; shorten it, or leave it out"
            )
        rows.append((ids, len(prompt)))
    return rows


def batches(rows: Sequence[Row], tokens: int, seed: int, pad: int) -> Iterator[Batch]:
    """Without end: the rows in a new order each time round, in batches of at most `tokens` tokens
    with their padding (a longer row alone). The same arguments give the same batches."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(rows)), k=len(rows))
        for start in range(0, len(order), POOL):
            pool = sorted(order[start : start + POOL], key=lambda i: len(rows[i][0]))
            groups: list[list[int]] = [[]]
            for i in pool:
                if groups[-1] and (len(groups[-1]) + 1) * len(rows[i][0]) > tokens:
                    groups.append([])
                groups[-1].append(i)
            rng.shuffle(groups)
            for group in groups:
                yield padded(rows, group, pad)


def padded(all_rows: Sequence[Row], places: Sequence[int], pad: int) -> Batch:
    rows = [all_rows[i] for i in places]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full_like(ids, IGNORED)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
        real[i, : len(row)] = True
    return Batch(ids, labels, real, torch.tensor(places))
