"""Exact match of a base or an expert on given items: plain greedy decoding, batched, float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from examples.tiny.modeling import ANSWER, EOS

MAX_NEW_TOKENS = 64


@torch.inference_mode()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    batch_size: int = 128,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """The greedy answer to each prompt, without its end token, in the prompts' order."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] + ANSWER for i in chosen], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for i, row in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            # An end token is a special token, so cutting the text there is exact.
            answers[i] = tokenizer.decode(row).split(EOS)[0]
    return [answers[i] for i in range(len(prompts))]


def exact_match(answers: Sequence[str], right: Sequence[str]) -> float:
    """Share of answers that equal the right one, 0 to 1.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    if not right:
        raise ValueError("no items to score: sample at least one")
    return sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)
