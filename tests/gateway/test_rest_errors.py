"""Refusals at the REST door: one body shape for all, the status, the param and the words; nothing dropped in
silence."""

import asyncio
import json
from collections.abc import AsyncIterator

import openai
import pytest

from staffetta.errors import QueueFullError
from staffetta.rpc.status import failure_of
from staffetta.v1 import common_pb2
from tests.gateway.running import asynchronous, ids_of, running

HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"

CHAT_REFUSALS: list[tuple[dict[str, object], int, str]] = [
    ({"messages": None}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": ["hi"]}, 400, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "root", "content": "hi"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 422, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"temperature": 2.5}, 400, "temperature"),
    ({"temperature": 10**400}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -1}, 400, "top_k"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
    ({"max_tokens": 5000}, 400, "messages"),
    ({"min_tokens": 9, "max_tokens": 5}, 400, "min_tokens"),
    ({"seed": -1}, 400, "seed"),
    ({"stop": [1]}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stop_token_ids": [4096]}, 400, "stop_token_ids"),
    ({"stop_token_ids": "1"}, 400, "stop_token_ids"),
    ({"logprobs": 5}, 400, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    ({"on_prefill_failure": "panic"}, 400, "on_prefill_failure"),
    ({"model": 5}, 400, "model"),
    ({"model": "gpt-x"}, 404, "model"),
    ({"n": 0}, 400, "n"),
    ({"n": 17}, 400, "n"),
    ({"n": 1.5}, 400, "n"),
    ({"n": 2, "best_of": 3}, 422, "best_of"),
    ({"use_beam_search": True}, 422, "use_beam_search"),
    ({"tools": [{}]}, 422, "tools"),
    ({"tool_choice": "required"}, 422, "tool_choice"),
    ({"logit_bias": {"1": 2}}, 422, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, 422, "response_format"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty"),
    ({"frequency_penalty": -2.5}, 400, "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"repetition_penalty": "1"}, 400, "repetition_penalty"),
    ({"prompt_logprobs": 21}, 400, "prompt_logprobs"),
    ({"prompt_logprobs": True}, 400, "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, 400, "prompt_logprobs"),
    ({"min_p": 0.1}, 422, "min_p"),
    ({"echo": True}, 422, "echo"),
    ({"chat_template": "{{ x }}"}, 422, "chat_template"),
]

PLAIN_REFUSALS: list[tuple[dict[str, object], int, str]] = [
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": [1, True]}, 400, "prompt"),
    ({"prompt": [1, 9999]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": ["a", "b"]}, 422, "prompt"),
    ({"prompt": [7] * 2048}, 400, "prompt"),
    ({"best_of": 2}, 422, "best_of"),
    ({"suffix": "end"}, 422, "suffix"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"logprobs": 21, "echo": True}, 400, "logprobs"),
    ({"logprobs": 5, "echo": True, "prompt_logprobs": -1}, 400, "prompt_logprobs"),
    ({"logprobs": 5, "echo": True, "prompt_logprobs": 21}, 400, "prompt_logprobs"),
    ({"echo": 1}, 400, "echo"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"echo": True, "max_tokens": -1}, 400, "max_tokens"),
    ({"echo": True, "max_tokens": 0, "prompt": [7] * 2048}, 400, "prompt"),
]


@asynchronous
async def test_every_refusal_names_its_parameter_in_the_one_body_shape() -> None:
    async with running(reply=ids_of("a")) as it:
        for path, base, refusals in ((CHAT, {"messages": HI}, CHAT_REFUSALS), (PLAIN, {"prompt": "x"}, PLAIN_REFUSALS)):
            for change, status, param in refusals:
                body = json.dumps(base | change)
                response = await it.http.post(path, content=body, headers={"content-type": "application/json"})
                assert (response.status_code, response.json()["error"]["param"]) == (status, param), body[:200]
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                assert response.json()["error"]["message"]
        assert it.worker.starts.empty()
        assert it.num_in_flight() == 0


@asynchronous
async def test_neutral_values_of_what_is_not_supported_pass() -> None:
    neutral = {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "suffix": None,
        "echo": False,
        "min_p": 0,
    }
    async with running(reply=ids_of("a")) as it:
        response = await it.http.post(CHAT, json={"messages": HI} | neutral)
    assert response.status_code == 200
    assert "staffetta-ignored-params" not in response.headers


@asynchronous
async def test_ignored_parameters_are_named_with_the_nearest_name_and_bounded() -> None:
    unknown = {f"x{rank}": 1 for rank in range(40)}
    async with running(reply=ids_of("a")) as it:
        near = await it.http.post(CHAT, json={"messages": [{**HI[0], "name": "me"}], "max_token": 5, "us\r\ner": 1})
        many = await it.http.post(CHAT, json={"messages": HI, "stream": True} | unknown)
    assert near.headers["staffetta-ignored-params"] == "max_token (nearest: max_tokens), us__er, messages[0].name"
    assert many.headers["staffetta-ignored-params"].split(", ") == [*(f"x{rank}" for rank in range(16)), "..."]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b'{"seed": NaN}', b"[" * 100_000, b"\xff\xfe", b'{"seed": 1' + b"0" * 5000 + b"}"],
)
@asynchronous
async def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    async with running() as it:
        response = await it.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "JSON" in response.json()["error"]["message"]


@asynchronous
async def test_context_overflow_says_so_as_clients_expect() -> None:
    async with running() as it, openai.AsyncOpenAI(base_url=f"http://{it.http_address}/v1", api_key="x") as client:
        with pytest.raises(openai.BadRequestError) as refusal:
            await client.completions.create(model="demo", prompt=[7] * 2000, max_tokens=49)
    assert refusal.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 2048 tokens" in refusal.value.message


@asynchronous
async def test_http_mistakes_have_the_same_body() -> None:
    async with running(max_body_bytes=1000) as it:
        big = json.dumps({"prompt": "x" * 2000}).encode()

        async def in_pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(big), 100):
                yield big[at : at + 100]

        json_type = {"content-type": "application/json"}
        answers = [
            await it.http.get(CHAT),
            await it.http.post("/v1/nothing"),
            await it.http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}),
            await it.http.post(PLAIN, content=big, headers=json_type),
            await it.http.post(PLAIN, content=in_pieces(), headers=json_type),
        ]
    assert [answer.status_code for answer in answers] == [405, 404, 415, 413, 413]
    assert [answer.json()["error"]["code"] for answer in answers] == [
        "method_not_allowed",
        "unknown_url",
        "unsupported_media_type",
        "request_too_large",
        "request_too_large",
    ]
    assert answers[0].headers["allow"] == "POST"
    assert all(len(answer.headers["x-request-id"]) == 32 for answer in answers)


@asynchronous
async def test_without_a_worker_the_answer_is_503_with_a_hint_to_retry() -> None:
    async with running(has_worker=False, start_timeout_s=0.05, keep_alive_s=0.001) as it:
        plain = await it.http.post(CHAT, json={"messages": HI})
        stream = await it.http.post(CHAT, json={"messages": HI, "stream": True})
    for response in (plain, stream):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "no_worker"
        assert response.headers["content-type"] == "application/json"


@asynchronous
async def test_a_full_worker_and_a_full_gateway_are_429_with_a_hint_to_retry() -> None:
    async with running(reply=None) as it:
        it.worker.failure = failure_of(QueueFullError("the worker is full"))
        it.worker.reply = ids_of("a")
        worker_full = await it.http.post(CHAT, json={"messages": HI})
    async with running(max_requests=1) as it:
        with it.gateway.journeys.admission.held():
            gateway_full = await it.http.post(CHAT, json={"messages": HI})
    for response in (worker_full, gateway_full):
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"


@asynchronous
async def test_an_error_in_mid_stream_is_an_event_and_no_done_follows() -> None:
    async with running(reply=None) as it:
        request = it.http.build_request("POST", CHAT, json={"messages": HI, "stream": True})
        sent = asyncio.ensure_future(it.http.send(request, stream=True))
        start = await it.worker.starts.get()
        it.worker.emit(start.request_id, ids_of("a"))
        response = await sent
        lines = response.aiter_lines()
        assert '"role":"assistant"' in await anext(lines)
        await it.worker.stop()
        rest = [line async for line in lines if line]
    assert response.status_code == 200
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
    assert "data: [DONE]" not in rest


@asynchronous
async def test_a_defect_reveals_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(reply=ids_of("a")) as it:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("/etc/secret at 10.0.0.1")

        monkeypatch.setattr("gateway.journey.choose", fail)
        response = await it.http.post(CHAT, json={"messages": HI})
        assert it.num_in_flight() == 0
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


@asynchronous
async def test_a_defect_in_mid_stream_reveals_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise RuntimeError("/etc/secret at 10.0.0.1")

    monkeypatch.setattr("gateway.output.Output.flush", fail)
    async with running(reply=ids_of("a")) as it:
        response = await it.http.post(CHAT, json={"messages": HI, "stream": True})
        assert it.num_in_flight() == 0
    last = response.text.rstrip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["type"] == "server_error"
    assert "secret" not in response.text


@asynchronous
async def test_a_gap_in_a_workers_tokens_ends_the_request_and_a_duplicate_is_dropped() -> None:
    async with running(reply=None) as it:
        first, second = ids_of("a")[0], ids_of("b")[0]
        duplicate = asyncio.ensure_future(it.http.post(CHAT, json={"messages": HI}))
        start = await it.worker.starts.get()
        it.worker.emit(start.request_id, [first])
        it.worker.emit(start.request_id, [first, second], finish=common_pb2.FINISH_REASON_STOP)
        answer = (await duplicate).json()
        gap = asyncio.ensure_future(it.http.post(CHAT, json={"messages": HI}))
        start = await it.worker.starts.get()
        it.worker.emit(start.request_id, [first])
        it.worker.emit(start.request_id, [second], at=2)
        refused = await gap
    assert answer["choices"][0]["message"]["content"] == "ab"
    assert answer["usage"]["completion_tokens"] == 2
    assert refused.status_code == 500
