"""Adapters that must not be served: each is refused with the file, the field and the remedy.

The messages stand here as people read them; TMP is the folder of the test.
"""

# ruff: noqa: E501  (messages are one line each, as they are printed)

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer.adapters.base_model import read_base_model
from composer.adapters.verify import verify_adapter
from composer.errors import AdapterError
from tests.registry.world import (
    BASE_NAME,
    WIDTH,
    adapter_config,
    adapter_tensors,
    write_adapter,
    write_base,
)

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
SECOND = "base_model.model.model.layers.1.self_attn.v_proj"

Break = Callable[[Path], dict[str, Any] | None]
"""Writes the broken adapter into a folder; returns further arguments of `verify_adapter`."""

BROKEN: dict[str, tuple[Break, list[str]]] = {}


def refused(*says: str) -> Callable[[Break], Break]:
    def add(write: Break) -> Break:
        BROKEN[write.__name__] = (write, list(says))
        return write

    return add


def configured(folder: Path, **changes: Any) -> None:
    write_adapter(folder, adapter_config(**changes))


@refused(
    "TMP/allowed/fox/adapter_config.json: base_model_name_or_path: it was trained on 'acme/other-llama', the server's model is 'acme/tiny-llama' or 'base'. Name the server of its own base; if only the name differs, correct it here.",
)
def wrong_base(folder: Path) -> None:
    configured(folder, base_model_name_or_path="acme/other-llama")


@refused(
    "TMP/allowed/fox/adapter_config.json: base_model_name_or_path: it does not say which base model it was trained on. Write the name of its base there; the server's is 'acme/tiny-llama'.",
)
def base_not_named(folder: Path) -> None:
    configured(folder, base_model_name_or_path=None)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: it fits a layer of width 16, the base's is 8 wide. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: it fits a layer of width 16, the base's is 8 wide. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight: it fits a layer of width 16, the base's is 8 wide. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: and 5 more like these. It belongs to another base model: name that one's server.",
)
def base_of_another_width(folder: Path) -> None:
    write_adapter(folder, tensors=adapter_tensors(width=2 * WIDTH))


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight: the base model has no module model.layers.7.self_attn.q_proj. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight: the base model has no module model.layers.7.self_attn.q_proj. It belongs to another base model: name that one's server.",
)
def module_the_base_does_not_have(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors[FIRST.replace("0", "7") + ".lora_A.weight"] = tensors[FIRST + ".lora_A.weight"]
    tensors[FIRST.replace("0", "7") + ".lora_B.weight"] = tensors[FIRST + ".lora_B.weight"]
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: its rank is 2, adapter_config.json says 4. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: its rank is 2, adapter_config.json says 4. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight: its rank is 2, adapter_config.json says 4. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: and 5 more like these. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
)
def wrong_rank(folder: Path) -> None:
    write_adapter(folder, adapter_config(r=4))


@refused(
    "TMP/allowed/fox/adapter_config.json: r: rank 2 exceeds the server's 1. Raise the server's `max_lora_rank`, or train the adapter at a lower rank.",
)
def rank_above_the_servers(folder: Path) -> dict[str, Any]:
    write_adapter(folder)
    return {"max_rank": 1}


