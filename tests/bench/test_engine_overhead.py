"""The engine's own cost per step: that it is measured of whole steps."""

import pytest

from bench.engine_overhead import ReadingRunner, main, measure_overhead
from engine.request import RequestId, SampledToken, SamplingParams
from engine.step import Draw, SequenceSlice, SliceResult


def test_every_stream_gets_a_token_in_every_step_that_is_measured() -> None:
    found = measure_overhead(3, num_steps=5)
    assert found.batch == 3
    assert found.engine_us > 0 and found.message_us > 0


def test_the_runner_answers_draws_and_nothing_else() -> None:
    sampling = SamplingParams(0.0, 0, 1.0, 0, 9, 0, frozenset(), None)
    slices = tuple(SequenceSlice(RequestId("a"), (5,), 0, (), draw) for draw in (None, Draw(sampling, output_index=7)))
    assert ReadingRunner().run(slices) == [SliceResult(), SliceResult((SampledToken(7, 1),))]


def test_what_the_runner_reads_is_not_the_engines_time() -> None:
    num_bytes = 128 * 2**20
    runner = ReadingRunner(num_bytes)
    runner.run(())
    assert measure_overhead(1, num_steps=3, read_bytes=num_bytes).engine_us < runner.spent_ns / 1e3 / 2


def test_the_table_says_what_part_of_a_models_step_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batches", "1", "2", "--steps", "3", "--read-mib", "1", "--step-ms", "75"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-4:] == ["%", "of", "a", "step"]
    assert [row.split()[0] for row in rows] == ["1", "2"]
