"""Next tokens from logits, all rows at once. Knows nothing of calls, text or caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Knobs:
    """Per row: `temperature` (rows,), 0 for greedy; `top_p` (rows,) in [0, 1]; `uniform` (rows,)
    a number of [0, 1) that decides the row's draw.

    `uniform` is float64, as `random.random` draws it: float32 rounds its upper end to 1, which
    lies beyond the whole mass, where tokens of no probability are.
    """

    temperature: Tensor
    top_p: Tensor
    uniform: Tensor


def sample(logits: Tensor, knobs: Knobs) -> Tensor:
    """Token ids (rows,) drawn from logits (rows, vocab), each row by its own knobs.

    A row's draw inverts its cumulative distribution at its own uniform number and touches no
    other row, so a seed gives the same token whatever else is in the batch (up to the rounding
    of the logits themselves).
    """
    tokens = logits.argmax(dim=-1)  # (rows,)
    warm = knobs.temperature > 0
    for rows, draw in (
        (warm & (knobs.top_p >= 1), _draw),
        (warm & (knobs.top_p < 1), _draw_nucleus),
    ):
        if not bool(rows.any()):
            continue
        scaled = logits[rows].double()
        scaled -= scaled.max(dim=-1, keepdim=True).values  # else small temperatures overflow
        probs = torch.softmax(scaled / knobs.temperature[rows, None], dim=-1)
        tokens[rows] = draw(probs, knobs.top_p[rows, None], knobs.uniform[rows, None])
    return tokens


def _draw(probs: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """probs (rows, vocab), uniform (rows, 1) → ids (rows,)."""
    cumulative = probs.cumsum(dim=-1)
    return _invert(cumulative, uniform * cumulative[:, -1:])


def _draw_nucleus(probs: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Within the smallest set of likeliest tokens whose mass reaches top_p (arXiv:1904.09751)."""
    probs, ids = probs.sort(dim=-1, descending=True, stable=True)  # (rows, vocab) both
    cumulative = probs.cumsum(dim=-1)
    kept = cumulative - probs < top_p
    kept[:, 0] = True
    mass = (probs * kept).cumsum(dim=-1)  # flat after the nucleus, so never drawn from there
    return ids.gather(1, _invert(mass, uniform * mass[:, -1:])[:, None])[:, 0]


def _invert(cumulative: Tensor, target: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds the target: tokens of no mass are never it."""
    index = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return index.clamp_(max=cumulative.shape[-1] - 1)


def top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the model's own distribution, before temperature and top_p: the chosen tokens'
    log-probabilities (rows,), the k largest (rows, k) and their ids (rows, k)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    best, ids = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
    return chosen, best, ids
