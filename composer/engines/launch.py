"""What experts.yaml says of how a server of ours is started. Pure; knows nothing of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

Value = bool | int | float | str | tuple[str | int | float, ...]


class Restarts(BaseModel):
    """Pauses before a server that died is started again, in seconds: `first_s`, doubled each
    time up to `most_s`, and `first_s` again once it has been healthy for `healthy_s`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_s: float = Field(1.0, gt=0, description="Seconds before the first restart.")
    most_s: float = Field(60.0, gt=0, description="Most seconds before a restart.")
    healthy_s: float = Field(
        300.0, gt=0, description="Seconds of health after which a death counts as the first."
    )


class Launch(BaseModel):
    """How to start a server of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str | None = Field(
        None, description="The interpreter of the server's own environment; default: ours."
    )
    args: Mapping[str, Value] = Field(
        default_factory=dict,
        description="Its flags: `dtype: bfloat16` is --dtype bfloat16, true a bare flag, false "
        "--no-…, a list several values. The server itself checks them, at its start.",
    )
    env: Mapping[str, str] = Field(
        default_factory=dict, description="Environment variables, beside our own."
    )
    devices: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Indices of the GPUs that it sees (CUDA_VISIBLE_DEVICES); default: all."
    )
    port: int | None = Field(
        None, ge=1, le=65535, description="Its port on 127.0.0.1; default: a free one."
    )
    start_timeout_s: float = Field(
        900.0, gt=0, description="How long it may take to be ready, in seconds."
    )
    stop_timeout_s: float = Field(
        30.0, gt=0, description="How long it may take to end before it is killed, in seconds."
    )
    log: Path | None = Field(
        None, description="What it writes; default: data/logs/<server>.log. The last 3 are kept."
    )
    restarts: Restarts = Restarts()

    @field_validator("args")
    @classmethod
    def _bare_names(cls, args: Mapping[str, Value]) -> Mapping[str, Value]:
        for name in args:
            if not name or name.startswith("-"):
                raise ValueError(f"{name!r} is no name of a flag; write it without its dashes")
        return args

    def flags(self) -> list[str]:
        """`args` as command-line flags, in their order."""
        flags: list[str] = []
        for name, value in self.args.items():
            flag = name.replace("_", "-")
            if value is True:
                flags.append(f"--{flag}")
            elif value is False:
                flags.append(f"--no-{flag}")
            elif isinstance(value, tuple):
                flags += [f"--{flag}", *map(str, value)]
            else:
                flags += [f"--{flag}", str(value)]
        return flags
