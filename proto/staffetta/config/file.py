"""Reads a configuration file: YAML, one mapping per role and one that all share. Unknown keys are errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from staffetta.config.settings import ROLES, settings_of
from staffetta.config.unknown import unknown_setting
from staffetta.exits import UsageError

COMMON = "common"


def read_file(path: str) -> Mapping[str, Mapping[str, Any]]:
    """The file's sections by name, their keys checked, their values as YAML read them. Raises UsageError."""
    # Imported here: most starts have no file, and the parser costs 30 ms.
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, f"the configuration file {path} cannot be read", str(error)) from None
    except yaml.YAMLError as error:
        raise _unusable(path, f"the configuration file {path} is not YAML", " ".join(str(error).split())) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise _unusable(
            path, f"the configuration file {path} is not a mapping", f"it must map {_sections()} to settings"
        )
    for name, section in content.items():
        _check_section(path, str(name), section)
    return {name: section for name, section in content.items() if section is not None}


def _check_section(path: str, name: str, section: object) -> None:
    if name != COMMON and name not in ROLES:
        hint = f"move {name} into common:" if any(name in settings_of(s) for s in ROLES.values()) else f"remove {name}"
        raise unknown_setting(
            f"{path}: no section is called {name}", name, (COMMON, *ROLES), fix=hint, replacement="call it {}"
        )
    if section is None:
        return
    if not isinstance(section, dict):
        raise _unusable(path, f"{path}: section {name} is not a mapping", "it must map settings to values")
    schemas = list(ROLES.values()) if name == COMMON else [ROLES[name]]
    known = {setting for schema in schemas for setting in settings_of(schema)}
    for key in section:
        if key not in known:
            raise unknown_setting(
                f"{path}: {name} has no setting {key}",
                str(key),
                known,
                fix=f"remove {name}.{key}",
                replacement=f"write {name}.{{}} instead",
            )


def _sections() -> str:
    return ", ".join((COMMON, *ROLES))


def _unusable(path: str, what: str, why: str) -> UsageError:
    return UsageError("CONFIG_FILE", what, why=why, fix=f"edit {path}, or choose another with --config FILE")
