"""The REST door with the real client: shapes, streaming, parameters, and what each answer says of the relay."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from staffetta.v1 import common_pb2, decode_pb2
from tests.gateway.running import Running, asynchronous, eventually, ids_of, running

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
TEXT = "Hello w\N{LATIN SMALL LETTER O WITH DIAERESIS}rld"


def client_of(it: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{it.http_address}/v1", api_key="none", max_retries=0)


def events_of(body: str) -> list[Any]:
    """The JSON of each event; the framing is checked on the way."""
    assert body.endswith("\n\n")
    frames = body[:-2].split("\n\n")
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


@asynchronous
async def test_the_real_client_reads_a_chat_answer() -> None:
    async with running(reply=ids_of(TEXT)) as it, client_of(it) as client:
        answer = await client.chat.completions.create(model="demo", messages=HI)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(ids_of(TEXT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


@asynchronous
async def test_the_real_client_streams_a_chat_with_usage_at_the_end() -> None:
    async with running(reply=ids_of(TEXT)) as it, client_of(it) as client:
        stream = await client.chat.completions.create(
            model="demo",
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids_of(TEXT))
    assert all(chunk.usage is None for chunk in chunks[:-1])


@asynchronous
async def test_the_real_client_reads_completions_both_ways() -> None:
    async with running(reply=ids_of(TEXT)) as it, client_of(it) as client:
        answer = await client.completions.create(model="demo", prompt="Once", max_tokens=100)
        stream = await client.completions.create(model="demo", prompt=ids_of("Once"), max_tokens=100, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
    assert answer.choices[0].text == TEXT
    assert "".join(pieces) == TEXT


@asynchronous
async def test_a_stream_is_byte_for_byte_what_the_protocol_says() -> None:
    async with running(reply=[*ids_of("a"), *ids_of("b")]) as it:
        body = {"model": "demo", "messages": HI, "stream": True, "seed": 7}
        response = await it.http.post(CHAT, json=body)
    head = (
        f'{{"id":"chatcmpl-{response.headers["x-request-id"]}","object":"chat.completion.chunk",'
        f'"created":{events_of(response.text)[0]["created"]},"model":"demo","system_fingerprint":"numerics","choices":'
    )
    pieces = ['{"role":"assistant","content":""}', '{"content":"a"}', '{"content":"b"}']
    chunks = [
        f'data: {head}[{{"index":0,"delta":{piece},"logprobs":null,"finish_reason":null}}]}}\n\n' for piece in pieces
    ]
    last = f'data: {head}[{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"stop","stop_reason":null}}]'
    assert response.text.partition(',"staffetta"')[0] == "".join(chunks) + last
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["staffetta-decode-worker"] == "decode-0"
    assert response.text.endswith("}}\n\ndata: [DONE]\n\n")


@asynchronous
async def test_text_that_is_long_in_coming_is_bridged_by_comments() -> None:
    async with running(reply=None, keep_alive_s=0.02) as it:
        request = it.http.build_request("POST", CHAT, json={"messages": HI, "stream": True})
        sent = asyncio.ensure_future(it.http.send(request, stream=True))
        start = await it.worker.starts.get()
        it.worker.emit(start.request_id, ids_of("a"))
        async with aclosing(await sent) as response:
            lines = response.aiter_lines()
            while await anext(lines) != ": keep-alive":
                pass
            it.worker.emit(start.request_id, ids_of("b"), at=1, finish=common_pb2.FINISH_REASON_STOP)
            rest = [line async for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"


@asynchronous
async def test_an_answer_tells_of_its_relay() -> None:
    async with running(reply=ids_of(TEXT)) as it:
        response = await it.http.post(CHAT, json={"messages": HI, "seed": 5})
    answer = response.json()["staffetta"]
    assert answer["id"] == response.headers["x-request-id"]
    assert answer["seed"] == 5
    assert answer["handoff"]["transport"] == "shm"
    assert answer["handoff"]["handoff_bytes"] == 4096
    assert response.headers["staffetta-prefill-worker"] == "prefill-0"
    assert response.headers["staffetta-decode-worker"] == "decode-0"
    assert [part.partition(";")[0] for part in response.headers["server-timing"].split(", ")] == [
        "gateway",
        "queue",
        "prefill",
        "transfer",
        "decode",
    ]
    assert answer["timings"]["decode_s"] == 0.0004
    assert answer["timings"]["gateway_s"] > 0


@asynchronous
async def test_what_was_not_there_has_no_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.gateway.fakes.SUMMARY", decode_pb2.SequenceSummary())
    async with running(reply=ids_of("a")) as it:
        response = await it.http.post(CHAT, json={"messages": HI})
    assert response.headers["staffetta-decode-worker"] == "decode-0"
    assert "staffetta-prefill-worker" not in response.headers


@asynchronous
async def test_a_clients_request_id_is_echoed_and_an_unsafe_one_refused_by_name() -> None:
    async with running() as it:
        safe = await it.http.get("/health", headers={"x-request-id": "job:42 a_b-c"})
        none = await it.http.get("/health")
        unsafe = [await it.http.get("/health", headers={b"x-request-id": bad}) for bad in (b"na\xefve", b"a" * 129)]
    assert safe.headers["x-request-id"] == "job:42 a_b-c"
    assert (none.status_code, len(none.headers["x-request-id"])) == (200, 32)
    assert [(one.status_code, one.json()["error"]["param"]) for one in unsafe] == [(400, "x-request-id")] * 2
    assert [len(one.headers["x-request-id"]) for one in unsafe] == [32, 32]


@asynchronous
async def test_a_stop_string_cuts_the_text_and_cancels_the_worker() -> None:
    async with running(reply=ids_of("one two three four")) as it:
        body = {"messages": HI, "stop": ["two", "never"], "max_tokens": 50}
        response = await it.http.post(CHAT, json=body)
        answer = response.json()
        assert answer["choices"][0]["message"]["content"] == "one "
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["stop_reason"] == "two"
        assert answer["staffetta"]["handoff"]["decode_worker"] == "decode-0"
        assert it.num_in_flight() == 0


@asynchronous
async def test_a_worker_that_sums_up_too_late_is_told_in_the_log_with_the_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gateway.relay.SUMMARY_TIMEOUT_S", 0)
    caplog.set_level("INFO", "gateway.relay")
    async with running(reply=ids_of("one two three four")) as it:
        response = await it.http.post(CHAT, json={"messages": HI, "stop": "two", "max_tokens": 50})
    request_id = response.headers["x-request-id"]
    assert f"{request_id}: cut by a stop string, without the worker's summary: TimeoutError" in caplog.messages


@asynchronous
async def test_text_held_back_for_a_stop_string_comes_out_at_the_end() -> None:
    async with running(reply=ids_of("one tw")) as it:
        response = await it.http.post(CHAT, json={"messages": HI, "stop": "two"})
    assert response.json()["choices"][0]["message"]["content"] == "one tw"


@asynchronous
async def test_a_stop_string_counts_only_after_min_tokens() -> None:
    ids = ids_of("a b a b")
    async with running(reply=ids) as it:
        body = {"messages": HI, "stop": "b", "min_tokens": 2}
        response = await it.http.post(CHAT, json=body)
    assert response.json()["choices"][0]["message"]["content"] == "a b a "


@asynchronous
async def test_the_token_that_ends_a_choice_has_no_text() -> None:
    (letter,) = ids_of("x")
    async with running(reply=[*ids_of("a"), letter]) as it:
        response = await it.http.post(CHAT, json={"messages": HI, "stop_token_ids": [letter]})
    assert response.json()["choices"][0]["message"]["content"] == "a"
    assert response.json()["usage"]["completion_tokens"] == 2


@asynchronous
async def test_defaults_are_resolved_before_a_worker_sees_the_request() -> None:
    async with running(reply=ids_of("a")) as it:
        await it.http.post(CHAT, json={"messages": HI})
        chat = await it.worker.starts.get()
        await it.http.post(PLAIN, json={"prompt": "hi"})
        plain = await it.worker.starts.get()
        await it.http.post(PLAIN, json={"prompt": ids_of("hi"), "temperature": 0.5, "top_k": 3, "ignore_eos": True})
        asked = await it.worker.starts.get()
    assert chat.sampling.temperature == 0.0
    assert chat.sampling.max_tokens == 2048 - chat.num_prompt_tokens
    assert chat.sampling.HasField("seed")
    assert plain.sampling.max_tokens == 16
    assert list(asked.token_ids) == ids_of("hi")
    assert (asked.sampling.temperature, asked.sampling.top_k, asked.sampling.ignore_eos) == (0.5, 3, True)


@asynchronous
async def test_an_unseeded_request_gets_a_seed_of_its_own_which_is_returned() -> None:
    async with running(reply=ids_of("a")) as it:
        answers = [(await it.http.post(CHAT, json={"messages": HI})).json() for _ in range(2)]
        seeds = [(await it.worker.starts.get()).sampling.seed for _ in range(2)]
    assert [answer["staffetta"]["seed"] for answer in answers] == seeds
    assert seeds[0] != seeds[1]
    assert max(seeds) < 2**63


@asynchronous
async def test_chat_logprobs_have_the_clients_shape() -> None:
    async with running(reply=ids_of("ab")[:1]) as it, client_of(it) as client:
        answer = await client.chat.completions.create(
            model="demo",
            messages=HI,
            logprobs=True,
            top_logprobs=2,
        )
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    (entry,) = answer.choices[0].logprobs.content
    assert entry.logprob == -0.5
    assert entry.bytes == list(entry.token.encode())
    assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.5]


@asynchronous
async def test_completion_logprobs_have_the_clients_shape_and_offsets_that_grow() -> None:
    async with running(reply=ids_of("one two")) as it, client_of(it) as client:
        answer = await client.completions.create(model="demo", prompt="x", logprobs=1)
        stream = await client.completions.create(model="demo", prompt="x", logprobs=1, stream=True)
        streamed = [chunk.choices[0].logprobs async for chunk in stream if chunk.choices[0].logprobs]
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == "one two"
    assert found.token_logprobs == [-0.5] * len(found.tokens)
    lengths = [len(token) for token in found.tokens]
    assert found.text_offset == [sum(lengths[:rank]) for rank in range(len(lengths))]
    assert [offset for piece in streamed for offset in piece.text_offset or []] == found.text_offset


@asynchronous
async def test_token_ids_are_returned_on_request() -> None:
    reply = ids_of(TEXT)
    async with running(reply=reply) as it:
        chat = await it.http.post(CHAT, json={"messages": HI, "return_token_ids": True})
        plain = await it.http.post(PLAIN, json={"prompt": "hi", "return_token_ids": True})
        stream = await it.http.post(PLAIN, json={"prompt": "hi", "return_token_ids": True, "stream": True})
    assert chat.json()["choices"][0]["token_ids"] == reply
    assert chat.json()["prompt_token_ids"][0] == 1
    assert plain.json()["choices"][0]["prompt_token_ids"] == ids_of("hi")
    streamed = [event["choices"][0].get("token_ids", []) for event in events_of(stream.text)]
    assert [token_id for ids in streamed for token_id in ids] == reply


@asynchronous
async def test_a_long_prompt_travels_in_parts_and_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staffetta.rpc.session.TOKEN_IDS_PER_MESSAGE", 300)
    ids = [7 + rank % 900 for rank in range(2000)]
    async with running(reply=ids_of("a")) as it:
        response = await it.http.post(PLAIN, json={"prompt": ids, "max_tokens": 1})
        start = await it.worker.starts.get()
        # The stand-in answers when the first part is there.
        await eventually(lambda: len(it.worker.prompts[start.request_id]) == len(ids))
    assert response.json()["usage"]["prompt_tokens"] == 2000
    assert (len(start.token_ids), start.num_prompt_tokens) == (300, 2000)
    assert it.worker.prompts[start.request_id] == ids


@asynchronous
async def test_models_and_readiness_follow_the_workers() -> None:
    async with running(reply=ids_of("a")) as it, client_of(it) as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
        assert (await client.models.retrieve("demo")).owned_by == "staffetta"
        assert (await it.http.get("/ready")).status_code == 200
        assert (await it.http.get("/version")).json() == {"version": "0.1.0"}
    async with running(has_worker=False) as it:
        ready = await it.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"status": "not ready", "reason": "no decode worker has a session"}
        assert (await it.http.get("/health")).status_code == 200


@asynchronous
async def test_metrics_read_what_dashboards_read() -> None:
    async with running(reply=ids_of("ab")) as it:
        await it.http.post(CHAT, json={"messages": HI})
        page = (await it.http.get("/metrics")).text
    count = len(ids_of("ab"))
    assert 'vllm:request_success_total{finished_reason="stop",model_name="demo"} 1.0' in page
    assert f'vllm:generation_tokens_total{{model_name="demo"}} {count}.0' in page
    assert 'vllm:num_requests_running{model_name="demo"} 0.0' in page
    assert 'vllm:time_to_first_token_seconds_count{model_name="demo"} 1.0' in page
    assert f'vllm:inter_token_latency_seconds_count{{model_name="demo"}} {count - 1}.0' in page
    blocks = {"free": 70, "cached": 30, "held": 24, "quarantined": 4}
    for state, num_blocks in blocks.items():
        assert f'staffetta_kv_blocks{{state="{state}",worker="decode-0"}} {num_blocks}.0' in page
    assert f'vllm:kv_cache_usage_perc{{model_name="demo",worker="decode-0"}} {28 / 128}' in page
    for stage, seconds in {"queue": 0.0001, "prefill": 0.0002, "transfer": 0.0003}.items():
        assert f'staffetta_handoff_seconds_sum{{stage="{stage}"}} {seconds}' in page
    assert 'staffetta_recomputed_tokens_total{reason="preemption"} 6.0' in page
    assert "_created" not in page
    assert 'staffetta_handoff_bytes_sum{transport="shm"} 4096.0' in page


@pytest.mark.parametrize("path", [CHAT, PLAIN])
@asynchronous
async def test_max_tokens_ends_with_length(path: str) -> None:
    async with running(reply=ids_of(TEXT)) as it:
        response = await it.http.post(path, json={"messages": HI, "prompt": "hi", "max_tokens": 2})
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.json()["usage"]["completion_tokens"] == 2
