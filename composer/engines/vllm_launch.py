"""What experts.yaml says of a vLLM server, and the command line that starts one. Pure."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Mapping
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from composer.engines.http import Seconds, Timeouts
from composer.engines.launch import Launch
from composer.engines.openai import base_url
from composer.types import Placement

LoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The ranks that vLLM has room for."""

OURS: Mapping[str, str] = {
    "model": "write it as the server's `model`",
    "revision": "write it as the server's `revision`",
    "served_model_name": "write it as the server's `served_name`",
    "max_model_len": "write it as the server's `context_window`",
    "enable_lora": "write `max_loras` as a setting of the server",
    "max_loras": "write it as a setting of the server",
    "max_cpu_loras": "write it as a setting of the server",
    "max_lora_rank": "write it as a setting of the server",
    "enable_sleep_mode": "write `sleep_level` in the server's `placement`",
    "host": "a server of ours listens on 127.0.0.1",
    "port": "write it as the launch's `port`",
    "api_key": "leave it out: a server of ours gets a random key",
    "lora_modules": "leave it out: adapters are loaded as experts name them",
}
"""Flags that are not to be given as such, and what to do instead."""


class VllmSettings(BaseModel):
    """A vLLM server: one of ours, started as `launch` says, or somebody else's at `url`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        None, description="Somebody else's server, such as http://127.0.0.1:8000/v1."
    )
    launch: Launch | None = Field(None, description="How to start a server of ours.")
    model: str | None = Field(
        None, description="Its weights: a folder, or a Hugging Face hub name. A launch needs it."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a hub model.")
    model_name: str | None = Field(
        None, description="The base model's name in adapters' configs, where it is another."
    )
    served_name: str | None = Field(
        None, description="What the server calls its base model; default: it is asked."
    )
    api_key_env: str | None = Field(
        None,
        description="The environment variable that holds the key of somebody else's server.",
    )
    in_flight: int = Field(64, ge=1, le=4096, description="Calls that run there at once.")
    queue: int = Field(256, ge=0, description="Calls waiting before new ones are refused (503).")
    max_loras: int | None = Field(
        None,
        ge=1,
        description="Distinct adapters in one batch, as the server was or will be started with; "
        "default: a launched server takes no adapters.",
    )
    max_cpu_loras: int | None = Field(
        None, ge=1, description="Adapters it keeps in memory; default: max_loras."
    )
    max_lora_rank: LoraRank = Field(16, description="The highest rank it has room for.")
    context_window: int | None = Field(
        None, ge=2, description="Prompt and answer in tokens; default: what the model allows."
    )
    preload: int = Field(
        64,
        ge=0,
        description="Adapters loaded as they are named and after each start; further ones are "
        "loaded at their first call.",
    )
    probe: str = Field(
        "The quick brown fox",
        min_length=1,
        description="The prompt after which an adapter's first token is looked at, to see that "
        "it is loaded and whole.",
    )
    probe_tolerance: float = Field(
        0.25,
        gt=0,
        description="By how much a probe's log-probabilities may differ: batches and "
        "half-precision kernels move them.",
    )
    remote_images: bool = Field(
        False,
        description="Whether callers may have it fetch images from http(s) addresses. It fetches "
        "from where it stands, so it may reach what callers cannot; `data:` is always taken.",
    )
    start_timeout_s: Seconds = Field(
        30.0, description="How long a start waits for somebody else's server, in seconds."
    )
    timeouts: Timeouts = Timeouts()

    @field_validator("url")
    @classmethod
    def _base(cls, url: str | None) -> str | None:
        return None if url is None else f"{base_url(url).removesuffix('/v1')}/v1"

    @field_validator("launch")
    @classmethod
    def _not_ours(cls, launch: Launch | None) -> Launch | None:
        if launch is None:
            return None
        for flag in launch.args:
            if (remedy := OURS.get(flag.replace("-", "_"))) is not None:
                raise ValueError(f"`args` holds {flag!r}, which is set for it; {remedy}")
        if "VLLM_API_KEY" in launch.env:
            raise ValueError("`env` holds VLLM_API_KEY; leave it out: the server gets a random key")
        return launch

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.url is None) == (self.launch is None):
            raise ValueError(
                "a vLLM server is either ours or somebody else's; give one of `url` and `launch`"
            )
        if self.launch is not None and self.model is None:
            raise ValueError("a launch needs weights; name them in `model`")
        if self.launch is not None and self.api_key_env is not None:
            raise ValueError("a server of ours gets a random key; remove `api_key_env`")
        if self.url is not None and self.api_key_env is None and not _is_loopback(self.url):
            raise ValueError(
                "vLLM loads adapters from any path it is told, so a server that others can reach "
                "needs a key; start it with --api-key and name the key's environment variable in "
                "`api_key_env`"
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < (self.max_loras or 1):
            raise ValueError(
                f"max_cpu_loras {self.max_cpu_loras} is less than max_loras {self.max_loras}; "
                "raise it"
            )
        return self


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_placement(settings: VllmSettings, placement: Placement | None) -> None:
    """Raises ValueError with the remedy."""
    if placement is not None and settings.launch is None:
        raise ValueError(
            "somebody else's server cannot be moved off a device; remove `placement`, or have "
            "the server started here with `launch`"
        )


def command_of(
    server: str, settings: VllmSettings, placement: Placement | None, port: int
) -> list[str]:
    """The argument vector of a server of ours."""
    launch = settings.launch
    assert launch is not None
    assert settings.model is not None
    given = {name.replace("-", "_") for name in launch.args}
    flags = ["--host", "127.0.0.1", "--port", str(port), "--model", settings.model]
    flags += ["--served-model-name", settings.served_name or server]
    if settings.revision is not None:
        flags += ["--revision", settings.revision]
    if settings.context_window is not None:
        flags += ["--max-model-len", str(settings.context_window)]
    if settings.max_loras is not None:
        flags += ["--enable-lora", "--max-loras", str(settings.max_loras)]
        flags += ["--max-cpu-loras", str(settings.max_cpu_loras or settings.max_loras)]
        flags += ["--max-lora-rank", str(settings.max_lora_rank)]
    if placement is not None and placement.sleep_level is not None:
        flags.append("--enable-sleep-mode")
    if "generation_config" not in given:
        # What a request leaves open is neutral, as on every other engine; an expert's own values
        # stand in its `sampling`.
        flags += ["--generation-config", "vllm"]
    python = launch.python or sys.executable
    return [python, "-m", "vllm.entrypoints.openai.api_server", *flags, *launch.flags()]


def environment_of(key: str, placement: Placement | None) -> dict[str, str]:
    """What is set in the environment of a server of ours."""
    environment = {
        "VLLM_API_KEY": key,  # not in its arguments, which every user of the machine can read
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if placement is not None and placement.sleep_level is not None:
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /sleep, which asks for no key
    return environment
