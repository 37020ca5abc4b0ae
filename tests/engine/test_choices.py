"""Several choices through a real model: bit for bit what each of them gives alone, preempted, chunked or restarted."""

from pathlib import Path

import pytest

from engine.engine import Engine, EngineLimits
from engine.request import PromptToken, Request, RequestId, RequestKind, SampledToken
from tests.engine.making import make_hasher
from tests.engine.model_directory import BLOCK_SIZE, NUM_BLOCKS, make_model_directory, make_runner, make_sampling

CHOICES = (0, 1, 2, 3)
PROMPT = tuple(7 * position % 50 for position in range(11))
SAMPLING = make_sampling(
    temperature=1.0,
    seed=7,
    max_tokens=16,
    num_logprobs=2,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    num_prompt_logprobs=2,
)
NUM_BLOCKS_OF_ONE = -(-(len(PROMPT) + SAMPLING.max_tokens - 1) // BLOCK_SIZE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("choices") / "model")


def run(
    directory: Path,
    choices: tuple[int, ...],
    *,
    head: tuple[int, ...] = (),
    num_blocks: int = NUM_BLOCKS,
    max_batch_tokens: int = 64,
) -> tuple[dict[int, list[SampledToken]], list[PromptToken], int]:
    """Tokens by choice, the scored prompt, and how often choices were preempted, in a system of its own."""
    limits = EngineLimits(
        max_model_len=128,
        max_batch_tokens=max_batch_tokens,
        max_sequences=8,
        max_requests=8,
        prefix_caching=True,
    )
    engine = Engine(make_runner(directory), num_blocks=num_blocks, hasher=make_hasher(BLOCK_SIZE), limits=limits)
    engine.add(
        Request(
            RequestId("a"),
            RequestKind.GENERATE,
            (*PROMPT, *head),
            SAMPLING,
            arrival=0,
            first_token_index=len(head),
            choices=choices,
        )
    )
    tokens: dict[int, list[SampledToken]] = {choice: [] for choice in choices}
    scored: list[PromptToken] = []
    num_preemptions = 0
    while (output := engine.step()) is not None:
        engine.check_integrity()
        for each in output.outputs:
            assert each.error is None
            tokens[each.choice_index] += each.tokens
            scored += each.prompt_tokens
            num_preemptions += 0 if each.stats is None else each.stats.num_preemptions
    assert engine.counts().held_blocks == 0
    return tokens, scored, num_preemptions


@pytest.fixture(scope="module")
def lone(directory: Path) -> tuple[dict[int, list[SampledToken]], list[PromptToken]]:
    """What every choice gives when nobody else is there."""
    runs = {choice: run(directory, (choice,)) for choice in CHOICES}
    scored = runs[0][1]
    assert all(other == scored for _, other, _ in runs.values()) and len(scored) == len(PROMPT) - 1
    return {choice: tokens[choice] for choice, (tokens, _, _) in runs.items()}, scored


@pytest.mark.parametrize(
    ("num_blocks", "max_batch_tokens", "has_preemptions"),
    [(NUM_BLOCKS, 64, False), (NUM_BLOCKS, 3, False), (NUM_BLOCKS_OF_ONE + 2, 64, True), (NUM_BLOCKS_OF_ONE, 5, True)],
    ids=["roomy", "chunked", "tight", "room for one"],
)
def test_choices_give_together_what_each_gives_alone(
    directory: Path,
    lone: tuple[dict[int, list[SampledToken]], list[PromptToken]],
    num_blocks: int,
    max_batch_tokens: int,
    has_preemptions: bool,
) -> None:
    tokens, scored, num_preemptions = run(directory, CHOICES, num_blocks=num_blocks, max_batch_tokens=max_batch_tokens)
    assert (tokens, scored) == lone
    assert (num_preemptions > 0) is has_preemptions


def test_a_choice_that_is_restarted_half_way_goes_on_as_if_it_had_not_been(
    directory: Path, lone: tuple[dict[int, list[SampledToken]], list[PromptToken]]
) -> None:
    for choice in CHOICES:
        whole = lone[0][choice]
        head = tuple(token.token_id for token in whole[:7])
        assert run(directory, (choice,), head=head)[0] == {choice: whole[7:]}
