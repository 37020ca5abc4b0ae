"""Several choices, penalties and the prompt's log-probabilities over a real hand-off, through both doors."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.reflected import Choices, ReflectedClient, greedy
from tests.e2e.waiting import wait_until
from tests.loop import run

TOKEN_IDS = tuple(range(20, 120))
DRAWN = {"temperature": 1.5, "max_tokens": 24, "ignore_eos": True, "seed": 77}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--prefill", "1", "--decode", "1") as running:
        running.wait_until_linked()
        yield running


@pytest.fixture(scope="module")
def rest(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{cluster.http}/v1", api_key="unused", max_retries=0) as client:
        yield client


def generate(cluster: Cluster, **sampling: Any) -> Choices:
    async def call() -> Choices:
        async with ReflectedClient(cluster.grpc) as client:
            return await client.generate_choices(tokens={"token_ids": TOKEN_IDS}, sampling=sampling)

    return run(call())


def complete(rest: openai.OpenAI, **parameters: Any) -> Any:
    """A completion of the same prompt; what the client does not know goes in the extra body."""
    own = {"n", "temperature", "max_tokens", "seed", "stop", "stream", "logprobs", "echo"}
    own |= {"presence_penalty", "frequency_penalty"}
    extra = {name: value for name, value in parameters.items() if name not in own}
    known = {name: value for name, value in parameters.items() if name in own}
    return rest.completions.create(model="demo", prompt=list(TOKEN_IDS), extra_body=extra, **known)


def tokens_of(choices: Choices) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in choices.answers]


def test_choices_differ_repeat_by_their_seed_and_do_not_depend_on_how_many_there_are(cluster: Cluster) -> None:
    three, again, five, alone = (generate(cluster, n=n, **DRAWN) for n in (3, 3, 5, 1))
    assert tokens_of(three) == tokens_of(again) == tokens_of(five)[:3]
    assert tokens_of(alone) == tokens_of(five)[:1]
    assert len(set(tokens_of(five))) == 5
    unseeded = generate(cluster, n=2, **(DRAWN | {"seed": None}))
    assert tokens_of(generate(cluster, n=2, **(DRAWN | {"seed": unseeded.seed}))) == tokens_of(unseeded)


def test_one_hand_off_serves_every_choice(cluster: Cluster) -> None:
    tokens = [900 - at for at in range(64)]

    async def call() -> Choices:
        async with ReflectedClient(cluster.grpc) as client:
            return await client.generate_choices(tokens={"token_ids": tokens}, sampling={"n": 4, **DRAWN})

    handoffs = {answer.handoff for answer in run(call()).answers}
    (handoff,) = handoffs
    assert (handoff.prefill_worker, handoff.decode_worker, handoff.handoff_blocks) == ("prefill-0", "decode-0", 4)


def test_both_doors_and_both_ways_of_rest_give_the_same_choices(cluster: Cluster, rest: openai.OpenAI) -> None:
    over_grpc = generate(cluster, n=3, **DRAWN)
    whole = complete(rest, n=3, return_token_ids=True, **DRAWN)
    chunks = [chunk.choices[0] for chunk in complete(rest, n=3, stream=True, **DRAWN)]
    assert [tuple(choice.token_ids) for choice in whole.choices] == tokens_of(over_grpc)
    assert [choice.text for choice in whole.choices] == [answer.text for answer in over_grpc.answers]
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert [chunk.finish_reason for chunk in mine if chunk.finish_reason] == ["length"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (100, 72)


def test_chat_streams_interleaved_choices(rest: openai.OpenAI) -> None:
    stream = rest.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Tell me of the otter."}],
        n=3,
        max_tokens=12,
        temperature=1.5,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, usage = list(stream)
    indices = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.content]
    assert set(indices) == {0, 1, 2}
    assert indices != sorted(indices)
    assert sorted(chunk.choices[0].index for chunk in chunks if chunk.choices[0].finish_reason) == [0, 1, 2]
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 36


def test_greedy_choices_are_equal(cluster: Cluster) -> None:
    first, second = tokens_of(generate(cluster, n=2, **greedy(8)))
    assert first == second == tokens_of(generate(cluster, **greedy(8)))[0]


def test_a_stop_string_ends_one_choice_and_leaves_the_others_as_they_were(
    cluster: Cluster, rest: openai.OpenAI
) -> None:
    uncut = [choice.text for choice in complete(rest, n=3, **DRAWN).choices]
    pieces = [uncut[1][at : at + 4] for at in range(3, 40)]
    stop = next(piece for piece in pieces if piece not in uncut[0] and piece not in uncut[2])
    cut = complete(rest, n=3, stop=[stop], **DRAWN)
    assert [choice.text for choice in cut.choices] == [uncut[0], uncut[1].partition(stop)[0], uncut[2]]
    assert [choice.stop_reason for choice in cut.choices] == [None, stop, None]
    cluster.wait_until_idle(timeout_s=1.0)


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}], ids=str
)
def test_each_penalty_changes_what_is_drawn_alike_at_both_doors(
    cluster: Cluster, rest: openai.OpenAI, penalty: dict[str, float]
) -> None:
    plain = tokens_of(generate(cluster, n=2, **greedy(64)))
    penalised = tokens_of(generate(cluster, n=2, **greedy(64, **penalty)))
    answer = complete(rest, n=2, return_token_ids=True, **greedy(64, **penalty))
    assert [tuple(choice.token_ids) for choice in answer.choices] == penalised
    assert penalised[0] == penalised[1] != plain[0]
    assert len(set(penalised[0])) > len(set(plain[0]))


def test_neutral_penalties_change_nothing(cluster: Cluster) -> None:
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert tokens_of(generate(cluster, **greedy(16, **neutral))) == tokens_of(generate(cluster, **greedy(16)))


def test_a_generated_token_has_the_same_log_probability_to_the_bit_as_part_of_a_prompt(
    cluster: Cluster, rest: openai.OpenAI
) -> None:
    drawn = generate(cluster, n=2, logprobs=0, **DRAWN)
    for answer in drawn.answers:
        prompt = [*TOKEN_IDS, *answer.token_ids]
        echoed = rest.completions.create(
            model="demo", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        lists = echoed.choices[0].logprobs
        assert lists is not None
        assert lists.token_logprobs is not None
        assert len(lists.token_logprobs) == len(prompt) + 1
        assert lists.token_logprobs[:1] == [None]
        assert tuple(lists.token_logprobs[len(TOKEN_IDS) : -1]) == answer.logprobs


def test_the_prompts_log_probabilities_are_the_same_at_both_doors_cached_or_not(
    cluster: Cluster, rest: openai.OpenAI
) -> None:
    over_grpc = generate(cluster, prompt_logprobs=2, **greedy(2))
    again = generate(cluster, prompt_logprobs=2, **greedy(2))
    (choice,) = complete(rest, prompt_logprobs=2, **greedy(2)).choices
    first, *positions = choice.prompt_logprobs
    own = [position[str(token_id)] for position, token_id in zip(positions, TOKEN_IDS[1:], strict=True)]
    assert first is None
    assert tuple(entry["logprob"] for entry in own) == over_grpc.prompt_logprobs == again.prompt_logprobs
    for position, entry in zip(positions, own, strict=True):
        logprobs = {alternative["rank"]: alternative["logprob"] for alternative in position.values()}
        assert logprobs.keys() == ({1, 2} if entry["rank"] else {1, 2, None})
        assert logprobs[1] >= logprobs[2] >= entry["logprob"] or entry["rank"] == 1


def test_echo_alone_shows_the_prompt_and_counts_no_output(rest: openai.OpenAI) -> None:
    answer = complete(rest, echo=True, max_tokens=0, logprobs=0)
    (choice,) = answer.choices
    assert len(choice.logprobs.tokens) == len(TOKEN_IDS)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 0)


def test_the_fingerprint_is_the_beginning_of_the_numerics_digest(cluster: Cluster, rest: openai.OpenAI) -> None:
    async def call() -> str:
        async with ReflectedClient(cluster.grpc) as client:
            return str((await client.call("GetModel")).numerics_digest)

    fingerprint = complete(rest, max_tokens=1).system_fingerprint
    assert len(fingerprint) == 12
    assert run(call()).startswith(fingerprint)


def test_a_client_that_leaves_frees_the_blocks_of_all_choices_within_a_second(cluster: Cluster) -> None:
    body = {"prompt": list(TOKEN_IDS), "n": 8, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"http://{cluster.http}/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: cluster.load("decode-0").held_blocks, lambda held: held >= 16, timeout_s=5)
    cluster.wait_until_idle(timeout_s=1.0)
