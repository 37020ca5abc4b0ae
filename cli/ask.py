"""`staffetta ask PROMPT` and `staffetta chat`: a running gateway's answers in the terminal, each with its hand-off."""

import asyncio
import sys
from collections.abc import Sequence

from cli.client import Client, make_request
from cli.output import Output, discard, write, write_json
from cli.relay import Answer, relay_line
from staffetta.config.schema import ClientConfig
from staffetta.exits import ExitCode, OperatorError


def run_ask(config: ClientConfig, prompt: str, output: Output) -> int:
    """Asks once; `-` reads the prompt from standard input. Ctrl-C cancels the request everywhere."""
    text = sys.stdin.read() if prompt == "-" else prompt

    async def ask() -> None:
        async with Client(config.address) as client:
            await _answer(client, config, [("user", text)], output)

    asyncio.run(ask())
    return ExitCode.OK


def run_chat(config: ClientConfig, output: Output) -> int:
    """Asks line after line, each with all turns before it. Ctrl-C ends an answer, or the chat when none runs.

    A refusal is told and its line forgotten; the turns before it stay. The exit code is that of the last line.
    """
    turns: list[tuple[str, str]] = []
    code = ExitCode.OK
    with asyncio.Runner() as runner:
        client = runner.run(_open(config.address))
        try:
            while (line := _read_line(output)) is not None:
                if not line.strip():
                    continue
                asked = [*turns, ("user", line)]
                try:
                    answer = runner.run(_answer(client, config, asked, output))
                except KeyboardInterrupt:
                    print("\n  stopped; this turn is forgotten", file=sys.stderr)
                    continue
                except OperatorError as error:
                    print(error, file=sys.stderr, flush=True)
                    code = error.exit_code
                    continue
                turns, code = [*asked, ("assistant", answer.text)], ExitCode.OK
        finally:
            runner.run(client.channel.close())
    return code


async def _open(address: str) -> Client:
    """A client that belongs to the running loop."""
    return Client(address)


async def _answer(client: Client, config: ClientConfig, turns: Sequence[tuple[str, str]], output: Output) -> Answer:
    on_text = write if output is Output.TEXT else discard
    answer = await client.generate(make_request(config, turns), timeout_s=config.timeout_s, on_text=on_text)
    if output is Output.TEXT:
        write(f"\n  {relay_line(answer)}\n")
    else:
        write_json(answer.as_json())
    return answer


def _read_line(output: Output) -> str | None:
    """The next line without its end; None at the end of input or when the reader has had enough."""
    if output is Output.TEXT and sys.stdin.isatty():
        write("\n› ")
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        write("\n")
        return None
    return line.rstrip("\n") if line else None
