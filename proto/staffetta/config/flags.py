"""Command-line flags, made from the schema: `--max-batch-tokens 512`, `--prefix-caching` and `--no-prefix-caching`.

argparse sorts the words; values stay text until `staffetta.config.load` parses them, so that a flag and a variable are
refused in the same words.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from staffetta.config.settings import settings_of
from staffetta.config.unknown import nearest, unknown_setting
from staffetta.exits import UsageError

_DESTINATION = "setting:"


class FlagParser(argparse.ArgumentParser):
    """A parser whose refusals are UsageErrors, and which knows no abbreviations: they break when a flag is added.

    `words` names the bare words for the usage line.
    """

    def __init__(self, prog: str, *, description: str, words: str = "") -> None:
        super().__init__(
            prog=prog,
            usage=" ".join(filter(None, (prog, words, "[settings]"))),
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        )
        self.examples: dict[str, str] = {}  # by flag, a value that it takes

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed words. Raises UsageError, for an unknown flag with the nearest known one."""
        namespace, unknown = self.parse_known_args(argv)
        if not unknown:
            return namespace
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        known = {flag for action in self._actions for flag in action.option_strings if flag.startswith("--")}
        # The value that was given is not repeated: it may be a secret.
        value = self.examples.get(nearest(word, known) or "", "")
        raise unknown_setting(
            f"{self.prog} has no flag {word}",
            word,
            known,
            fix=f"{self.prog} --help",
            replacement=f"{self.prog} {{}} {value}".rstrip(),
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UsageError(
            "USAGE", message, why=re.sub(r"\s+", " ", self.format_usage()).strip(), fix=f"{self.prog} --help"
        )


class _OnOff(argparse.Action):
    """The first of its two flags means true, the second false."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def add_settings(parser: FlagParser, schema: type, *, skip: frozenset[str] = frozenset()) -> None:
    """Adds a flag for every setting of `schema` but those in `skip`, and `--config`."""
    parser.add_argument("--config", metavar="FILE", default="", help="YAML file with a section per role, and common:")
    group = parser.add_argument_group(
        "settings", "each also a key of the file and a STAFFETTA_… variable; flag > variable > file > default"
    )
    for name, setting in settings_of(schema).items():
        if name in skip:
            continue
        arguments: dict[str, Any] = {"dest": _DESTINATION + name, "default": argparse.SUPPRESS}
        if setting.kind is bool:
            text = f"{setting.help} (default: {setting.format(setting.default)})"
            group.add_argument(
                setting.flag, setting.negative_flag, action=_OnOff, nargs=0, help=_escape(text), **arguments
            )
            continue
        default = setting.format(setting.default)
        text = f"{setting.help} (default: {default})" if default else setting.help
        parser.examples[setting.flag] = setting.example
        group.add_argument(setting.flag, action="append", metavar=setting.metavar, help=_escape(text), **arguments)


def given_flags(namespace: argparse.Namespace) -> Mapping[str, Sequence[str] | bool]:
    """The settings that were given as flags, by name: each flag's texts in order, or a bool."""
    return {
        name.removeprefix(_DESTINATION): value
        for name, value in vars(namespace).items()
        if name.startswith(_DESTINATION)
    }


def set_flag(namespace: argparse.Namespace, name: str, text: str) -> None:
    """Counts `text` as given for the setting `name`, for a verb that takes it as a bare word."""
    setattr(namespace, _DESTINATION + name, [text])


def _escape(text: str) -> str:
    return text.replace("%", "%%")
