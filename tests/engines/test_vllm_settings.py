"""What experts.yaml may say of a vLLM server, and the command line it becomes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from composer.engines.launch import Launch
from composer.engines.vllm import VllmEngine
from composer.engines.vllm_launch import VllmSettings, command_of, environment_of
from composer.types import SAFE_PARAMETERS, Placement

LAUNCH = {"python": "/venv/bin/python", "args": {"dtype": "bfloat16", "enforce-eager": True}}


def launched(**changes: Any) -> VllmSettings:
    return VllmSettings(**({"launch": LAUNCH, "model": "org/base"} | changes))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "give one of `url` and `launch`"),
        ({"url": "http://127.0.0.1:1/v1", "launch": LAUNCH, "model": "m"}, "give one of"),
        ({"launch": LAUNCH}, "name them in `model`"),
        ({"url": "http://10.0.0.7:8000/v1"}, "`api_key_env`"),
        ({"url": "https://gpu.example/v1"}, "`api_key_env`"),
        ({"url": "http://localhost.example/v1"}, "`api_key_env`"),
        ({"launch": LAUNCH, "model": "m", "api_key_env": "K"}, "remove `api_key_env`"),
        ({"launch": LAUNCH, "model": "m", "max_loras": 4, "max_cpu_loras": 2}, "raise it"),
        ({"url": "http://127.0.0.1:1/v1", "max_lora_rank": 12}, "max_lora_rank"),
        ({"launch": {"args": {"max_loras": 2}}, "model": "m"}, "setting of the server"),
        ({"launch": {"args": {"api-key": "k"}}, "model": "m"}, "random key"),
        ({"launch": {"env": {"VLLM_API_KEY": "k"}}, "model": "m"}, "random key"),
        ({"url": "http://127.0.0.1:1/v1", "unknown": 1}, "unknown"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        VllmSettings(**settings)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://[::1]:8000/v1/", "http://[::1]:8000/v1"),
    ],
)
def test_urls_on_loopback_need_no_key(written: str, meant: str) -> None:
    assert VllmSettings(url=written).url == meant


def test_a_placement_needs_a_launch() -> None:
    gpu = Placement("gpu0", 10.0)
    VllmEngine.check(launched(), gpu)
    VllmEngine.check(VllmSettings(url="http://127.0.0.1:1/v1"), None)
    with pytest.raises(ValueError, match="; remove `placement`"):
        VllmEngine.check(VllmSettings(url="http://127.0.0.1:1/v1"), gpu)


def test_the_command_line_of_a_plain_server() -> None:
    assert command_of("big", launched(), None, 8123) == [
        "/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server",
        "--host", "127.0.0.1", "--port", "8123", "--model", "org/base",
        "--served-model-name", "big", "--generation-config", "vllm",
        "--dtype", "bfloat16", "--enforce-eager",
    ]  # fmt: skip
    assert environment_of("secret", None) == {
        "VLLM_API_KEY": "secret",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def test_the_command_line_of_all_settings() -> None:
    settings = launched(
        revision="abc",
        served_name="base",
        context_window=2048,
        max_loras=2,
        max_cpu_loras=4,
        max_lora_rank=8,
        launch=Launch(args={"generation_config": "auto"}),
    )
    asleep = Placement("gpu0", 10.0, sleep_level=1)
    command = " ".join(command_of("big", settings, asleep, 1))
    for flags in (
        "--served-model-name base",
        "--revision abc",
        "--max-model-len 2048",
        "--enable-lora --max-loras 2 --max-cpu-loras 4 --max-lora-rank 8",
        "--enable-sleep-mode",
        "--generation-config auto",
    ):
        assert flags in command
    assert "--generation-config vllm" not in command
    assert environment_of("k", asleep)["VLLM_SERVER_DEV_MODE"] == "1"
    assert "k" not in command_of("big", settings, asleep, 1)


def test_capacity_and_parameters() -> None:
    engine = VllmEngine("big", launched(max_loras=3, in_flight=7, queue=9))
    assert (engine.capacity.in_flight, engine.capacity.queue, engine.capacity.adapters) == (7, 9, 3)
    assert VllmEngine.parameters > SAFE_PARAMETERS
    assert {"cache_salt", "chat_template", "priority", "prompt_logprobs"} <= VllmEngine.parameters
