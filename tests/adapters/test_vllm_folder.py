"""Model folders that vLLM serves a gate from: what is in them, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from composer.adapters.base_model import INDEX
from composer.adapters.gates.files import Manifest, read_gate
from composer.adapters.gates.vllm_folder import write_vllm_folder
from composer.cli import app
from composer.errors import AdapterError
from examples.tiny.experts import base_folder
from tests.vllm_gates import BASE, folder_of, tiny_gate

SKILLS = ("reverse", "add", "caesar")


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tiny_gate("phatgoose", SKILLS), tmp_path_factory.mktemp("gates") / "gate")


def test_a_folder_is_the_base_with_the_gate_in_its_config(gate: Path, tmp_path: Path) -> None:
    base, folder = base_folder("large"), tmp_path / "out" / "gated"
    made = write_vllm_folder(gate, base, folder, base_name=BASE)
    assert (made.built, made.members) == (True, SKILLS)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GatedLlamaForCausalLM"]
    told = Manifest.model_validate(config["gated_adapter"])
    assert told.digest == made.digest == read_gate(folder / "gate").manifest.digest
    assert [member.name for member in told.members] == list(SKILLS)
    assert told.modules["model.layers.0.mlp.up_proj"].ranks == (8, 8, 8)
    rest = {k: v for k, v in config.items() if k not in ("architectures", "gated_adapter")}
    own = json.loads((base / "config.json").read_text())
    assert rest == {k: v for k, v in own.items() if k != "architectures"}
    assert (folder / "model.safetensors").samefile(base / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
        assert not (folder / name).samefile(base / name)
    assert [file.name for file in folder.parent.iterdir()] == ["gated"]  # nothing half-written


def test_the_same_again_is_found_and_anything_else_refused(gate: Path, tmp_path: Path) -> None:
    base, folder = base_folder("large"), tmp_path / "gated"
    write_vllm_folder(gate, base, folder, base_name=BASE)
    again = write_vllm_folder(gate, base, folder, base_name=BASE)
    assert not again.built
    other = folder_of(tiny_gate("arrow", SKILLS), tmp_path / "arrow")
    with pytest.raises(AdapterError, match=r"something else.*Remove it"):
        write_vllm_folder(other, base, folder, base_name=BASE)
    assert read_gate(folder / "gate").manifest.kind == "phatgoose"
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterError, match="something else"):
        write_vllm_folder(gate, base, folder, base_name=BASE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("passes", 2, "two passes.*embedded"), ("per_request", True, "of the request.*phatgoose")],
)
def test_what_vllm_cannot_give_is_refused(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    gate = folder_of(tiny_gate("phatgoose", SKILLS, **{field: value}), tmp_path / "gate")
    with pytest.raises(AdapterError, match=message):
        write_vllm_folder(gate, base_folder("large"), tmp_path / "out", base_name=BASE)
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(gate: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"the gate is for 'composer/tiny-large'.*--model-name"):
        write_vllm_folder(gate, base_folder("small"), tmp_path / "out")
    with pytest.raises(AdapterError, match="linear layer"):
        write_vllm_folder(gate, base_folder("small"), tmp_path / "out", base_name=BASE)


def copied_base(path: Path, **config: object) -> Path:
    shutil.copytree(base_folder("large"), path)
    own = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(own | config))
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"]}, "no decoder-only language model"),
        ({"quantization_config": {"bits": 4}}, "never tested"),
        ({"architectures": ["GatedLlamaForCausalLM"], "gated_adapter": {}}, "has a gate already"),
    ],
)
def test_a_base_that_no_gate_is_put_on(
    gate: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    base = copied_base(tmp_path / "base", **config)
    with pytest.raises(AdapterError, match=message):
        write_vllm_folder(gate, base, tmp_path / "out", base_name=BASE)


def test_of_a_base_only_what_vllm_reads_is_taken(gate: Path, tmp_path: Path) -> None:
    base = copied_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    half = len(tensors) // 2
    names = list(tensors)
    files = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, base / file)
    index = {name: file for file, own in files.items() for name in own}
    (base / INDEX).write_text(json.dumps({"weight_map": index}))
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    (base / "consolidated.safetensors").write_bytes(b"")
    write_vllm_folder(gate, base, tmp_path / "out", base_name=BASE)
    weights = {file.name for file in (tmp_path / "out").iterdir() if "safetensors" in file.name}
    assert weights == {"a.safetensors", "b.safetensors", INDEX}
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_the_command_makes_one(gate: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "gated", str(base_folder("large"))
    args = ["compose", "--gate", str(gate), "--model", base, "--out", str(folder)]
    refused = CliRunner().invoke(app, args)
    assert (refused.exit_code, folder.exists()) == (2, False)
    assert "--model-name" in refused.output
    args += ["--model-name", BASE]
    made = CliRunner().invoke(app, args)
    assert made.output == f"{folder}: GatedLlamaForCausalLM of 3 members; made\n"
    told = json.loads(CliRunner().invoke(app, [*args, "--json"]).output)
    assert (told["built"], told["members"]) == (False, list(SKILLS))
    for more in (["--method", "svd"], ["--max-rank", "8"], ["an-adapter"]):
        both = CliRunner().invoke(app, [*args, *more])
        assert both.exit_code == 1
        assert "with nothing else" in both.output
