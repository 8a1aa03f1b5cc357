"""The `devices:` block, and where servers stand on them. Moves nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from composer.registry.blocks import Block, Place, block_at, block_named, unknown_name, validate
from composer.registry.context import Context
from composer.registry.specs import DeviceSpec, PlacementSpec
from composer.types import Device, Placement


def make_devices(context: Context, entries: Mapping[str, Any]) -> dict[str, Device]:
    """Those devices that are right, by id; the problems of the others go to the context."""
    devices = {}
    for id_, data in entries.items():
        place = Place(context.file, ("devices", id_))
        block, problems = block_named(place, id_, data)
        context.problems += problems
        if block is None:
            continue
        spec, problems = validate(DeviceSpec, block)
        context.problems += problems
        if spec is not None:
            devices[id_] = Device(id_, spec.memory_gb)
    return devices


def make_placement(
    context: Context, server: Block, devices: Mapping[str, Device], named: Collection[str]
) -> tuple[Placement | None, bool]:
    """The server's placement, and whether it is as it should be: None, True where it has none.
    `named` are the devices of the file, those included that are wrong themselves."""
    written = server.data.get("placement")
    if written is None:
        return None, True
    block, problems = block_at(server.at(("placement",)), written)
    context.problems += problems
    if block is None:
        return None, False
    spec, problems = validate(PlacementSpec, block)
    context.problems += problems
    if spec is None:
        return None, False
    device = devices.get(spec.device)
    if device is None:
        if spec.device not in named:
            message, remedy = unknown_name("device", spec.device, list(named))
            context.problems.append(block.problem(("device",), message, remedy))
        return None, False
    if spec.memory_gb > device.memory_gb:
        message = f"{spec.memory_gb:g} GB exceed the {device.memory_gb:g} GB of {spec.device!r}"
        remedy = "Lower what the server takes, or name a larger device."
        context.problems.append(block.problem(("memory_gb",), message, remedy))
        return None, False
    return Placement(**spec.model_dump()), True
