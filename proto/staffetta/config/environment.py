"""The process's environment: the one module of the project that reads or sets it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

PREFIX: Final = "STAFFETTA_"


def process_environment() -> Mapping[str, str]:
    """The environment as it is now; a copy."""
    return dict(os.environ)


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment for a child whose settings are handed over resolved: ours removed, `variables` set.

    A child must not read a setting twice, least of all one that a flag has overruled; and secrets stay out of it.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return inherited | variables


def user_cache_directory() -> Path:
    """Where this user's programs keep what they can make again: XDG_CACHE_HOME where that is absolute, else ~/.cache.

    Raises RuntimeError for a user without a home directory.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def let_idle_threads_sleep() -> None:
    """Makes the idle threads of torch's OpenMP sleep instead of spin, unless the environment says how they wait.

    The runtime reads this once, when the first library that needs it is loaded: call it before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
