"""The short form of the streams of the bar `system` that ask for tokens alone: few of them, in one process."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

import kernels.cpu.linear
from tests.same_tokens.ahead import ARITHMETICS, take_here
from tests.same_tokens.asking import STREAMS, Asked, Draws, Streams, draw_streams
from tests.same_tokens.bits import AnswerBits, ChoiceBits, first_difference, make_bits, make_token, without_logprobs
from tests.same_tokens.models import TWINS, make_twins_model
from tests.same_tokens.observed import DECODE, Observed, beside_the_engine
from tests.same_tokens.one_process import CountingRunner

SEED = 51
REQUESTS = draw_streams(10, seed=SEED, vocab_size=TWINS.vocab_size)


@pytest.mark.parametrize("name", ARITHMETICS)
def test_streams_that_ask_for_tokens_alone_have_those_of_each_alone_with_logprobs(tmp_path: Path, name: str) -> None:
    model = make_twins_model(tmp_path, seed=SEED)
    found = take_here(model, ARITHMETICS[name], REQUESTS)
    assert [first_difference(each.taken.sent, each.taken.outputs, each.taken.expected) for each in found] == [
        None for _ in range(len(STREAMS) + 2)
    ]
    assert [(each.name, str(it)) for each in found for it in each.taken.conditions if not it.is_met] == []
    assert len({token for output in found[-1].taken.outputs for token in output.choices[0].tokens}) > 100


def unmet_counts(model: Path, requests: Sequence[Asked]) -> set[tuple[str, str]]:
    """Which counts show that a run did not reach what it is for, by way."""
    found = take_here(model, ARITHMETICS["float32"], requests)
    return {(each.name, it.words) for each in found for it in each.taken.conditions if not it.is_met}


def test_a_run_without_a_screened_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cpu.linear, "MOST_ERROR", 0.0)
    greedy = [streams for streams in STREAMS if streams.draws is Draws.GREEDY and streams.num_at_once <= 4]
    due = {(str(streams), "screened steps") for streams in greedy}
    due |= {(str(streams), f"of {streams.num_at_once} rows") for streams in greedy}
    assert unmet_counts(make_twins_model(tmp_path, seed=SEED), REQUESTS) == due


def test_a_run_without_a_step_ahead_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountingRunner, "can_begin", False)
    unmet = unmet_counts(make_twins_model(tmp_path, seed=SEED), REQUESTS[:2])
    assert {way for way, words in unmet if words == "steps ahead"} >= set(map(str, STREAMS))


@pytest.mark.parametrize(
    ("beside_us", "is_met"), [((40, 30), True), ((400, 1, 1), True), ((400,), False), ((), False)], ids=str
)
def test_steps_ahead_show_in_a_second_thread_of_the_kernels(beside_us: tuple[int, ...], is_met: bool) -> None:
    seen = Observed(
        requests=(),
        num_steps=0,
        num_copies=0,
        num_threads={},
        beside_us={DECODE: beside_us},
        block_size=16,
        block_bytes=1,
    )
    condition = beside_the_engine(DECODE)(seen)
    assert condition.is_met == is_met
    assert condition.words == "µs beside the engine of decode-0"


def test_the_streams_are_of_every_kind() -> None:
    assert [asked.is_greedy for asked in REQUESTS] == [True, False] * 5
    assert {asked.num_choices for asked in REQUESTS} == {1, 2}
    assert {bool(asked.sampling["stop_token_ids"]) for asked in REQUESTS} == {False, True}
    assert {asked.sampling["logprobs"] for asked in REQUESTS} == {0}
    assert not {name for asked in REQUESTS for name in asked.sampling if "penalty" in name or "prompt" in name}
    assert {streams.num_at_once for streams in STREAMS if streams.draws is Draws.GREEDY} == {1, 2, 3, 4, 16}
    num_picked = Counter(draws for draws in Draws for asked in REQUESTS if Streams(draws, 1).are(asked))
    assert num_picked == {Draws.GREEDY: 5, Draws.SEEDED: 5, Draws.BOTH: 10}


def test_an_answer_without_logprobs_keeps_tokens_and_ends() -> None:
    scored = make_bits(7, -0.5, [(8, -1.0)])
    answer = AnswerBits((scored,), (ChoiceBits((scored, scored), "stop"), ChoiceBits((), "length")))
    plain = AnswerBits((), (ChoiceBits((make_token(7), make_token(7)), "stop"), ChoiceBits((), "length")))
    assert without_logprobs(answer) == plain
