"""X-LoRA's classifier: from the last hidden state of a pass of the base alone to what every layer's
gate reads in the second pass. Knows no cache and no engine."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, relu

from composer.adapters.gates.files import Gate


def features(gate: Gate, hidden: Tensor) -> Tensor:
    """hidden (…, d_model), after the final norm → (…, f) in float32 (Buehler and Buehler, X-LoRA,
    arXiv 2402.07148, section 3). The inner layers of the classifier are the gate's own tensors
    `features.0.weight`, `features.0.bias` … with ReLU between; its last layer is cut by modules
    into the rows and biases of their gates, so that a module's weights are `layer.weights` of these
    features. Without inner layers the features are `hidden`."""
    out, number = hidden.float(), 0
    while (weight := gate.tensors.get(f"features.{number}.weight")) is not None:
        bias = gate.tensors.get(f"features.{number}.bias")
        out = relu(linear(out, weight.float(), None if bias is None else bias.float()))
        number += 1
    return out


def width(gate: Gate, d_model: int) -> int:
    """f. Raises ValueError where an inner layer does not fit what comes before it."""
    size, number = d_model, 0
    while (weight := gate.tensors.get(f"features.{number}.weight")) is not None:
        if weight.ndim != 2 or weight.shape[1] != size:
            raise ValueError(
                f"features.{number}.weight is {tuple(weight.shape)} and reads {size} numbers"
            )
        size, number = weight.shape[0], number + 1
    return size
