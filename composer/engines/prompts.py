"""What an embedded model cannot honour, and a call's messages as token ids.

Knows chat templates and tokenizers, no model and no thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer.errors import ContextTooLong, EngineError, Unsupported
from composer.types import Call, Message, message_text


def refuse(call: Call, max_rows: int) -> None:
    """Raises Unsupported, naming the field, for whatever would otherwise be ignored."""
    extra = {key: value for key, value in call.extra.items() if value not in (None, [], {})}
    if extra.get("tool_choice") in ("none", "auto"):
        del extra["tool_choice"]  # both are true of an answer without tools
    if (extra.get("response_format") or {}).get("type") == "text":
        del extra["response_format"]
    for key in extra:
        raise Unsupported(
            f"expert {call.expert!r} runs on the embedded engine, which cannot honour `{key}`; "
            "drop it, or name an expert on a server that can",
            param=key,
        )
    for number, message in enumerate(call.messages):
        if message.get("tool_calls") or message["role"] == "tool":
            raise Unsupported(
                "the embedded engine reads no tool calls or tool results",
                param=f"messages.{number}",
            )
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") != "text":
                raise Unsupported(
                    f"the embedded engine reads text alone, not {part.get('type')!r}",
                    param=f"messages.{number}.content",
                )
    sampling = call.sampling
    if sampling.n > max_rows:
        raise Unsupported(
            f"n is {sampling.n}, and this server runs at most {max_rows} rows at once", param="n"
        )
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise Unsupported("max_tokens must be at least 1", param="max_tokens")
    if "" in sampling.stop:
        raise Unsupported("a stop string must not be empty", param="stop")


def encode(tokenizer: Any, messages: Sequence[Message], prompt: str | None) -> list[int]:
    """Token ids of a raw prompt, or of messages through the tokenizer's chat template.

    Raises EngineError where there is no template, Unsupported where it refuses the messages or
    where nothing is left to read.
    """
    if prompt is not None:
        ids = tokenizer(prompt).input_ids
    else:
        if tokenizer.chat_template is None:
            raise EngineError(
                "this base model's tokenizer has no chat template; ask /v1/completions with a "
                "prompt, or put a chat_template.jinja into the model's folder"
            )
        turns = [{"role": m["role"], "content": message_text(m)} for m in messages]
        try:
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise Unsupported(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
    if not ids:
        raise Unsupported("the prompt is empty", param="prompt")
    return list(ids)


def budget(call: Call, prompt_tokens: int, context: int) -> int:
    """Tokens the answer may take. Raises ContextTooLong when prompt and `max_tokens` do not fit
    the smaller of the expert's window and the model's `context`. A `max_tokens` that is only the
    expert's default is cut to the room there is; one token must fit."""
    window = min(call.context_window, context)
    room = window - prompt_tokens
    limit = call.sampling.max_tokens
    demand = limit if call.max_tokens_asked else None
    if room < (demand or 1):
        asked = f" and max_tokens {demand}" if demand else ""
        raise ContextTooLong(
            f"the prompt's {prompt_tokens} tokens{asked} exceed the context window of {window} "
            f"tokens of expert {call.expert!r}",
            param="messages" if call.prompt is None else "prompt",
        )
    return room if limit is None else min(limit, room)
