"""Steps begun ahead by the compiled kernels: the tokens that there are without them, and threads that cannot start."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from engine.engine import Engine
from engine.model_config import ModelConfig
from engine.request import RequestId
from engine.runner import ModelRunner, load_runner
from engine.step import Following, SequenceSlice, StepInFlight
from kernels.background import CannotBeginError
from kernels.cpu.background import CpuBackgroundStep
from staffetta.identity import model_digest
from tests.engine import model_directory
from tests.engine.background import BackgroundFakeRunner
from tests.engine.making import (
    BLOCK_SIZE,
    make_hasher,
    make_limits,
    make_request,
    run_to_end,
    step,
    token_ids,
)
from tests.engine.test_ahead import make_engine, make_stream


def make_model_engine(path: Path) -> tuple[Engine, ModelRunner]:
    """An engine whose kernels have a driver: they compute on two threads."""
    config, num_blocks = ModelConfig.from_directory(path), 64
    layout = config.kv_layout(block_size=BLOCK_SIZE, dtype="float32", model_digest=model_digest(path))
    pool = memoryview(bytearray(layout.page_bytes * num_blocks))
    runner = load_runner(path, config, layout, pool=pool, num_blocks=num_blocks, threads=2, device="cpu")
    return Engine(runner, num_blocks=num_blocks, hasher=make_hasher(), limits=make_limits()), runner


def test_without_a_thread_for_it_no_step_is_begun_ahead_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def refuse(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        raise CannotBeginError("no more threads")

    monkeypatch.setattr(CpuBackgroundStep, "begin", refuse)
    engine, runner = make_model_engine(model_directory.make_model_directory(tmp_path / "model"))
    engine.add(make_stream("a"))
    assert len(token_ids(run_to_end(engine)["a"])) == 9
    assert tries == 1 and not runner.can_begin
    assert caplog.messages == ["no step is begun ahead from now on: no more threads"]


def test_a_runner_that_begins_nothing_has_nothing_leased_early(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make_engine()
    monkeypatch.setattr(BackgroundFakeRunner, "can_begin", False)
    engine.add(make_stream("a"))
    step(engine), step(engine), step(engine)  # eight tokens; the next one needs a third block
    assert engine.counts().held_blocks == 2 and runner.num_ahead == 0


def serve(engine: Engine, seed: int) -> dict[tuple[str, int], tuple[int, ...]]:
    """Requests of all kinds that come, and are cancelled, at turns that `seed` says; tokens by request and choice."""
    random = Random(seed)
    names: list[RequestId] = []
    tokens: dict[tuple[str, int], tuple[int, ...]] = {}
    for turn in range(120):
        engine.go_on()
        if turn < 60 and random.random() < 0.15:
            sampling = replace(
                model_directory.make_sampling(num_logprobs=random.choice([None, None, None, 0])),
                temperature=random.choice([0.0, 0.9]),
                seed=turn,
                max_tokens=random.randrange(1, 24),
                stop_token_ids=frozenset(random.sample(range(97), 4)),
                presence_penalty=random.choice([0.0, 0.0, 0.0, 0.7]),
            )
            prompt = tuple(random.randrange(97) for _ in range(random.randrange(1, 30)))
            choices = random.choice([(0,), (0,), (0, 2)])
            names.append(RequestId(f"r{turn}"))
            engine.add(make_request(names[-1], prompt, sampling=sampling, choices=choices))
        if random.random() < 0.05 and names:
            engine.cancel(random.choice(names))
        output = engine.step()
        engine.check_integrity()
        for each in () if output is None else output.outputs:
            key = str(each.request_id), each.choice_index
            tokens[key] = tokens.get(key, ()) + tuple(token.token_id for token in each.tokens)
    engine.close()
    assert not engine.has_work()
    return tokens


def test_the_kernels_give_the_tokens_that_they_give_without_a_step_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_directory.make_model_directory(tmp_path / "model")
    num_ahead = 0
    begin = ModelRunner.begin

    def counted(
        self: ModelRunner, slices: tuple[SequenceSlice, ...], *, follows: Following | None = None
    ) -> StepInFlight | None:
        nonlocal num_ahead
        num_ahead += follows is not None
        return begin(self, slices, follows=follows)

    monkeypatch.setattr(ModelRunner, "begin", counted)
    seeds = range(6)
    with_ahead = [serve(make_model_engine(path)[0], seed) for seed in seeds]
    assert num_ahead > 60, "steps that are never begun ahead prove nothing"
    monkeypatch.setattr(ModelRunner, "begin", lambda *_, **__: None)
    for seed, ahead in zip(seeds, with_ahead, strict=True):
        plain = serve(make_model_engine(path)[0], seed)
        assert ahead.keys() == plain.keys()
        # A request may join a step later, and so be cancelled a token earlier.
        lengths = [(len(ahead[key]), len(plain[key])) for key in plain]
        assert sum(one != other for one, other in lengths) <= 2
        assert all(ahead[key][: len(plain[key])] == plain[key][: len(ahead[key])] for key in plain)
