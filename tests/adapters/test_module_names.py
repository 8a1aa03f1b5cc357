"""What module names of several families of decoders say of their layers."""

from __future__ import annotations

import pytest

from composer.adapters.module_names import Place, layer_of, place_of


@pytest.mark.parametrize(
    ("module", "layer", "place"),
    [
        ("model.layers.3.self_attn.q_proj", 3, Place(3, "self_attn.", "q_proj")),
        ("transformer.h.11.c_fc", 11, Place(11, "", "c_fc")),
        ("model.layers.0.mlp.experts.7.down_proj", 0, None),
        ("layers.2.q_proj", 2, None),  # peft wants two names before the number
        ("lm_head", None, None),
        ("model.norm2.weight", None, None),
    ],
)
def test_layer_and_place(module: str, layer: int | None, place: Place | None) -> None:
    assert (layer_of(module), place_of(module)) == (layer, place)
