"""Where a setting's value came from, for `staffetta config show --origin` and for messages that blame a source."""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class OriginKind(Enum):
    """The sources, strongest first."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """One value's source; `where` is the flag, the variable, or the file and key."""

    kind: OriginKind
    where: str
    is_own: bool = False
    """Whether the value was written for this role alone, not for every role that has the setting."""

    def __str__(self) -> str:
        return f"{self.kind.value} {self.where}".rstrip()


DEFAULT: Final = Origin(OriginKind.DEFAULT, "")