@refused(
    "TMP/allowed/fox/adapter_config.json: r: the rank is '8'. Give a whole number from 1 to 4096.",
    "TMP/allowed/fox/adapter_config.json: lora_alpha: alpha is inf. Give a finite number above 0.",
)
def rank_is_no_number(folder: Path) -> None:
    configured(folder, r="8", lora_alpha=float("inf"))


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: model.layers.0.self_attn.q_proj: its lora_B tensor is missing. Save the adapter again from its training checkpoint.",
)
def missing_factor(folder: Path) -> None:
    tensors = adapter_tensors()
    del tensors[FIRST + ".lora_B.weight"]
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: model.layers.1.self_attn.v_proj: adapter_config.json targets it, but its tensors are missing. Save the adapter again from its training checkpoint.",
)
def missing_layer(folder: Path) -> None:
    tensors = adapter_tensors()
    del tensors[SECOND + ".lora_A.weight"], tensors[SECOND + ".lora_B.weight"]
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: model.layers.0.self_attn.v_proj: adapter_config.json does not target it. Correct `target_modules`: peft would leave these tensors out.",
    "TMP/allowed/fox/adapter_model.safetensors: model.layers.1.self_attn.v_proj: adapter_config.json does not target it. Correct `target_modules`: peft would leave these tensors out.",
)
def module_that_is_not_targeted(folder: Path) -> None:
    configured(folder, target_modules=["q_proj"])


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: it holds NaN or infinity. Its training diverged; use an earlier checkpoint.",
)
def nan(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors[FIRST + ".lora_A.weight"][1, 3] = np.nan
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight: it holds NaN or infinity. Its training diverged; use an earlier checkpoint.",
)
def infinity_in_half_precision(folder: Path) -> None:
    tensors = {name: value.astype(np.float16) for name, value in adapter_tensors().items()}
    tensors[SECOND + ".lora_B.weight"][0, 0] = -np.inf
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: type I8 is none of BF16, F16, F32. Save the adapter again as float32, float16 or bfloat16.",
)
def whole_numbers(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors[FIRST + ".lora_A.weight"] = tensors[FIRST + ".lora_A.weight"].astype(np.int8)
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_model.bin: the weights are pickled, and loading a pickle runs the code in it. Convert it where you trust it, by safetensors.torch.save_file, to adapter_model.safetensors.",
)
def pickle_in_place_of_safetensors(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: the file is damaged: header too large. Copy it again from its source.",
)
def pickle_renamed_to_safetensors(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"a": list(range(99))}))


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: the file is damaged: incomplete metadata, file not fully covered. Copy it again from its source.",
)
def truncated(folder: Path) -> None:
    write_adapter(folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: the file is damaged: invalid header length. Copy it again from its source.",
)
def truncated_within_the_header(folder: Path) -> None:
    write_adapter(folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@refused(
    "TMP/allowed/fox: adapter_model.safetensors is missing. Save the adapter with peft's `save_pretrained(..., safe_serialization=True)`.",
)
def no_weights(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()


@refused(
    "TMP/allowed/fox: adapter_config.json is missing. Save the adapter with peft's `save_pretrained`, which writes it.",
)
def no_config(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_config.json").unlink()


@refused(
    "TMP/allowed/fox/adapter_config.json: it is not readable JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). Save the adapter again with peft.",
)
def config_is_no_json(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_config.json").write_text("{'r': 8}")


@refused(
    "TMP/allowed/fox/adapter_config.json: it is not a JSON object. Save the adapter again with peft.",
)
def config_is_a_list(folder: Path) -> None:
    write_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")


@refused(
    "TMP/allowed/fox: this is not a folder. Name the folder that holds adapter_config.json and adapter_model.safetensors.",
)
def a_file_in_place_of_the_folder(folder: Path) -> None:
    folder.write_text("")


@refused(
    "TMP/allowed/fox: its digest is sha256:fdfa2aca984a30c0facd460736826b483a422e2e9d5fd31e9b6c14827b14d826, not the pinned sha256:0000000000000000000000000000000000000000000000000000000000000000. Restore the pinned files; if the change is meant, pin the new digest.",
)
def digest_mismatch(folder: Path) -> dict[str, Any]:
    write_adapter(folder)
    return {"digest": "sha256:" + "0" * 64}


@refused(
    "TMP/allowed/fox: it lies outside the allowed folders (TMP/allowed/elsewhere). Move it into an allowed folder, or add its folder to COMPOSER_ADAPTER_ROOTS.",
)
def path_outside_the_allowed_folder(folder: Path) -> dict[str, Any]:
    write_adapter(folder)
    return {"roots": [folder.parent / "elsewhere"]}


@refused(
    "TMP/allowed/fox: it leads to TMP/outside, outside the allowed folders (TMP/allowed). Move it into an allowed folder, or add its folder to COMPOSER_ADAPTER_ROOTS.",
)
def folder_is_a_symlink_out(folder: Path) -> dict[str, Any]:
    outside = folder.parent.parent / "outside"
    write_adapter(outside)
    folder.symlink_to(outside)
    return {"roots": [folder.parent]}


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: it leads to TMP/outside/adapter_model.safetensors, outside the allowed folders (TMP/allowed). Move it into an allowed folder, or add its folder to COMPOSER_ADAPTER_ROOTS.",
)
def weights_are_a_symlink_out(folder: Path) -> dict[str, Any]:
    outside = folder.parent.parent / "outside"
    write_adapter(outside)
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    return {"roots": [folder.parent]}


@refused(
    "TMP/allowed/fox/adapter_config.json: use_dora: DoRA rescales the base weights, which adapters that share a base cannot. Train it again without, or merge it into a copy of the base model and serve that.",
)
def dora(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors[FIRST + ".lora_magnitude_vector"] = np.ones(WIDTH, np.float32)
    write_adapter(folder, adapter_config(use_dora=True), tensors)


@refused(
    "TMP/allowed/fox/adapter_config.json: modules_to_save: whole modules saved beside the adapter would replace the base's. Train it again without, or merge it into a copy of the base model and serve that.",
)
def modules_to_save(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors["base_model.model.lm_head.weight"] = np.ones((16, WIDTH), np.float32)
    write_adapter(folder, adapter_config(modules_to_save=["lm_head"]), tensors)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.lm_head.weight: this tensor is not a LoRA factor. Save the adapter with peft's `save_pretrained`, without other modules.",
)
def tensor_that_is_no_factor(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors["base_model.model.lm_head.weight"] = np.ones((16, WIDTH), np.float32)
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_config.json: bias: trained biases would change the shared base. Train it again without, or merge it into a copy of the base model and serve that.",
)
def trained_bias(folder: Path) -> None:
    configured(folder, bias="lora_only")


@refused(
    "TMP/allowed/fox/adapter_config.json: rank_pattern: this server's engine needs one rank and alpha for all modules. Train it again without, or serve it on an engine that can.",
    "TMP/allowed/fox/adapter_config.json: alpha_pattern: this server's engine needs one rank and alpha for all modules. Train it again without, or serve it on an engine that can.",
)
def rank_pattern(folder: Path) -> None:
    configured(folder, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 8})


@refused(
    "TMP/allowed/fox/adapter_config.json: init_lora_weights: 'pissa_niter_4' also moved the base weights. Convert it with peft's `save_pretrained(path_initial_model_for_weight_conversion=…)`.",
)
def pissa(folder: Path) -> None:
    configured(folder, init_lora_weights="pissa_niter_4")


@refused(
    "TMP/allowed/fox/adapter_config.json: peft_type: 'PREFIX_TUNING' is not LoRA. Only LoRA adapters are served; train one.",
)
def not_lora(folder: Path) -> None:
    configured(folder, peft_type="PREFIX_TUNING")


@refused(
    "TMP/allowed/fox/adapter_config.json: use_quantum: this setting is not known here, so the adapter might not compute what it should. Remove it if it matters to training alone.",
)
def setting_not_known_here(folder: Path) -> None:
    configured(folder, use_quantum=True)


@refused(
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: its shape (2, 8, 1, 1) is no matrix. Only LoRA on matrices is served; train it on the linear layers.",
)
def convolution(folder: Path) -> None:
    tensors = adapter_tensors()
    tensors[FIRST + ".lora_A.weight"] = np.ones((2, WIDTH, 1, 1), np.float32)
    write_adapter(folder, tensors=tensors)


@refused(
    "TMP/allowed/fox/adapter_config.json: use_dora: DoRA rescales the base weights, which adapters that share a base cannot. Train it again without, or merge it into a copy of the base model and serve that.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: it holds NaN or infinity. Its training diverged; use an earlier checkpoint.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: it holds NaN or infinity. Its training diverged; use an earlier checkpoint.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight: it holds NaN or infinity. Its training diverged; use an earlier checkpoint.",
    "TMP/allowed/fox/adapter_model.safetensors: and 5 more like these. Its training diverged; use an earlier checkpoint.",
    "TMP/allowed/fox/adapter_config.json: r: rank 2 exceeds the server's 1. Raise the server's `max_lora_rank`, or train the adapter at a lower rank.",
    "TMP/allowed/fox/adapter_config.json: base_model_name_or_path: it was trained on 'x/y', the server's model is 'acme/tiny-llama' or 'base'. Name the server of its own base; if only the name differs, correct it here.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: its rank is 4, adapter_config.json says 2. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: its rank is 4, adapter_config.json says 2. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight: its rank is 4, adapter_config.json says 2. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: and 5 more like these. Set `r` in adapter_config.json to the rank it was trained at, or save it again.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: it fits a layer of width 4, the base's is 8 wide. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight: it fits a layer of width 4, the base's is 8 wide. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight: it fits a layer of width 4, the base's is 8 wide. It belongs to another base model: name that one's server.",
    "TMP/allowed/fox/adapter_model.safetensors: and 5 more like these. It belongs to another base model: name that one's server.",
)
def everything_at_once(folder: Path) -> dict[str, Any]:
    tensors = adapter_tensors(rank=4, width=4)
    for tensor in tensors.values():
        tensor[0, 0] = np.nan
    write_adapter(folder, adapter_config(base_model_name_or_path="x/y", use_dora=True), tensors)
    return {"max_rank": 1}


@pytest.mark.parametrize("name", BROKEN)
def test_is_refused_with_place_and_remedy(name: str, tmp_path: Path) -> None:
    write, says = BROKEN[name]
    write_base(tmp_path / "base")
    (tmp_path / "allowed").mkdir()
    folder = tmp_path / "allowed" / "fox"
    arguments: dict[str, Any] = {"roots": [tmp_path], **(write(folder) or {})}
    base = read_base_model(tmp_path / "base", [BASE_NAME])

    with pytest.raises(AdapterError) as refusal:
        verify_adapter(folder, base, **arguments)
    said = [str(problem).replace(str(tmp_path), "TMP") for problem in refusal.value.problems]
    assert said == says
