"""Streams that ask for tokens alone, in the engine of this process: steps begun ahead, and logits that are screened.

They are compared with each request alone on one thread, with its log-probabilities: no step of those is begun, and
every logit is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch

from kernels.backend import WeightFormat
from kvtransfer.layout import KVDtype
from tests.same_tokens.asking import STREAMS, Asked, Draws, Streams
from tests.same_tokens.bits import AnswerBits
from tests.same_tokens.observed import Condition
from tests.same_tokens.one_process import NUM_BLOCKS, CountingRunner, Ran, make_request, make_runner, run
from tests.same_tokens.one_process import without_logprobs as for_tokens
from tests.same_tokens.ways import Taken

MOST_SCREENED_ROWS: Final = 4
"""Of a step of more, every logit is computed."""

_FEW_BLOCKS: Final = 40
"""Less than the streams need that are computed together."""
_WHOLE_PROMPTS: Final = 2048


class Arithmetic(NamedTuple):
    """What is computed in, and what the layers' weights are stored as."""

    dtype: KVDtype
    stored: WeightFormat

    @property
    def flags(self) -> tuple[str, ...]:
        """The same for `staffetta serve`."""
        return ("--dtype", self.dtype, "--quantization", self.stored.value)


ARITHMETICS: Final = {
    "float32": Arithmetic("float32", WeightFormat.AS_GIVEN),
    "bfloat16": Arithmetic("bfloat16", WeightFormat.AS_GIVEN),
    "int8": Arithmetic("float32", WeightFormat.INT8),
    "int8-weight": Arithmetic("bfloat16", WeightFormat.INT8_WEIGHT),
    "int4": Arithmetic("bfloat16", WeightFormat.INT4),
}


class TakenHere(NamedTuple):
    """A way that was taken in this process."""

    name: str
    threads: int
    taken: Taken


class _Site(NamedTuple):
    """Where ways are taken: a runner of its own for each, the requests, and what is due."""

    make_runner: Callable[[int], CountingRunner]
    requests: Sequence[Asked]
    expected: Sequence[AnswerBits]


Count = Callable[[CountingRunner, Sequence[Ran]], Condition]


def take_here(model: Path, arithmetic: Arithmetic, requests: Sequence[Asked]) -> list[TakenHere]:
    """All of `STREAMS` on two threads; the last of them also on one, and where blocks run out."""
    threads_before = torch.get_num_threads()
    try:
        return list(_take_all(model, arithmetic, requests))
    finally:
        torch.set_num_threads(threads_before)


def _take_all(model: Path, arithmetic: Arithmetic, requests: Sequence[Asked]) -> Iterator[TakenHere]:
    def make(threads: int) -> CountingRunner:
        return make_runner(model, *arithmetic, threads=threads)

    site = _Site(make, requests, _alone(make(1), requests))
    last = STREAMS[-1]
    yield _take(site, last, _none_begun, threads=1)
    for streams in STREAMS:
        yield _take(site, streams, _finished_ahead, *_counts_of(streams))
    yield _take(site, last, _finished_ahead, _preempted, num_blocks=_FEW_BLOCKS)


def _alone(runner: CountingRunner, requests: Sequence[Asked]) -> list[AnswerBits]:
    answers: list[AnswerBits] = []
    for asked in requests:
        ran = run(runner, [make_request(asked, 0, range(asked.num_choices))], max_batch_tokens=_WHOLE_PROMPTS)
        answers += _answers(ran, [asked])
    assert not runner.num_ahead, "the reference begins no step"
    return answers


def _take(site: _Site, streams: Streams, *counts: Count, threads: int = 2, num_blocks: int = NUM_BLOCKS) -> TakenHere:
    pairs = [pair for pair in zip(site.requests, site.expected, strict=True) if streams.are(pair[0])]
    sent = [asked for asked, _ in pairs]
    runner = site.make_runner(threads)
    outputs: list[AnswerBits] = []
    all_ran: list[Ran] = []
    for begin in range(0, len(sent), streams.num_at_once):
        group = sent[begin : begin + streams.num_at_once]
        asked_for = [for_tokens(make_request(asked, i, range(asked.num_choices))) for i, asked in enumerate(group)]
        ran = run(runner, asked_for, max_batch_tokens=_WHOLE_PROMPTS, num_blocks=num_blocks)
        outputs += _answers(ran, group)
        all_ran.append(ran)
    name = str(streams) if num_blocks == NUM_BLOCKS else f"{streams}, {num_blocks} blocks"
    taken = Taken(sent, outputs, [due for _, due in pairs], [count(runner, all_ran) for count in counts])
    return TakenHere(name, threads, taken)


def _answers(ran: Ran, requests: Sequence[Asked]) -> list[AnswerBits]:
    return [
        AnswerBits((), tuple(ran.choices[f"r{number}", choice] for choice in range(asked.num_choices)))
        for number, asked in enumerate(requests)
    ]


# Counts


def _counts_of(streams: Streams) -> tuple[Count, ...]:
    """What is counted beside steps ahead: screened steps where there are to be some, whole ones where there are."""
    if streams.draws is not Draws.GREEDY or streams.num_at_once > MOST_SCREENED_ROWS:
        return (_whole,)
    return (_screened, _screened_of(streams.num_at_once))


def _none_begun(runner: CountingRunner, ran: Sequence[Ran]) -> Condition:
    del ran
    num_begun = runner.num_ahead + runner.num_finished.total()
    return Condition("steps, none begun", 0 if num_begun else len(runner.num_slices), 1)


def _finished_ahead(runner: CountingRunner, ran: Sequence[Ran]) -> Condition:
    """Steps that were begun ahead and computed to their end: at least a tenth of all, also where many are preempted."""
    del ran
    return Condition("steps ahead", runner.num_finished_ahead, len(runner.num_slices) // 10)


def _screened(runner: CountingRunner, ran: Sequence[Ran]) -> Condition:
    """Steps of greedy streams alone, few enough, of whose logits some were not computed.

    At least an eighth: after one that rules out too little, many are not screened.
    """
    del ran
    num_due = sum(number for kind, number in runner.num_finished.items() if _is_for_screening(*kind))
    num_screened = sum(number for kind, number in runner.num_screened.items() if _is_for_screening(*kind))
    return Condition("screened steps", num_screened, num_due // 8)


def _screened_of(num_rows: int) -> Count:
    """Those of so many streams."""

    def count(runner: CountingRunner, ran: Sequence[Ran]) -> Condition:
        del ran
        kind = (True, num_rows)
        return Condition(f"of {num_rows} rows", runner.num_screened[kind], 1)

    return count


def _whole(runner: CountingRunner, ran: Sequence[Ran]) -> Condition:
    """Steps of other streams: every one of them with every logit."""
    del ran
    others = {kind: number for kind, number in runner.num_finished.items() if not _is_for_screening(*kind)}
    num_whole = sum(number - runner.num_screened[kind] for kind, number in others.items())
    return Condition("whole steps", num_whole, sum(others.values()))


def _preempted(runner: CountingRunner, ran: Sequence[Ran]) -> Condition:
    del runner
    return Condition("preemptions", sum(each.num_preemptions for each in ran), 1)


def _is_for_screening(are_greedy: bool, num_rows: int) -> bool:
    return are_greedy and num_rows <= MOST_SCREENED_ROWS
