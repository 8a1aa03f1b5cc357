"""Every error the service raises on purpose, in one tree. Knows nothing about HTTP.

ComposerError
├── RequestError            the caller's to mend
│   ├── UnknownModel        the `model` is neither a policy nor an expert, for this caller
│   ├── Forbidden           the caller's key may not do this
│   ├── NotFound            there is no such file or batch
│   ├── Unsupported         no eligible expert (or not this one) can honour what was asked
│   ├── ContextTooLong      the prompt and `max_tokens` exceed the expert's context window
│   └── Conflict            the change contradicts what the catalog already holds
├── CatalogError            experts.yaml, a card or a runtime expert is wrong; holds every Problem
│   └── AdapterError        one adapter folder failed verification
├── EngineError             a server failed while it answered
│   ├── EngineUnavailable   it is not there at all (starting, closed, died)
│   ├── EngineMisconfigured it lacks what its operator must give: trying again will not help
│   ├── EngineRefused       it will not answer this request; others it may
│   └── EngineFull          it has no room for more adapters
├── Overloaded              queues are full; says when to come back
├── StoreError              the database or the journal
│   └── UnknownResponse     feedback for a response id that was never recorded
└── SettingsError           the process's own settings or the command line

`api/errors.py` maps the tree to statuses; a test holds the table complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


class ComposerError(Exception):
    """Root of the tree. `str()` is meant for the person who can mend it."""

    code: str = "internal_error"


class RequestError(ComposerError):
    """The request cannot be served as written. `param` names the offending field, if one."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(RequestError):
    code = "model_not_found"


class Forbidden(RequestError):
    code = "insufficient_permissions"


class NotFound(RequestError):
    code = "not_found"


class Unsupported(RequestError):
    code = "unsupported"


class ContextTooLong(RequestError):
    code = "context_length_exceeded"


class Conflict(RequestError):
    code = "conflict"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with the registry: where it stands, what it is, how to mend it."""

    file: str
    path: str
    message: str
    remedy: str
    line: int | None = None

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        at = f" {self.path}:" if self.path else ""
        return f"{where}:{at} {self.message}. {self.remedy}"


class Misfits(ValueError):
    """Several things that do not fit, told at once: `errors`, each "what is wrong; the remedy"."""

    def __init__(self, errors: Sequence[ValueError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(map(str, errors)))


def errors_of(error: ValueError) -> tuple[ValueError, ...]:
    """Itself, or those that it tells at once."""
    return error.errors if isinstance(error, Misfits) else (error,)


def check_all(*checks: Callable[[], object]) -> None:
    """Runs all of them, whichever fail. Raises the one ValueError, or Misfits of several."""
    found: list[ValueError] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            found.extend(errors_of(error))
    if len(found) == 1:
        raise found[0]
    if found:
        raise Misfits(found)


class CatalogError(ComposerError):
    """The registry as written cannot become a catalog. Carries all problems found."""

    code = "invalid_catalog"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class AdapterError(CatalogError):
    """An adapter folder was refused. Always holds at least one problem."""

    code = "invalid_adapter"


class EngineError(ComposerError):
    code = "engine_error"


class EngineUnavailable(EngineError):
    code = "engine_unavailable"


class EngineMisconfigured(EngineError):
    """The server lacks what only its operator can give, such as a key or its program. The message
    names the server and the remedy in our own words, since callers read it."""

    code = "engine_misconfigured"


class EngineRefused(EngineError):
    """The server is well and forbids this request: what it asks for, or from where. The message
    is in our own words, since callers read it."""

    code = "engine_refused"


class EngineFull(EngineError):
    """A server has no room for all the adapters that it is to hold. `over`: how many are too many;
    none of the new ones has been added."""

    code = "engine_full"

    def __init__(self, message: str, *, over: int = 1) -> None:
        super().__init__(message)
        self.over = over


class Overloaded(ComposerError):
    """No room now. `retry_after` is in seconds, an estimate from the recent pace."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StoreError(ComposerError):
    code = "store_error"


class UnknownResponse(StoreError):
    code = "response_not_found"


class SettingsError(ComposerError):
    code = "invalid_settings"
