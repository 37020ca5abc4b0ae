"""The relay under every order in which a worker's news of several choices may come: texts, endings, credit, cancels."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.metrics import Metrics
from gateway.prepare import prepare
from gateway.progress import Progress
from gateway.relay import Relay
from gateway.request import Delta, Finished, JourneyRequest, PromptLogprobs, TextPrompt
from gateway.session import DecodeSession, Pipe
from staffetta.v1 import common_pb2, decode_pb2
from staffetta.validate import Sampling
from tests.gateway.fakes import make_token
from tests.gateway.running import TIMEOUT_S, demo_model, ids_of

IDS = {letter: ids_of(letter)[0] for letter in "abc"}
PROMPT = ids_of("one two three")
CREDIT = 4


class ScriptedSession(DecodeSession):
    """A session on which a script plays the worker; commands are obeyed as they are sent."""

    def __init__(self, texts: Sequence[str]) -> None:
        async def unused(*_: object) -> None:
            raise NotImplementedError

        super().__init__(Pipe(unused, unused, heartbeat_s=1), "decode-0", numerics_digest="numerics")
        self.texts = texts
        self.num_sent = [0] * len(texts)
        self.credit = dict.fromkeys(range(len(texts)), CREDIT)
        """Of choices that the worker has not ended."""
        self.granted: list[int] = []
        self.cancelled: list[int] = []

    def send(self, command: decode_pb2.DecodeSessionRequest) -> None:
        """Grants and cancels; a start was expected."""
        if command.HasField("grant"):
            self.granted.append(command.grant.choice_index)
            if command.grant.choice_index in self.credit:
                self.credit[command.grant.choice_index] += command.grant.tokens
        elif command.HasField("cancel"):
            self.cancelled.append(command.cancel.choice_index)
            if command.cancel.choice_index in self.credit:
                self.end(command.cancel.choice_index, common_pb2.FINISH_REASON_CANCELLED)

    def can_advance(self, choice: int) -> bool:
        """Whether the worker has anything to say of a choice."""
        is_whole = self.num_sent[choice] == len(self.texts[choice])
        return choice in self.credit and (is_whole or self.credit[choice] > 0)

    def advance(self, choice: int, *, num_repeated: int) -> None:
        """The next token, after some that came before; or the end."""
        at = self.num_sent[choice]
        if at == len(self.texts[choice]):
            self.end(choice, common_pb2.FINISH_REASON_LENGTH)
            return
        tokens = [
            make_token(index, IDS[self.texts[choice][index]]) for index in range(max(0, at - num_repeated), at + 1)
        ]
        self.say(decode_pb2.SequenceEvent(choice_index=choice, tokens=tokens))
        self.num_sent[choice] += 1
        self.credit[choice] -= 1

    def end(self, choice: int, reason: common_pb2.FinishReason.ValueType) -> None:
        """A choice's last event."""
        del self.credit[choice]
        self.say(decode_pb2.SequenceEvent(choice_index=choice, finish_reason=reason))

    def say(self, event: decode_pb2.SequenceEvent) -> None:
        """One event of the only request."""
        for stream in self._streams.values():
            stream.put(event)


class Sink:
    """Takes text at once while `openings`, one after the other, say so; what it took stands among the events."""

    def __init__(self, openings: Iterator[bool]) -> None:
        self.openings = openings
        self.events: list[object] = []

    def is_open(self) -> bool:
        return next(self.openings, False)

    def put(self, choice_index: int, text: str) -> None:
        self.events.append(Delta(choice_index, text, ()))


async def relay(
    session: ScriptedSession,
    pick: Callable[[Sequence[int]], int],
    *,
    num_repeated: int,
    num_at_once: int,
    sampling: Sampling,
    sink: Sink,
) -> list[object]:
    """Every event of the relay, while `pick` says which choice the worker goes on with, `num_at_once` times before
    anybody else has a turn."""
    request = JourneyRequest(id="x", model="", prompt=TextPrompt("one two three"), sampling=sampling, arrival=0.0)
    model = demo_model()
    prepared = prepare(request, model, max_model_len=2048, cluster_key=bytes(16), block_sizes=())
    progress = Progress(request)
    progress.num_prompt_tokens = len(PROMPT)
    stream = session.start(decode_pb2.StartRequest(request_id="x", sampling=prepared.sampling), prepared.token_ids)
    if sampling.prompt_logprobs is not None:
        scores = [make_token(at, PROMPT[at], num_logprobs=0) for at in range(1, len(PROMPT))]
        session.say(decode_pb2.SequenceEvent(prompt_tokens=scores))

    async def play() -> None:
        while session.credit:
            for _ in range(num_at_once):
                if able := [choice for choice in session.credit if session.can_advance(choice)]:
                    session.advance(pick(able), num_repeated=num_repeated)
            await asyncio.sleep(0)

    worker = asyncio.create_task(play())
    it = Relay(progress, prepared, stream, text=model.text, metrics=Metrics("x"), credit_tokens=CREDIT, sink=sink)
    async for event in it.events():
        sink.events.append(event)
    stream.close()
    await worker
    return sink.events


