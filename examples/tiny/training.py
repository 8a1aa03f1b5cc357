"""Trains a base on pre-training text, or a LoRA adapter on one skill.

Knows batches, losses and optimisers; where examples come from is the caller's. Only the answer's
tokens count in the loss: the inputs are random and cannot be predicted. One thread per process,
so that a fixed seed gives the same weights on the same machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from examples.tiny.modeling import ANSWER, EOS

Example = tuple[str, str]  # prompt, answer
IGNORE = -100
_POOL = 4096  # examples sorted by length at a time, so that batches hold little padding


def batches(
    draw: Callable[[], Example],
    tokenizer: PreTrainedTokenizerFast,
    tokens: int,
    rng: random.Random,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids, labels) batches of about ``tokens`` tokens each, both of shape [B, T].

    Labels are ``IGNORE`` outside the answer and its end token. Rows are padded on the right,
    where a causal model needs no mask.
    """
    answer_id, pad_id = tokenizer.convert_tokens_to_ids(ANSWER), tokenizer.pad_token_id
    while True:
        texts = [
            f"{prompt}{ANSWER}{answer}{EOS}" for prompt, answer in (draw() for _ in range(_POOL))
        ]
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        groups: list[list[list[int]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            ids = torch.full((len(group), len(group[-1])), pad_id)
            labels = torch.full_like(ids, IGNORE)
            for i, row in enumerate(group):
                start = row.index(answer_id) + 1
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, start : len(row)] = ids[i, start : len(row)]
            yield ids, labels


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens; ids and labels are [B, T]."""
    return cross_entropy(model(input_ids=ids).logits[:, :-1], labels[:, 1:])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels [B, T] that are not ``IGNORE``; logits are [B, T, classes]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear decay over the last 40 %."""
    decay = steps * 0.6
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay else max(0.02, (steps - step) / (steps - decay))


def train(
    model: nn.Module,
    stream: Iterator[tuple[Tensor, ...]],
    steps: int,
    matrix_lr: float,
    other_lr: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    loss_of: Callable[..., Tensor] = loss_of,
) -> float:
    """Trains the parameters that require gradients for ``steps`` batches of ``stream``.

    Muon moves the matrices of full layers (its orthogonalised steps reach the same loss in about
    half the batches of AdamW here); AdamW moves embeddings, norms and the thin LoRA matrices.
    ``loss_of`` takes the model and a batch.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "lora_" not in n and "embed" not in n]
    others = [p for n, p in named if not any(p is m for m in matrices)]
    optimisers: list[torch.optim.Optimizer] = []
    if others:
        optimisers.append(
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0)
        )
    if matrices:
        optimisers.append(
            torch.optim.Muon(
                matrices, lr=matrix_lr, adjust_lr_fn="match_rms_adamw", weight_decay=0.01
            )
        )
    peaks = [group["lr"] for o in optimisers for group in o.param_groups]
    model.train()
    tail: list[float] = []
    for step in range(steps):
        factor = schedule(step, steps, warmup=min(100, steps // 10 + 1))
        for group, peak in zip((g for o in optimisers for g in o.param_groups), peaks, strict=True):
            group["lr"] = peak * factor
        loss = loss_of(model, *next(stream))
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {step}: lower the learning rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step >= steps * 0.9:
            tail.append(value)
        on_step(step, value)
    model.eval()
    return sum(tail) / len(tail)
