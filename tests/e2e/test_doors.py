"""Both doors as their clients use them: the `openai` package over REST, a client made from reflection over gRPC."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.cluster import Cluster, block_bytes
from tests.e2e.prompts import open_tokenizer
from tests.e2e.reflected import SERVICE, ReflectedClient, greedy
from tests.e2e.rest import chat, chat_streamed, open_rest
from tests.e2e.waiting import wait_until
from tests.loop import run

QUESTION = "The code of the otter is 7341. The color of the owl is red. What is the code of the otter?"
TOKEN_IDS = tuple(range(20, 120))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("--prefill", "1", "--decode", "1") as running:
        yield running


@pytest.fixture(scope="module")
def rest(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{cluster.http}/v1", api_key="unused", max_retries=0) as client:
        yield client


def complete(rest: openai.OpenAI, **parameters: Any) -> Any:
    return rest.completions.create(model="demo", **parameters)


def generate(cluster: Cluster, **fields: Any) -> Any:
    async def call() -> Any:
        async with ReflectedClient(cluster.grpc) as client:
            return await client.generate(**fields)

    return run(call())


def test_a_chat_has_the_same_answer_whole_streamed_and_over_grpc(cluster: Cluster) -> None:
    async def ask() -> list[tuple[str, int]]:
        async with open_rest(cluster.http) as rest, ReflectedClient(cluster.grpc) as client:
            whole = await chat(rest, QUESTION, max_tokens=10, extra_body={"ignore_eos": True})
            streamed = await chat_streamed(rest, QUESTION, max_tokens=10, extra_body={"ignore_eos": True})
            grpc_answer = await client.generate(
                chat={"messages": [{"role": "user", "content": QUESTION}]}, sampling=greedy(10)
            )
            return [(answer.text, answer.prompt_tokens) for answer in (whole, streamed, grpc_answer)]

    whole, streamed, grpc_answer = run(ask())
    assert whole == streamed == grpc_answer
    assert whole[1] == len(open_tokenizer().encode(QUESTION).ids) + 4  # <|bos|> <|user|> … <|end|> <|assistant|>


def test_a_completion_of_token_ids_has_the_same_tokens_over_rest_and_grpc(
    cluster: Cluster, rest: openai.OpenAI
) -> None:
    over_grpc = generate(cluster, tokens={"token_ids": TOKEN_IDS}, sampling=greedy(9))
    answer = complete(
        rest,
        prompt=list(TOKEN_IDS),
        max_tokens=9,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert tuple(answer.choices[0].token_ids) == over_grpc.token_ids
    assert answer.choices[0].text == over_grpc.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (100, 9)


def test_a_streamed_completion_adds_up_to_the_whole_one(rest: openai.OpenAI) -> None:
    whole = complete(rest, prompt=QUESTION, max_tokens=9, temperature=0)
    chunks = list(complete(rest, prompt=QUESTION, max_tokens=9, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stop_string_cuts_the_text_before_it(rest: openai.OpenAI) -> None:
    uncut = complete(rest, prompt=list(TOKEN_IDS), max_tokens=12, temperature=0, extra_body={"ignore_eos": True})
    text = uncut.choices[0].text
    stop = text[4:6]
    cut = complete(
        rest, prompt=list(TOKEN_IDS), max_tokens=12, temperature=0, stop=[stop], extra_body={"ignore_eos": True}
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].stop_reason == stop


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others(rest: openai.OpenAI) -> None:
    def draw(seed: int) -> Any:
        body = {"ignore_eos": True, "return_token_ids": True}
        return complete(rest, prompt=list(TOKEN_IDS), max_tokens=16, temperature=2, seed=seed, extra_body=body)

    first, again, other = draw(11), draw(11), draw(12)
    assert first.choices[0].token_ids == again.choices[0].token_ids != other.choices[0].token_ids
    assert first.staffetta["seed"] == 11


def test_an_unseeded_request_is_told_its_seed_and_that_seed_repeats_it(rest: openai.OpenAI) -> None:
    def draw(**seed: int) -> Any:
        body = {"ignore_eos": True, "return_token_ids": True}
        return complete(rest, prompt=list(TOKEN_IDS), max_tokens=12, temperature=1, extra_body=body, **seed)

    unseeded = draw()
    repeated = draw(seed=unseeded.staffetta["seed"])
    assert repeated.choices[0].token_ids == unseeded.choices[0].token_ids


def test_logprobs_name_the_chosen_token_first_when_greedy(rest: openai.OpenAI) -> None:
    answer = rest.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 4
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert 0 >= entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob


def test_mistakes_have_the_exceptions_of_the_openai_package(rest: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        rest.completions.create(model="other", prompt="hello")
    with pytest.raises(openai.BadRequestError) as too_long:
        rest.completions.create(model="demo", prompt=[9] * 2048, max_tokens=1)
    assert [model.id for model in rest.models.list()] == ["demo"]
    assert unknown.value.code == "model_not_found"
    assert too_long.value.code == "context_length_exceeded"


def test_reflection_alone_is_enough_to_use_every_method(cluster: Cluster) -> None:
    async def use() -> tuple[Any, Any, Any, frozenset[str]]:
        async with ReflectedClient(cluster.grpc) as client:
            model = await client.call("GetModel")
            ids = await client.call("Tokenize", text=QUESTION)
            text = await client.call("Detokenize", token_ids=list(ids.token_ids))
            return model, ids, text, client.services

    model, ids, text, services = run(use())
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= services
    assert (model.model, model.max_model_len, model.vocab_size, list(model.eos_token_ids)) == ("demo", 2048, 1024, [2])
    assert list(ids.token_ids) == open_tokenizer().encode(QUESTION).ids
    assert text.text == QUESTION


def test_tokenizing_a_chat_counts_what_generating_from_it_counts(cluster: Cluster) -> None:
    message = {"messages": [{"role": "user", "content": QUESTION}]}

    async def tokenize() -> int:
        async with ReflectedClient(cluster.grpc) as client:
            return len((await client.call("Tokenize", chat=message)).token_ids)

    assert generate(cluster, chat=message, sampling=greedy(1)).prompt_tokens == run(tokenize())


def test_health_is_told_at_both_doors(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert httpx.get(f"http://{cluster.http}/health").json() == {"status": "alive"}
    assert httpx.get(f"http://{cluster.http}/ready").json() == {"status": "ready"}


def test_a_deadline_that_has_passed_ends_the_call_and_its_work(cluster: Cluster) -> None:
    async def call() -> grpc.StatusCode:
        async with ReflectedClient(cluster.grpc) as client:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await client.generate(timeout_s=0.3, tokens={"token_ids": TOKEN_IDS}, sampling=greedy(1900))
            return failed.value.code()

    assert run(call()) is grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_until_idle(timeout_s=1.0)


def test_the_registry_lists_the_workers_and_the_link_between_them(cluster: Cluster) -> None:
    workers = cluster.workers()
    assert sorted(workers) == ["decode-0", "prefill-0"]
    (link,) = workers["decode-0"].links
    assert link.prefill_worker == "prefill-0"
    # Whichever was measured faster; on a busy machine that may be the other one.
    assert link.transport in {"shm", "tcp"}
    assert link.bytes_per_s > 0
    layouts = [worker.announcement.identity.layout for worker in workers.values()]
    assert layouts[0] == layouts[1]
    assert workers["decode-0"].announcement.pool_bytes == 2048 * block_bytes(layouts[0])


def test_a_cancelled_call_frees_its_blocks_within_a_second(cluster: Cluster) -> None:
    async def leave() -> None:
        async with ReflectedClient(cluster.grpc) as client:
            call = client.call("Generate", tokens={"token_ids": TOKEN_IDS}, sampling=greedy(1900))
            async for response in call:
                if response.WhichOneof("event") == "delta":
                    break
            await asyncio.to_thread(wait_until_held, cluster)
            call.cancel()

    run(leave())
    cluster.wait_until_idle(timeout_s=1.0)


def test_a_dropped_rest_connection_frees_its_blocks_within_a_second(cluster: Cluster) -> None:
    body = {"model": "demo", "prompt": list(TOKEN_IDS), "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"http://{cluster.http}/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        wait_until_held(cluster)
    cluster.wait_until_idle(timeout_s=1.0)


def wait_until_held(cluster: Cluster) -> None:
    wait_until(lambda: cluster.load("decode-0").held_blocks, lambda held: held >= len(TOKEN_IDS) // 16, timeout_s=5)
