"""Every order in which the events of a hand-off of two blocks can happen, with and without turns of the loop between.

The checks are `Script.check`: each token once and before the engine hears of it, landings in order and verified,
exactly one ending, and one word of quiet for every grant that did not land.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import pytest

from engine.cache.source import KVFailed, KVLanded
from engine.request import Request
from tests.decode_svc.scripted import STOP, Script, make_request
from tests.rpc.in_loop import in_loop

BASE = ("chunk 0", "chunk 1", "token", "grant")


def orders(*moves: str) -> Iterator[tuple[str, ...]]:
    """All orders of `moves` in which the chunks come in theirs: a session delivers in order."""
    for order in permutations(moves):
        if order.index("chunk 0") < order.index("chunk 1"):
            yield order


async def play(order: tuple[str, ...], *, settles: bool | tuple[bool, ...], request: Request | None = None) -> Script:
    """Makes the moves in that order; `settles` says after which of them the loop takes its turns."""
    script = Script(request=request)
    moves = {
        "chunk 0": lambda: script.chunk(0),
        "chunk 1": lambda: script.chunk(1),
        "corrupt": lambda: script.chunk(entries=[replace(script.entry(1), head_checksums=(1, 2))]),
        "token": script.first_tokens,
        "scores 0": lambda: script.prompt_logprobs(1, 2, 3),
        "scores 1": lambda: script.prompt_logprobs(4, 5, 6),
        "tokens": lambda: script.first_tokens(STOP, 42),
        "grant": script.grant,
        "fail": script.fail,
        "abandon": script.abandon,
        "release": script.release_reads,
    }
    if "release" in order:
        script.exporter.faults.hold()
    await script.begin()
    pauses = (settles,) * len(order) if isinstance(settles, bool) else settles
    for move, is_paused in zip(order, pauses, strict=True):
        moves[move]()
        if is_paused:
            await script.settle()
    await script.settle()
    return script


@pytest.fixture
def _verify_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification runs in its turn instead of a thread, so that a number of turns settles everything."""

    async def call(function: object, *arguments: object) -> object:
        return function(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(asyncio, "to_thread", call)


@pytest.mark.usefixtures("_verify_at_once")
@pytest.mark.parametrize("settles", [True, False], ids=["turns", "burst"])
def test_undisturbed_every_order_lands(settles: bool) -> None:
    @in_loop
    async def run() -> None:
        for order in orders(*BASE):
            script = await play(order, settles=settles)
            script.check(is_abandoned=False)
            assert script.kinds()[-1] == "landed 7 last", (order, script.kinds())
            assert [each.num_tokens for each in script.events(type(script.log[-1]))] == [4, 7]

    run()


@pytest.mark.usefixtures("_verify_at_once")
@pytest.mark.parametrize("settles", [True, False], ids=["turns", "burst"])
@pytest.mark.parametrize("end", ["fail", "abandon"])
@pytest.mark.parametrize("more", [(), ("release",)], ids=["reads at once", "reads held"])
def test_every_order_with_an_end_in_it_keeps_the_books(settles: bool, end: str, more: tuple[str, ...]) -> None:
    @in_loop
    async def run() -> None:
        seen: set[str] = set()
        for order in orders(*BASE, end, *more):
            script = await play(order, settles=settles)
            try:
                script.check(is_abandoned=end == "abandon")
            except AssertionError as error:
                raise AssertionError(f"{order}: {script.kinds()}") from error
            seen.update(script.kinds())
            states = [count.state for count in script.source.counts()]
            assert states[0] in ("open", "pulling", "committed")
            seen.update(states)
        # The orders reach what they are meant to reach; in a burst the end overtakes the landing.
        reached = {"ready", "emit", "quiesced", "pulling"} | (
            {"landed 7 last", "open", "committed"} if settles else set()
        )
        assert reached <= seen
        assert ("failed" in seen) is (end == "fail")

    run()


@pytest.mark.usefixtures("_verify_at_once")
@pytest.mark.parametrize("end", ["fail", "abandon"])
def test_every_order_with_every_choice_of_turns_keeps_the_books(end: str) -> None:
    @in_loop
    async def run() -> None:
        for order in orders(*BASE, end):
            for settles in product((True, False), repeat=len(order)):
                script = await play(order, settles=settles)
                try:
                    script.check(is_abandoned=end == "abandon")
                except AssertionError as error:
                    raise AssertionError(f"{order}, {settles}: {script.kinds()}") from error

    run()


@pytest.mark.usefixtures("_verify_at_once")
@pytest.mark.parametrize("settles", [True, False], ids=["turns", "burst"])
def test_in_every_order_a_corrupt_block_fails_and_never_lands(settles: bool) -> None:
    @in_loop
    async def run() -> None:
        for order in permutations(("chunk 0", "corrupt", "token", "grant")):
            if order.index("chunk 0") > order.index("corrupt"):
                continue
            script = await play(order, settles=settles)
            script.check(is_abandoned=False)
            landed = [kind for kind in script.kinds() if kind.startswith("landed")]
            assert landed == ["landed 4"]
            assert {"failed", "quiesced"} <= set(script.kinds())

    run()


@pytest.mark.usefixtures("_verify_at_once")
@pytest.mark.parametrize("settles", [True, False], ids=["turns", "burst"])
def test_in_every_order_with_a_failure_two_choices_and_the_scored_prompt_are_sent_in_order(settles: bool) -> None:
    request = make_request(choices=(0, 1), num_prompt_logprobs=0)

    @in_loop
    async def run() -> None:
        endings: set[bool] = set()
        for order in orders("chunk 0", "chunk 1", "scores 0", "scores 1", "tokens", "grant", "fail"):
            if not order.index("scores 0") < order.index("scores 1") < order.index("tokens"):
                continue
            script = await play(order, settles=settles, request=request)
            script.check(is_abandoned=False)
            positions = [token.position for token in script.prompt_tokens]
            assert positions in ([], [1, 2, 3], [1, 2, 3, 4, 5, 6]), order
            assert not script.events(tuple) or len(positions) == 6, order
            has_landed = any(event.is_last for event in script.events(KVLanded))
            assert has_landed is not bool(script.events(KVFailed)), order
            endings.add(has_landed)
        assert endings == ({True, False} if settles else {False})

    run()
