"""`composer compose`: adapters into one adapter, without a registry."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from composer.adapters.recipe import Member, Recipe, read_recipe
from composer.assignments import assigned
from composer.commands.console import fail, read_settings
from composer.errors import ComposerError, SettingsError


def compose(
    into: Annotated[
        Path, typer.Option("--out", help="The composed adapter becomes a folder below this one.")
    ],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of LoRA adapters of one base.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A file that says it all, as `composition:` in experts.yaml."),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each adapter, in their order; default: equal shares of 1."),
    ] = None,
    subtract: Annotated[
        Path | None,
        typer.Option(help="A general adapter, of which every member is rid first, exactly."),
    ] = None,
    method: Annotated[str, typer.Option(help="cat, svd, arithmetic, lego or twin.")] = "cat",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, such as rank=8; repeat for several."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The server's max_lora_rank; more is truncated.")
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(help="A gate's folder instead of adapters: --out becomes a model for vLLM."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="With --gate, the folder of the gate's base model.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="With --gate, what else that model is called.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compose LoRA adapters into one that any engine serves, with the recipe beside it; or a gate
    and its base model into a model that vLLM with composer's plugin serves."""
    read_settings()
    if gate is not None or model is not None or model_name is not None:
        others = adapters or recipe or weight or subtract or setting or max_rank or method != "cat"
        _compose_gate(gate, model, model_name, into, as_json, alone=not others)
        return
    from composer.adapters.compose import compose as build

    try:
        if (recipe is None) == (not adapters):
            raise SettingsError("name folders of adapters, or a --recipe, and not both")
        if recipe is not None:
            if weight or setting or subtract or max_rank or method != "cat":
                raise SettingsError("a --recipe says all but --out; write the rest into it")
            asked = read_recipe(recipe)
        else:
            asked = Recipe(
                _members(adapters or [], weight),
                method,
                _assigned(setting or []),
                max_rank=max_rank,
                subtract=None if subtract is None else Member(subtract.name, subtract),
            )
        made = build(asked, into)
    except ComposerError as error:
        fail(error)
    except OSError as error:
        _fail_unwritten(into, error)
    if as_json:
        told = {"folder": str(made.folder), "rank": made.rank, "needed": made.needed}
        more = {"energy": made.energy, "report": dict(made.report), "built": made.built}
        print(json.dumps(told | more | {"seconds": round(made.seconds, 3)}))
        return
    cut = f", truncated from {made.needed}" if made.needed > made.rank else ""
    cut += (
        f", keeping at least {made.energy:.1%} of each module's squared norm"
        if made.energy < 1
        else ""
    )
    done = f"made in {made.seconds:.2f} s" if made.built else "was there already"
    print(f"{made.folder}: rank {made.rank}{cut}; {done}")


def _compose_gate(
    gate: Path | None,
    model: Path | None,
    model_name: str | None,
    into: Path,
    as_json: bool,
    *,
    alone: bool,
) -> None:
    from composer.adapters.gates.vllm_folder import write_vllm_folder

    try:
        if gate is None or model is None or not alone:
            raise SettingsError("--gate, --model and --out go together, and with nothing else")
        made = write_vllm_folder(gate, model, into, base_name=model_name)
    except ComposerError as error:
        fail(error)
    except OSError as error:
        _fail_unwritten(into, error)
    if as_json:
        print(json.dumps(asdict(made) | {"folder": str(made.folder)}))
        return
    done = "made" if made.built else "was there already"
    if made.copied > 2**20:
        done += f", {made.copied / 2**30:.2f} GiB copied, since they could not be linked"
    print(f"{made.folder}: {made.architecture} of {len(made.members)} members; {done}")


def _fail_unwritten(into: Path, error: OSError) -> NoReturn:
    fail(
        SettingsError(
            f"nothing was made below {into}: {error}; give --out a folder that can be written and "
            "has room"
        )
    )


def _members(adapters: list[Path], weights: list[float] | None) -> tuple[Member, ...]:
    shares = weights or [1 / len(adapters)] * len(adapters)
    if len(shares) != len(adapters):
        raise SettingsError(
            f"{len(shares)} weights for {len(adapters)} adapters; give one for each, or none"
        )
    both = zip(adapters, shares, strict=True)
    return tuple(Member(folder.name, folder, share) for folder, share in both)


def _assigned(settings: list[str]) -> dict[str, Any]:
    try:
        return assigned(settings)
    except ValueError as error:
        raise SettingsError(f"--set {error}") from error
