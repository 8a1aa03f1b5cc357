"""What a composed adapter's folder tells of how it was made. Reads JSON alone, no tensors."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ValidationError

from composer.types import Composed, MemberShare

PROVENANCE = "composition.json"


class _Source(BaseModel):
    name: str
    digest: str
    weight: float = 1.0

    def share(self) -> MemberShare:
        return MemberShare(self.name, self.digest, self.weight)


class _Told(BaseModel):
    adapter: str
    method: str
    members: tuple[_Source, ...]
    subtract: _Source | None = None
    energy: float = 1.0


def made_of(folder: Path, adapter: str) -> Composed | None:
    """What the adapter of this digest in the folder was composed of. None where nothing says so,
    or says it of another: the adapter was then trained, or written over."""
    try:
        told = _Told.model_validate(json.loads((folder / PROVENANCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    if told.adapter != adapter:
        return None
    general = None if told.subtract is None else told.subtract.share()
    members = tuple(member.share() for member in told.members)
    return Composed(told.method, members, told.energy, general)
