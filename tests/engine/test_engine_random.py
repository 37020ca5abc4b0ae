"""Random histories of a whole engine on a tiny pool, against what a lone run of each request gives."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from engine.cache.source import AttemptId
from engine.engine import Engine
from engine.fake import FakeSource, expected_prompt_tokens, expected_tokens
from engine.request import (
    FinalBlock,
    FinishReason,
    PromptToken,
    Request,
    RequestId,
    RequestKind,
    SampledToken,
    SequenceOutput,
)
from engine.sequence import SequenceId
from staffetta.errors import HandoffFailedError, StaffettaError, StepFailedError
from tests.engine.background import BackgroundFakeRunner
from tests.engine.making import BLOCK_SIZE, make_hasher, make_limits, make_request, make_sampling

NUM_BLOCKS = 7


@dataclass
class Client:
    """What whoever sent a request has received, by choice."""

    request: Request
    wanted: dict[int, list[SampledToken]] = field(init=False)
    tokens: dict[int, list[SampledToken]] = field(init=False)
    endings: dict[int, SequenceOutput] = field(default_factory=dict)
    credit: dict[int, int] = field(init=False)
    prompt_tokens: list[PromptToken] = field(default_factory=list)
    blocks: list[FinalBlock] = field(default_factory=list)
    is_held: bool = False
    is_released: bool = False

    def __post_init__(self) -> None:
        choices = self.request.choices
        self.wanted = {choice: list(expected_tokens(self.request, choice)) for choice in choices}
        self.tokens = {choice: [] for choice in choices}
        self.credit = dict.fromkeys(choices, 10**9 if self.request.credit is None else self.request.credit)

    @property
    def is_over(self) -> bool:
        """Whether every choice has its ending; a prefill has one for all."""
        return self.is_released or len(self.endings) == len(self.request.choices)

    def natural_reason(self, choice: int) -> FinishReason:
        is_stop = self.wanted[choice][-1].token_id in self.request.sampling.stop_token_ids
        return FinishReason.STOP if is_stop else FinishReason.LENGTH

    def take_first_tokens(self, tokens: Iterable[SampledToken]) -> None:
        """Delivered elsewhere, and with them whatever the prompt's log-probabilities lacked."""
        for choice, token in zip(self.request.choices, tokens, strict=True):
            self.tokens[choice] = [token]
            assert self.wanted[choice][:1] == [token]
        self.prompt_tokens = list(expected_prompt_tokens(self.request))


class InterruptedRunner(BackgroundFakeRunner):
    """Raises KeyboardInterrupt, after it has computed, as often as `num_interrupts` says."""

    num_interrupts = 0

    def about_to_return(self) -> None:
        if self.num_interrupts:
            self.num_interrupts -= 1
            raise KeyboardInterrupt


