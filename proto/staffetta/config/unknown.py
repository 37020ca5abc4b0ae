"""The error for a name that nobody knows: it proposes the nearest one."""

import difflib
from collections.abc import Iterable

from staffetta.exits import UsageError


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, if any does."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)), None)


def unknown_setting(what: str, name: str, known: Iterable[str], *, fix: str, replacement: str) -> UsageError:
    """The error for `name`. Its fix is `replacement` with the nearest known name for its `{}`, else `fix`."""
    proposal = nearest(name, known)
    why = f"the nearest known name is {proposal}" if proposal else "no known name resembles it"
    return UsageError("UNKNOWN_SETTING", what, why=why, fix=replacement.replace("{}", proposal) if proposal else fix)
