"""LoRA for batches whose rows use different adapters, at a cost that hardly grows with it.

peft loads the adapters and owns their modules; given `adapter_names` it also runs mixed batches,
but by a loop over the adapters in every layer: eight adapters on the tiny base made a step five
times as long as none. Here each linear layer holds its adapters side by side in two tensors, and
each row takes its own pair by a gather, so that all rows go through two batched products. Layers
of other kinds (embeddings) stay with peft's loop. A test holds both equal.

Knows nothing of digests, files or calls: adapters are peft's names here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor
from torch.nn.functional import linear

BASE = "__base__"
"""peft's name for "no adapter" in a mixed batch."""


class MixedLora:
    """Puts the rows' adapters to work in every LoRA layer of a model.

    While it stands, no peft adapter is active by itself, so each layer's own forward is that of
    its base layer; what the adapters add comes from the hooks here.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the base's: adapters are often saved in another."""
        self._dtype = dtype
        self._names: Sequence[str] = ()
        self._slots = torch.zeros(0, dtype=torch.long)
        self._only: int | None = 0
        self._slot_of: dict[str, int] = {BASE: 0}
        self._hooks: list[Any] = []

    def attach(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        """To be called after adapters came or went; `names` are those now loaded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._slot_of = {name: slot for slot, name in enumerate((BASE, *names))}
        for module in model.modules():
            if isinstance(module, Linear) and not module.lora_variant:
                self._hooks.append(module.register_forward_hook(self._stacked(module)))
            elif isinstance(module, LoraLayer):
                hook = module.register_forward_pre_hook(self._name_rows, with_kwargs=True)
                self._hooks.append(hook)

    def assign(self, names: Sequence[str], device: torch.device) -> None:
        """The adapter of each row of the next forward, in row order."""
        slots = [self._slot_of[name] for name in names]
        self._names = names
        self._slots = torch.tensor(slots, device=device)
        self._only = slots[0] if len(set(slots)) == 1 else None

    def _name_rows(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, kwargs | {"adapter_names": self._names}

    def _stacked(self, layer: Any) -> Any:
        """The layer's forward hook. Moves its adapters' weights into the two tensors; what peft
        keeps are views of them, so nothing is held twice. Slot 0, the base, stays zero."""
        pairs = {
            self._slot_of[name]: (layer.lora_A[name].weight, layer.lora_B[name].weight)
            for name in layer.lora_A
        }
        if not pairs:
            return lambda module, args, output: None
        rank = max(a.shape[0] for a, _ in pairs.values())
        like, d_out = next((a, b.shape[0]) for a, b in pairs.values())
        slots = len(self._slot_of)
        like = like.data.to(self._dtype)
        down = like.new_zeros(slots, rank, like.shape[1])  # (slots, r, d_in)
        up = like.new_zeros(slots, d_out, rank)  # (slots, d_out, r)
        scale = like.new_zeros(slots)
        for name in layer.lora_A:
            slot = self._slot_of[name]
            a, b = pairs[slot]
            r = a.shape[0]
            down[slot, :r], up[slot, :, :r] = a.data, b.data
            scale[slot] = layer.scaling[name]
            a.data, b.data = down[slot, :r], up[slot, :, :r]

        def add(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._only == 0:
                return None
            x = args[0]  # (rows, new, d_in)
            if self._only is not None:
                inner = linear(x, down[self._only]) * scale[self._only]
                return output + linear(inner, up[self._only])
            if x.shape[0] != len(self._slots):
                raise ValueError(
                    f"a layer sees {x.shape[0]} rows of a batch of {len(self._slots)}: this "
                    "model regroups its rows, so they cannot use different adapters"
                )
            inner = torch.bmm(x, down[self._slots].mT) * scale[self._slots, None, None]
            return torch.baddbmm(output, inner, up[self._slots].mT)

        return add