class History:
    """An engine, its source and its clients, and the random moves they make."""

    def __init__(self, seed: int, *, has_source: bool) -> None:
        self.rng = random.Random(seed)
        self.runner = InterruptedRunner(block_size=BLOCK_SIZE, is_prompt=lambda: self.rng.random() < 0.5)
        self.source = FakeSource(self.runner, block_size=BLOCK_SIZE)
        self.engine = Engine(
            self.runner,
            num_blocks=NUM_BLOCKS,
            hasher=make_hasher(),
            limits=make_limits(
                max_batch_tokens=self.rng.choice([3, 7, 12, 64]),
                max_sequences=self.rng.choice([1, 3, 8]),
                max_requests=16,
                prefix_caching=self.rng.random() < 0.8,
            ),
            source=self.source if has_source else None,
        )
        self.clients: dict[RequestId, Client] = {}
        self.failing: set[RequestId | SequenceId] = set()
        self.make = self.make_stream if self.rng.random() < 0.5 else self.make_any
        """Streams that only generate let steps be begun ahead, but for what happens meanwhile."""

    def make_random_move(self) -> None:
        moves = [self.step] * 8 + [self.add] * 3 + [self.grant] * 2 + [self.release, self.move_source, self.move_source]
        moves += [self.cancel, self.fail, self.interrupt] if self.rng.random() < 0.2 else []
        moves += [self.hold] if self.rng.random() < 0.5 else []
        self.rng.choice(moves)()

    def make_stream(self) -> Request:
        rng = self.rng
        return make_request(
            f"r{len(self.clients)}",
            tuple(rng.randrange(3) for _ in range(rng.randrange(1, 6))),
            sampling=make_sampling(max_tokens=rng.randrange(1, 16), stop=frozenset(range(3))),
            credit=rng.randrange(8) if rng.random() < 0.2 else None,
        )

    def make_any(self) -> Request:
        rng = self.rng
        shared = rng.randrange(0, 17)
        prompt = (*range(shared), *(rng.randrange(3) for _ in range(rng.randrange(1, 9))))[: 4 * NUM_BLOCKS - 6]
        first = rng.choice([0, 0, 0, min(2, len(prompt))])
        num_choices = rng.choice([1, 1, 2, 3, 4]) if first == 0 else 1
        kind = rng.choice([RequestKind.GENERATE, RequestKind.GENERATE, RequestKind.PREFILL])
        return make_request(
            f"r{len(self.clients)}",
            prompt,
            kind=kind,
            sampling=make_sampling(
                max_tokens=first + rng.randrange(1, 8),
                min_tokens=rng.randrange(4),
                stop=frozenset(range(9)),
                num_prompt_logprobs=rng.choice([None, None, 0, 2]),
                presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            ),
            priority=rng.choice([0, 0, 1]),
            credit=rng.randrange(3) if kind is RequestKind.GENERATE and rng.random() < 0.5 else None,
            first_token_index=first,
            choices=tuple(sorted(rng.sample(range(6), num_choices))),
        )

    def add(self) -> None:
        request = self.make()
        before = self.engine.counts()
        try:
            self.engine.add(request)
        except StaffettaError as error:
            assert error.reason == "QUEUE_FULL", error
            assert self.engine.counts() == before
            return
        self.clients[request.request_id] = Client(request)

    def live(self) -> list[Client]:
        return [client for client in self.clients.values() if not client.is_over]

    def step(self) -> None:
        if self.rng.random() < 0.8:
            self.engine.go_on()
        try:
            output = self.engine.step()
        except KeyboardInterrupt:
            self.engine.check_integrity()
            return
        self.engine.check_integrity()
        if output is None:
            return
        ids = [(each.request_id, each.choice_index) for each in output.outputs]
        assert len(set(ids)) == len(ids)
        for each in output.outputs:
            self.receive(self.clients[each.request_id], each)

    def receive(self, client: Client, output: SequenceOutput) -> None:
        request, choice = client.request, output.choice_index
        assert choice not in client.endings and not client.is_over and not client.is_held, f"{output} after the end"
        assert output.tokens or output.final_blocks or output.prompt_tokens or output.finish_reason, f"{output} is mute"
        assert choice == request.choices[0] or not output.prompt_tokens
        client.prompt_tokens += output.prompt_tokens
        assert client.prompt_tokens == list(expected_prompt_tokens(request))[: len(client.prompt_tokens)]
        client.blocks += output.final_blocks
        if output.tokens:
            assert client.prompt_tokens == list(expected_prompt_tokens(request))
        if request.kind is RequestKind.PREFILL:
            self.receive_prefill(client, output)
            return
        client.tokens[choice] += output.tokens
        assert client.tokens[choice] == client.wanted[choice][: len(client.tokens[choice])]
        # First tokens of a hand-off come whatever the credit; it is the engine's own tokens that wait.
        assert not output.tokens or len(client.tokens[choice]) <= client.credit[choice]
        if output.finish_reason is not None:
            client.endings[choice] = output
            self.check_ending(client, output)

    def receive_prefill(self, client: Client, output: SequenceOutput) -> None:
        assert output.choice_index == client.request.choices[0]
        if output.tokens:
            client.is_held = True
            self.check_blocks(client)
            assert list(output.tokens) == [client.wanted[choice][0] for choice in client.request.choices]
            assert output.finish_reason is None and output.stats is not None
        elif output.finish_reason is not None:
            client.is_released = True
            self.check_ending(client, output)

    def check_ending(self, client: Client, output: SequenceOutput) -> None:
        choice = output.choice_index
        assert output.stats is not None
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert client.tokens[choice] == client.wanted[choice]
            assert output.finish_reason is client.natural_reason(choice)
        elif output.finish_reason is FinishReason.ERROR and not isinstance(output.error, HandoffFailedError):
            assert isinstance(output.error, StepFailedError)
            request_id = client.request.request_id
            assert not self.failing.isdisjoint({request_id, SequenceId(request_id, choice)} | self.first_names(client))

    def first_names(self, client: Client) -> set[RequestId | SequenceId]:
        """Before the fork, the first choice's name is that of all; first tokens may be known, and drawn again."""
        is_forked = any(len(tokens) > 1 for tokens in client.tokens.values())
        return set() if is_forked else {SequenceId(client.request.request_id, client.request.choices[0])}

    def check_blocks(self, client: Client) -> None:
        prompt = client.request.prompt_token_ids
        assert [b.block_index for b in client.blocks] == list(range(-(-len(prompt) // BLOCK_SIZE)))
        assert sum(b.num_tokens for b in client.blocks) == len(prompt)
        chain = make_hasher().chain(prompt)
        assert [b.chain_hash for b in client.blocks if b.num_tokens == BLOCK_SIZE] == chain
        assert self.runner.holds([b.block_id for b in client.blocks], prompt)

    def cancel(self) -> None:
        if self.clients:
            client = self.rng.choice(list(self.clients.values()))
            self.engine.cancel(client.request.request_id)
            client.is_released = client.is_released or client.is_held
            self.engine.check_integrity()

    def fail(self) -> None:
        if live := self.live():
            request = self.rng.choice(live).request
            name = SequenceId(request.request_id, self.rng.choice(request.choices))
            self.failing.add(name if self.rng.random() < 0.5 else request.request_id)
            self.runner.failing |= self.failing

    def interrupt(self) -> None:
        """A step that raises is undone; the next one is as if it had not been. No block is lost or written twice."""
        self.runner.num_interrupts = 1

    def hold(self) -> None:
        """No step follows until one of the next turns: news has come, and is taken in by then or after."""
        self.engine.hold()

    def grant(self) -> None:
        if live := [c for c in self.live() if c.request.credit is not None]:
            client = self.rng.choice(live)
            self.give(client, self.rng.choice(client.request.choices), self.rng.randrange(1, 4))

    def give(self, client: Client, choice: int, num_tokens: int) -> None:
        self.engine.grant(client.request.request_id, choice, num_tokens)
        client.credit[choice] += num_tokens

    def release(self) -> None:
        if held := [c for c in self.live() if c.is_held]:
            self.let_go(self.rng.choice(held))

    def let_go(self, client: Client) -> None:
        self.check_blocks(client)  # nobody wrote into them while they were held
        self.engine.release(client.request.request_id)
        self.engine.release(client.request.request_id)
        client.is_released = True
        self.engine.check_integrity()

    def move_source(self) -> None:
        moves = [(name, a.attempt_id) for a in self.source.attempts.values() for name in self.legal_moves(a.attempt_id)]
        if moves:
            self.make_source_move(*self.rng.choice(moves))

    def legal_moves(self, attempt_id: AttemptId) -> list[str]:
        attempt = self.source.attempts[attempt_id]
        num_tokens = len(attempt.request.prompt_token_ids)
        is_complete = attempt.block_ids is not None and attempt.is_quiesced and not attempt.is_over
        if attempt.is_over:
            return ["quiesce"] if attempt.block_ids is not None and not attempt.is_quiesced else []
        moves = []
        if not attempt.is_ready:
            moves.append("ready")
        if attempt.block_ids is not None and not is_complete:
            moves.append("land")
            assert attempt.num_landed_tokens <= num_tokens
        if not attempt.has_sent_tokens:
            moves.append("token")
        if self.rng.random() < (0.3 if attempt.has_sent_tokens else 0.15) and not (
            is_complete and attempt.has_sent_tokens
        ):
            moves.append("fail")
        return moves

    def make_source_move(self, name: str, attempt_id: AttemptId) -> None:
        attempt = self.source.attempts[attempt_id]
        match name:
            case "ready":
                self.source.ready(attempt_id)
            case "land":
                num_tokens = len(attempt.request.prompt_token_ids)
                self.source.land(attempt_id, self.rng.randint(attempt.num_landed_tokens, num_tokens))
            case "token":
                self.deliver_first_tokens(attempt_id)
            case "fail":
                error = HandoffFailedError("forbidden to recompute") if self.rng.random() < 0.2 else None
                self.source.fail(attempt_id, error)
            case "quiesce":
                self.source.quiesce(attempt_id)

    def deliver_first_tokens(self, attempt_id: AttemptId) -> None:
        """The client has the tokens at once, unless an earlier attempt brought them."""
        tokens = self.source.send_first_tokens(attempt_id)
        client = self.clients[self.source.attempts[attempt_id].request.request_id]
        if not client.is_over and not any(client.tokens.values()):
            client.take_first_tokens(tokens)

    def settle(self) -> None:
        """Everything goes well from now on: every request must come to its end, and every block back."""
        for _ in range(900):
            for client in self.live():
                if client.is_held:
                    self.let_go(client)
                elif client.request.credit is not None:
                    for choice in client.request.choices:
                        self.give(client, choice, 3)
            for attempt in list(self.source.attempts.values()):
                moves = [move for move in self.legal_moves(attempt.attempt_id) if move != "fail"]
                if moves:
                    self.make_source_move(moves[0], attempt.attempt_id)
            self.step()
            if not self.engine.has_work() and not self.live():
                break
        self.step()
        for attempt in list(self.source.attempts.values()):
            if self.legal_moves(attempt.attempt_id) == ["quiesce"]:
                self.source.quiesce(attempt.attempt_id)
        self.step()
        assert not self.live(), f"without an ending: {self.live()}, {self.engine.counts()}"
        counts = self.engine.counts()
        assert (counts.held_blocks, counts.quarantined_blocks, counts.num_pending_tokens) == (0, 0, 0)
        assert counts.free_blocks + counts.cached_blocks == NUM_BLOCKS
        assert self.engine.step() is None


@pytest.mark.parametrize("has_source", [False, True], ids=["local", "with source"])
@pytest.mark.parametrize("first_seed", range(0, 160, 40))
def test_every_request_ends_as_if_alone_and_every_block_comes_back(first_seed: int, has_source: bool) -> None:
    num_ahead = 0
    for seed in range(first_seed, first_seed + 40):
        history = History(seed, has_source=has_source)
        try:
            for _ in range(120):
                history.make_random_move()
            history.settle()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        num_ahead += history.runner.num_ahead
    assert num_ahead > 50, "steps that are never begun ahead prove nothing about that"


class EngineMachine(RuleBasedStateMachine):
    """The same moves, chosen by hypothesis, so that a failure shrinks to a short history."""

    history: History

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.history = History(seed, has_source=True)

    @rule(seed=st.integers(0, 2**16))
    def add(self, seed: int) -> None:
        self.history.rng.seed(seed)
        self.history.add()

    @rule(seed=st.integers(0, 2**16))
    def move_source(self, seed: int) -> None:
        self.history.rng.seed(seed)
        self.history.move_source()

    @rule(seed=st.integers(0, 2**16), move=st.sampled_from(["grant", "release", "cancel", "fail", "interrupt", "hold"]))
    def command(self, seed: int, move: str) -> None:
        self.history.rng.seed(seed)
        getattr(self.history, move)()

    @rule(num_steps=st.integers(1, 3))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.history.step()

    def teardown(self) -> None:
        if hasattr(self, "history"):
            self.history.settle()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
