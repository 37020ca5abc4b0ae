"""Random histories of a whole engine on a tiny pool, against what a lone run of each request gives."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from engine.cache.source import AttemptId
from engine.engine import Engine
from engine.fake import FakeRunner, FakeSource, expected_tokens
from engine.request import FinalBlock, FinishReason, Request, RequestId, RequestKind, SampledToken, SequenceOutput
from staffetta.errors import HandoffFailedError, StaffettaError, StepFailedError
from tests.engine.making import BLOCK_SIZE, make_hasher, make_limits, make_request, make_sampling

NUM_BLOCKS = 7


@dataclass
class Client:
    """What whoever sent a request has received."""

    request: Request
    tokens: list[SampledToken] = field(default_factory=list)
    blocks: list[FinalBlock] = field(default_factory=list)
    ending: SequenceOutput | None = None
    is_held: bool = False


class History:
    """An engine, its source and its clients, and the random moves they make."""

    def __init__(self, seed: int, *, has_source: bool) -> None:
        self.rng = random.Random(seed)
        self.runner = FakeRunner(block_size=BLOCK_SIZE)
        self.source = FakeSource(self.runner, block_size=BLOCK_SIZE)
        self.engine = Engine(
            self.runner,
            num_blocks=NUM_BLOCKS,
            hasher=make_hasher(),
            limits=make_limits(
                max_batch_tokens=self.rng.choice([3, 7, 12, 64]),
                max_sequences=self.rng.choice([1, 3, 8]),
                max_requests=12,
                prefix_caching=self.rng.random() < 0.8,
            ),
            source=self.source if has_source else None,
        )
        self.clients: dict[RequestId, Client] = {}
        self.failing: set[RequestId] = set()

    def make_random_move(self) -> None:
        moves = [self.step] * 8 + [self.add] * 3 + [self.grant] * 2 + [self.release, self.move_source, self.move_source]
        moves += [self.cancel, self.fail] if self.rng.random() < 0.2 else []
        self.rng.choice(moves)()

    def add(self) -> None:
        rng = self.rng
        shared = rng.randrange(0, 17)
        prompt = (*range(shared), *(rng.randrange(3) for _ in range(rng.randrange(1, 9))))[: 4 * NUM_BLOCKS - 6]
        first = rng.choice([0, 0, 0, min(2, len(prompt))])
        request = make_request(
            f"r{len(self.clients)}",
            prompt,
            kind=rng.choice([RequestKind.GENERATE, RequestKind.GENERATE, RequestKind.PREFILL]),
            sampling=make_sampling(
                max_tokens=first + rng.randrange(1, 8), min_tokens=rng.randrange(4), stop=frozenset(range(9))
            ),
            priority=rng.choice([0, 0, 1]),
            first_token_index=first,
        )
        if request.kind is RequestKind.GENERATE and rng.random() < 0.5:
            request = make_request(
                request.request_id,
                prompt,
                sampling=request.sampling,
                priority=request.priority,
                first_token_index=first,
                credit=rng.randrange(3),
            )
        before = self.engine.counts()
        try:
            self.engine.add(request)
        except StaffettaError as error:
            assert error.reason == "QUEUE_FULL", error
            assert self.engine.counts() == before
            return
        self.clients[request.request_id] = Client(request)

    def live(self) -> list[Client]:
        return [client for client in self.clients.values() if client.ending is None]

    def step(self) -> None:
        output = self.engine.step()
        self.engine.check_integrity()
        if output is None:
            return
        ids = [each.request_id for each in output.outputs]
        assert len(set(ids)) == len(ids)
        for each in output.outputs:
            self.receive(self.clients[each.request_id], each)

    def receive(self, client: Client, output: SequenceOutput) -> None:
        assert client.ending is None and not client.is_held, f"{output} after the end"
        assert output.tokens or output.final_blocks or output.finish_reason, f"{output} says nothing"
        client.tokens += output.tokens
        client.blocks += output.final_blocks
        self.check_tokens(client)
        # The first token of a hand-off comes whatever the credit; it is the engine's own tokens that wait.
        assert not output.tokens or client.request.credit is None or len(client.tokens) <= client.request.credit
        if client.request.kind is RequestKind.PREFILL and output.tokens:
            client.is_held = True
            self.check_blocks(client)
            assert output.finish_reason is None and output.stats is not None
        elif output.finish_reason is not None:
            client.ending = output
            self.check_ending(client, output)

    def wanted(self, client: Client) -> list[SampledToken]:
        return list(expected_tokens(client.request))

    def natural_reason(self, client: Client) -> FinishReason:
        is_stop = self.wanted(client)[-1].token_id in client.request.sampling.stop_token_ids
        return FinishReason.STOP if is_stop else FinishReason.LENGTH

    def check_tokens(self, client: Client) -> None:
        assert client.tokens == self.wanted(client)[: len(client.tokens)]

    def check_ending(self, client: Client, output: SequenceOutput) -> None:
        assert output.stats is not None
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert client.tokens == self.wanted(client)
            assert output.finish_reason is self.natural_reason(client)
        elif output.finish_reason is FinishReason.ERROR and not isinstance(output.error, HandoffFailedError):
            assert isinstance(output.error, StepFailedError)
            assert client.request.request_id in self.failing

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
            if client.is_held and client.ending is None:
                client.ending = SequenceOutput(client.request.request_id)
            self.engine.check_integrity()

    def fail(self) -> None:
        if live := self.live():
            request_id = self.rng.choice(live).request.request_id
            self.failing.add(request_id)
            self.runner.failing.add(request_id)

    def grant(self) -> None:
        if live := [c for c in self.live() if c.request.credit is not None]:
            self.give(self.rng.choice(live), self.rng.randrange(1, 4))

    def give(self, client: Client, num_tokens: int) -> None:
        self.engine.grant(client.request.request_id, 0, num_tokens)
        request = client.request
        assert request.credit is not None
        client.request = Request(
            request.request_id,
            request.kind,
            request.prompt_token_ids,
            request.sampling,
            request.arrival,
            priority=request.priority,
            credit=request.credit + num_tokens,
            first_token_index=request.first_token_index,
        )

    def release(self) -> None:
        if held := [c for c in self.live() if c.is_held]:
            self.let_go(self.rng.choice(held))

    def let_go(self, client: Client) -> None:
        self.check_blocks(client)  # nobody wrote into them while they were held
        self.engine.release(client.request.request_id)
        self.engine.release(client.request.request_id)
        client.ending = SequenceOutput(client.request.request_id)
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
        if self.rng.random() < 0.15 and not (is_complete and attempt.has_sent_tokens):
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
                self.deliver_first_token(attempt_id)
            case "fail":
                error = HandoffFailedError("forbidden to recompute") if self.rng.random() < 0.2 else None
                self.source.fail(attempt_id, error)
            case "quiesce":
                self.source.quiesce(attempt_id)

    def deliver_first_token(self, attempt_id: AttemptId) -> None:
        """The client has the token at once, unless an earlier attempt brought it."""
        (token,) = self.source.send_first_tokens(attempt_id)
        client = self.clients[self.source.attempts[attempt_id].request.request_id]
        if client.ending is None and not client.tokens:
            client.tokens.append(token)
            assert client.tokens == self.wanted(client)[:1]

    def settle(self) -> None:
        """Everything goes well from now on: every request must come to its end, and every block back."""
        for _ in range(600):
            for client in self.live():
                if client.is_held:
                    self.let_go(client)
                elif client.request.credit is not None:
                    self.give(client, 3)
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
@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_every_request_ends_as_if_alone_and_every_block_comes_back(first_seed: int, has_source: bool) -> None:
    for seed in range(first_seed, first_seed + 50):
        history = History(seed, has_source=has_source)
        try:
            for _ in range(120):
                history.make_random_move()
            history.settle()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


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

    @rule(seed=st.integers(0, 2**16), move=st.sampled_from(["grant", "release", "cancel", "fail"]))
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
