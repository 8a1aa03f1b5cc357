"""Arrow's prototypes: for each adapter the direction of the input that it moves most. Nothing is
trained."""

from __future__ import annotations

import torch
from torch import Tensor

from composer.adapters.factors import Factors
from composer.adapters.merging.truncation import spectrum


def prototype(factors: Factors) -> Tensor:
    """(d_in,) the first right singular vector of ΔW, float32 (Ostapenko et al., Towards Modular
    LLMs, arXiv 2405.11157, section 4.2). Its sign means nothing; here the largest number is
    positive, so that equal adapters give equal prototypes. Zeros where ΔW is 0."""
    _, sigma, vt = spectrum(factors)
    first = vt[0] if float(sigma[0]) > 0 else torch.zeros_like(vt[0])
    sign = torch.sign(first[first.abs().argmax()])
    return (first * torch.where(sign == 0, torch.ones_like(sign), sign)).float()
