"""The `staffetta` command: finds the verb and imports no more than that verb needs, so that `--help` is quick."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cli.output import Output
from staffetta import __version__
from staffetta.config.flags import FlagParser, add_settings, set_flag
from staffetta.config.load import Loaded, resolve
from staffetta.config.schema import ClientConfig, ServeConfig
from staffetta.config.settings import ROLES
from staffetta.config.unknown import unknown_setting
from staffetta.exits import ExitCode, UsageError, run


@dataclass(frozen=True, slots=True)
class Verb:
    """One word of the command."""

    summary: str
    words: str
    """The bare words after it, for people."""
    run: Callable[[Sequence[str]], int]


def main() -> int:
    """The console script; returns the process's exit code."""
    return run(lambda: run_command(sys.argv[1:]))


def run_command(argv: Sequence[str]) -> int:
    """Runs the verb that `argv` names. Raises OperatorError."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return ExitCode.OK
    if argv[0] in ("-V", "--version"):
        print(f"staffetta {__version__}")
        return ExitCode.OK
    verb = VERBS.get(argv[0])
    if verb is None:
        raise unknown_setting(
            f"there is no verb {argv[0]!r}", argv[0], VERBS, fix="staffetta --help", replacement="staffetta {}"
        )
    return verb.run(argv[1:])


def overview() -> str:
    """The verbs, one line each."""
    width = max(len(f"{name} {verb.words}") for name, verb in VERBS.items()) + 2
    lines = [f"staffetta {__version__}: an LLM engine whose prefill and decode are separate services", ""]
    lines += [f"  {f'{name} {verb.words}':<{width}}{verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "  staffetta VERB --help lists a verb's settings; --version says which version this is"]
    return "\n".join(lines)


def _serve(argv: Sequence[str]) -> int:
    parser = _parser("serve")
    parser.add_argument("MODEL", nargs="?", help="Hugging Face directory, or `demo` for the embedded model")
    add_settings(parser, ServeConfig)
    flags = parser.parse(argv)
    if flags.MODEL is not None:
        set_flag(flags, "model", flags.MODEL)
    from cli.serve import run_serve

    return run_serve(flags, output=_output(flags))


def _gateway(argv: Sequence[str]) -> int:
    from gateway.__main__ import run_gateway

    return run_gateway(argv)


def _prefill(argv: Sequence[str]) -> int:
    from prefill_svc.__main__ import run_prefill

    return run_prefill(argv)


def _decode(argv: Sequence[str]) -> int:
    from decode_svc.__main__ import run_decode

    return run_decode(argv)


def _ask(argv: Sequence[str]) -> int:
    parser = _parser("ask")
    parser.add_argument("PROMPT", help="what to ask; - reads it from standard input")
    add_settings(parser, ClientConfig)
    flags = parser.parse(argv)
    config = resolve(ClientConfig, flags).config
    from cli.ask import run_ask

    return run_ask(config, flags.PROMPT, _output(flags))


def _chat(argv: Sequence[str]) -> int:
    parser = _parser("chat")
    add_settings(parser, ClientConfig)
    flags = parser.parse(argv)
    config = resolve(ClientConfig, flags).config
    from cli.ask import run_chat

    return run_chat(config, _output(flags))


def _config(argv: Sequence[str]) -> int:
    usage = f"staffetta config show [{'|'.join(ROLES)}] [settings] [--origin] [--json]"
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {usage}")
        return ExitCode.OK
    if argv and argv[0] == "show":
        words = argv[1:]
        if not words or words[0].startswith("-"):
            return _show("serve", words)
        if words[0] in ROLES:
            return _show(words[0], words[1:])
    raise UsageError("USAGE", "which role's settings?", why=f"usage: {usage}", fix="staffetta config show serve")


def _show(role: str, argv: Sequence[str]) -> int:
    parser = _parser("config", f"show {role}")
    parser.add_argument("--origin", action="store_true", help="say where each value comes from")
    add_settings(parser, ROLES[role])
    flags = parser.parse(argv)
    from cli.show import show_json, show_origins, show_values

    loaded: Loaded[Any] = resolve(ROLES[role], flags)
    if flags.json:
        show_json(loaded)
    elif flags.origin:
        show_origins(loaded)
    else:
        show_values(loaded)
    return ExitCode.OK


def _parser(name: str, words: str | None = None) -> FlagParser:
    verb = VERBS[name]
    parser = FlagParser(f"staffetta {name}", description=verb.summary, words=verb.words if words is None else words)
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    return parser


def _output(flags: argparse.Namespace) -> Output:
    return Output.JSON if flags.json else Output.TEXT


VERBS: Final[Mapping[str, Verb]] = {
    "serve": Verb("everything on this machine: gateway, prefill and decode workers", "[MODEL]", _serve),
    "gateway": Verb("one gateway: the doors for clients, and the workers' registry", "", _gateway),
    "prefill": Verb("one prefill worker", "", _prefill),
    "decode": Verb("one decode worker", "", _decode),
    "chat": Verb("chat with a running gateway", "", _chat),
    "ask": Verb("ask a running gateway once", "PROMPT", _ask),
    "config": Verb("a role's settings and where they come from", "show [ROLE]", _config),
}


if __name__ == "__main__":
    raise SystemExit(main())
