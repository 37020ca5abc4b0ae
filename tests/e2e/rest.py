"""Asks the REST door through the real `openai` client, whole and streamed."""

from typing import Any

from openai import AsyncOpenAI

from tests.e2e.answers import Answer, Handoff


def open_rest(address: str) -> AsyncOpenAI:
    """A client that tries once: a retry would hide what the door said. The caller closes it."""
    return AsyncOpenAI(base_url=f"http://{address}/v1", api_key="unused", max_retries=0, timeout=60.0)


async def chat(client: AsyncOpenAI, content: str, **parameters: Any) -> Answer:
    """One user message, answered in one piece."""
    answer: Any = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}], temperature=0.0, **parameters
    )
    (choice,) = answer.choices
    return Answer(
        text=choice.message.content,
        token_ids=(),
        logprobs=(),
        finish_reason=choice.finish_reason,
        prompt_tokens=answer.usage.prompt_tokens,
        cached_tokens=answer.usage.prompt_tokens_details.cached_tokens,
        handoff=Handoff.from_json(answer.staffetta["handoff"]),
    )


async def chat_streamed(client: AsyncOpenAI, content: str, **parameters: Any) -> Answer:
    """One user message, answered as a stream with the usage chunk at its end."""
    chunks: list[Any] = []
    async with await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
        **parameters,
    ) as stream:
        chunks.extend([chunk async for chunk in stream])
    *deltas, usage = chunks
    last = deltas[-1]
    assert usage.choices == [], "the last chunk counts what was used and has no choice"
    assert [chunk.choices[0].finish_reason for chunk in deltas[:-1]] == [None] * (len(deltas) - 1)
    return Answer(
        text="".join(chunk.choices[0].delta.content or "" for chunk in deltas),
        token_ids=(),
        logprobs=(),
        finish_reason=last.choices[0].finish_reason,
        prompt_tokens=usage.usage.prompt_tokens,
        cached_tokens=usage.usage.prompt_tokens_details.cached_tokens,
        handoff=Handoff.from_json(last.staffetta["handoff"]),
    )