@settings(deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 3), max_size=60),
    num_repeated=st.integers(0, 2),
    num_at_once=st.integers(1, 3),
)
def test_each_choice_has_its_text_and_one_ending_in_whatever_order_news_come(
    texts: list[str], picks: list[int], num_repeated: int, num_at_once: int
) -> None:
    session = ScriptedSession(texts)
    order = iter(picks)

    def pick(able: Sequence[int]) -> int:
        return able[next(order, 0) % len(able)]

    sampling = Sampling(n=len(texts), stop=("b",), max_tokens=50, prompt_logprobs=0)
    sink = Sink(itertools.repeat(True))  # stop strings and scores are no matter of text alone: it gets nothing
    work = relay(session, pick, num_repeated=num_repeated, num_at_once=num_at_once, sampling=sampling, sink=sink)
    events = asyncio.run(asyncio.wait_for(work, TIMEOUT_S))
    assert isinstance(events[0], PromptLogprobs)
    ended: list[int] = []
    text = dict.fromkeys(range(len(texts)), "")
    for event in events[1:]:
        assert isinstance(event, Delta | Finished)
        assert event.choice_index not in ended
        if isinstance(event, Delta):
            text[event.choice_index] += event.text
            continue
        ended.append(event.choice_index)
        whole = texts[event.choice_index]
        before, stop, _ = whole.partition("b")
        assert text[event.choice_index] == before
        assert (event.stop_string or "", event.usage.completion_tokens) == (stop, len(before + stop))
        is_cut = bool(stop)
        assert event.finish_reason == (common_pb2.FINISH_REASON_STOP if is_cut else common_pb2.FINISH_REASON_LENGTH)
    assert sorted(ended) == list(range(len(texts)))
    assert len(session.cancelled) == len(set(session.cancelled)), "a choice was cancelled twice"
    assert set(session.cancelled) <= {choice for choice, whole in enumerate(texts) if "b" in whole}
    for choice, whole in enumerate(texts):
        num_taken = len(whole.partition("b")[0])
        assert session.granted.count(choice) <= num_taken // (CREDIT // 2), "more was granted than was taken"
        assert session.num_sent[choice] <= num_taken + 1 + CREDIT


@settings(deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=12), min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 3), max_size=60),
    openings=st.lists(st.booleans(), max_size=60),
    num_repeated=st.integers(0, 2),
    num_at_once=st.integers(1, 3),
)
def test_text_is_the_same_and_in_order_whatever_of_it_goes_out_at_once(
    texts: list[str], picks: list[int], openings: list[bool], num_repeated: int, num_at_once: int
) -> None:
    session = ScriptedSession(texts)
    order = iter(picks)

    def pick(able: Sequence[int]) -> int:
        return able[next(order, 0) % len(able)]

    sink = Sink(iter(openings))
    sampling = Sampling(n=len(texts), max_tokens=50)
    work = relay(session, pick, num_repeated=num_repeated, num_at_once=num_at_once, sampling=sampling, sink=sink)
    text = [""] * len(texts)
    ended: list[int] = []
    for event in asyncio.run(asyncio.wait_for(work, TIMEOUT_S)):
        assert isinstance(event, Delta | Finished)
        assert event.choice_index not in ended
        if isinstance(event, Delta):
            text[event.choice_index] += event.text
        else:
            ended.append(event.choice_index)
            assert event.usage.completion_tokens == len(texts[event.choice_index])
    assert text == texts
    assert sorted(ended) == list(range(len(texts)))
    for choice, whole in enumerate(texts):
        assert session.granted.count(choice) <= len(whole) // (CREDIT // 2), "more was granted than was taken"
