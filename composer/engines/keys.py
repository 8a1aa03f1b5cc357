"""API keys of servers, out of environment variables, and who must not see them. Knows no server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from composer.errors import EngineMisconfigured

OURS = "COMPOSER_"
"""What begins so is the service's own, its API key and its database's password among it."""

_hidden: set[str] = set()


def hide(variables: Iterable[str]) -> None:
    """These hold keys: from now on, no server that we start inherits them. For good, since one
    that is started again later must not see them either. A server that runs already keeps what it
    has."""
    _hidden.update(variables)


def inherited() -> Mapping[str, str]:
    """Our own environment, as a server of ours may see it."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _hidden and not name.startswith(OURS)
    }


def key_from(variable: str | None, server: str) -> str | None:
    """The server's API key, out of an environment variable. Raises EngineMisconfigured where that
    is unset."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise EngineMisconfigured(
            f"server {server!r} has no API key: the environment variable {variable!r} is not set; "
            "set it and start the service again"
        )
    return key


def key_hint(variable: str | None) -> str:
    """What to do where a server wants another key."""
    if variable is None:
        return "it wants an API key: name its environment variable in the server's `api_key_env`"
    return (
        f"correct its API key in the environment variable {variable!r} and start the service "
        "again, or have the server accept it, which needs no new start"
    )
