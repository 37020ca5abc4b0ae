"""A hand-off whose other side is a script: the real source, session and transport, and a prefill worker made of two
blocks of random bytes.
"""

import asyncio
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from decode_svc.decision import PeerView, PrefillPolicy
from decode_svc.handoff import Handoff
from decode_svc.peers import Peers, PeerSession
from decode_svc.source import HandoffSource, Route
from engine.cache.source import AttemptId, KVEvent, KVFailed, KVFirstTokens, KVLanded, KVQuiesced, KVReady
from engine.request import PromptToken, Request, RequestId, RequestKind, SampledToken, SamplingParams
from kvtransfer.checksum import head_checksums
from kvtransfer.layout import BlockId, KVGroup, KVLayout
from kvtransfer.loopback import LoopbackExporter, LoopbackReader
from kvtransfer.manifest import BlockEntry
from kvtransfer.memory import PoolMemory
from kvtransfer.ticket import TicketBook
from kvtransfer.transport import SelfTest
from staffetta.errors import HandoffFailedError, StaffettaError
from staffetta.hashing import BlockHasher
from staffetta.v1 import common_pb2, prefill_pb2
from tests.rpc.in_loop import until
from worker.codec import entry_to_proto

GROUP = KVGroup(kind="full", num_layers=1, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
LAYOUT = KVLayout("digest", (GROUP,))
HASHER = BlockHasher(b"k" * 16, block_size=4)
PROMPT = tuple(range(10, 17))  # a full block and one of three tokens
REMOTE_IDS = (2, 0)
LOCAL_IDS = (BlockId(1), BlockId(3))
ATTEMPT = AttemptId(1)
STOP = 99
"""A token that ends its choice."""
REQUEST_ID = RequestId("ab" * 16)


def make_request(
    *, choices: tuple[int, ...] = (0,), first_token_index: int = 0, num_prompt_logprobs: int | None = None
) -> Request:
    sampling = SamplingParams(
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        seed=0,
        max_tokens=5,
        min_tokens=0,
        stop_token_ids=frozenset({STOP}),
        num_logprobs=None,
        num_prompt_logprobs=num_prompt_logprobs,
    )
    return Request(
        REQUEST_ID,
        RequestKind.GENERATE,
        PROMPT,
        sampling,
        arrival=0,
        choices=choices,
        first_token_index=first_token_index,
    )


@dataclass(slots=True, eq=False)
class FakePipe:
    """Keeps what a session sends."""

    sent: list[prefill_pb2.PrefillSessionRequest] = field(default_factory=list)
    failure: StaffettaError | None = None

    def send(self, message: prefill_pb2.PrefillSessionRequest) -> None:
        self.sent.append(message)

    def fail(self, error: StaffettaError) -> None:
        self.failure = error

    def commands(self) -> list[str | None]:
        return [message.WhichOneof("command") for message in self.sent]


@dataclass(slots=True, eq=False)
class FakePeers:
    """The sessions that a source may use."""

    sessions: dict[str, PeerSession]
    views: tuple[PeerView, ...] = ()

    def session(self, worker_id: str) -> PeerSession | None:
        return self.sessions.get(worker_id)

    def refresh_views(self) -> None:
        self.views = tuple(PeerView(s.worker_id, len(s.handoffs)) for s in self.sessions.values())


@cache
def _pools() -> tuple[PoolMemory, PoolMemory]:
    """The two sides' memory. Making it takes longer than an attempt, and attempts are made by the thousand."""
    remote, local = PoolMemory(4, LAYOUT.page_bytes), PoolMemory(4, LAYOUT.page_bytes)
    remote.buffer[:] = random.Random(7).randbytes(4 * LAYOUT.page_bytes)
    return remote, local


class Script:
    """One attempt from `begin` on. What came of it is in `log`, in the order in which it happened."""

    def __init__(
        self,
        *,
        timeout_s: float = 60.0,
        limit_s: float = 600.0,
        may_recover: bool = True,
        num_held_tokens: int = 0,
        max_attempts: int = 3,
        request: Request | None = None,
    ) -> None:
        self.remote, self.local = _pools()
        self.local.buffer[:] = bytes(len(self.local.buffer))
        self.tickets = TicketBook()
        self.exporter = LoopbackExporter(self.remote, tickets=self.tickets)
        offer = self.exporter.offer()
        self.ticket = self.tickets.issue("r", {offer.session_key}, range(4), lease_s=600)
        self.pipe = FakePipe()
        reader = LoopbackReader(offer, self.local)
        self.session = PeerSession("prefill-0", cast(Any, self.pipe), reader, SelfTest("loopback", 1.0, 1))
        self.peers = FakePeers({"prefill-0": self.session})
        self.peers.refresh_views()
        self.log: list[KVEvent | tuple[SampledToken, ...]] = []
        self.prompt_tokens: list[PromptToken] = []
        self.num_held_tokens = self.num_announced_tokens = num_held_tokens
        self.num_grants = 0
        self.num_wrong_landings = 0
        self.source = HandoffSource(
            PrefillPolicy("never", 0, max_attempts),
            memory=self.local,
            layout=LAYOUT,
            timeout_s=timeout_s,
            limit_s=limit_s,
            lease_s=30.0,
            on_first_tokens=lambda request_id, tokens: self.log.append(tokens),
            on_prompt_tokens=lambda request_id, tokens: self.prompt_tokens.extend(tokens),
            wake_engine=self._poll,
        )
        self.source.use(cast(Peers, self.peers))
        self.route = Route("", may_recover, common_pb2.SamplingParams())
        self.source.add_route(REQUEST_ID, self.route)
        self.request = make_request() if request is None else request

    def _poll(self) -> None:
        for event in self.source.poll():
            self.log.append(event)
            if isinstance(event, KVLanded):
                self.num_wrong_landings += not self.has_bytes(event.num_tokens)

    def has_bytes(self, num_tokens: int) -> bool:
        """Whether the granted blocks hold the prefill worker's bytes of the first `num_tokens` tokens."""
        first = self.num_held_tokens // 4
        last = -(-num_tokens // 4)
        return all(
            self.local.block(LOCAL_IDS[index]) == self.remote.block(BlockId(REMOTE_IDS[index]))
            for index in range(first, last)
        )

    # The script's moves

    async def begin(self, attempt_id: AttemptId = ATTEMPT) -> None:
        offer = self.source.lookup(self.request, num_cached_tokens=0, num_known_tokens=7)
        assert offer is not None, "a peer is there"
        self.source.begin(attempt_id, self.request, num_cached_tokens=self.num_held_tokens)
        await self.settle()

    def handoff(self) -> Handoff | None:
        handoffs = tuple(self.session.handoffs.values())
        return handoffs[0] if handoffs else None

    def tell(self, **event: Any) -> None:
        """Delivers an event of the prefill worker, for a hand-off that may be over."""
        for handoff_id in tuple(self.session.handoffs) or ("over",):
            self.session.on_events([prefill_pb2.PrefillEvent(handoff_id=handoff_id, **event)])

    def entry(self, index: int) -> BlockEntry:
        chain = HASHER.chain(PROMPT)
        return BlockEntry(
            block_id=BlockId(REMOTE_IDS[index]),
            block_index=index,
            num_tokens=(4, 3)[index],
            generation=1,
            chain_hash=chain[index] if index < len(chain) else b"",
            head_checksums=head_checksums(self.remote.block(BlockId(REMOTE_IDS[index])), GROUP),
        )

    def chunk(self, *indices: int, entries: Iterable[BlockEntry] | None = None) -> None:
        entries = [self.entry(index) for index in indices] if entries is None else entries
        blocks = [entry_to_proto(entry) for entry in entries]
        self.num_announced_tokens += sum(block.num_tokens for block in blocks)
        chunk = prefill_pb2.ChunkReady(
            ticket=self.ticket,
            blocks=blocks,
            num_ready_tokens=self.num_announced_tokens,
            is_last=self.num_announced_tokens == len(PROMPT),
        )
        self.tell(chunk_ready=chunk)

    def prompt_logprobs(self, *positions: int, token_ids: tuple[int, ...] = PROMPT) -> None:
        tokens = [common_pb2.Token(index=p, token_id=token_ids[p % len(token_ids)], logprob=-p) for p in positions]
        self.tell(prompt_logprobs=prefill_pb2.PromptLogprobs(tokens=tokens))

    def first_tokens(self, *token_ids: int) -> None:
        """Sends the first token of each choice; of the one choice that there is unless the request says otherwise."""
        tokens = [common_pb2.Token(index=0, token_id=token_id) for token_id in token_ids or (42,)]
        self.tell(first_tokens=prefill_pb2.FirstTokens(tokens=tokens))

    def grant(self, attempt_id: AttemptId = ATTEMPT) -> None:
        self.num_grants += 1
        first = self.num_held_tokens // 4
        chain = tuple(HASHER.chain(PROMPT)[first:])
        self.source.grant(attempt_id, block_ids=LOCAL_IDS[first:], first_block_index=first, chain_hashes=chain)

    def fail(self) -> None:
        self.session.lose(HandoffFailedError("told to fail"))

    def abandon(self) -> None:
        self.source.abandon(ATTEMPT)

    def release_reads(self) -> None:
        self.exporter.faults.release()

    async def settle(self) -> None:
        """Lets the loop run until nothing moves any more: no step of an attempt takes more turns than this."""
        for _ in range(25):
            await asyncio.sleep(0)

    # What came of it

    def events(self, kind: type) -> list[Any]:
        return [entry for entry in self.log if isinstance(entry, kind)]

    def kinds(self) -> list[str]:
        """The log in short: "emit" and the events' names, KVLanded with its tokens."""
        return [
            "emit"
            if isinstance(entry, tuple)
            else f"landed {entry.num_tokens}{' last' * entry.is_last}"
            if isinstance(entry, KVLanded)
            else type(entry).__name__[2:].lower()
            for entry in self.log
        ]

    def check(self, *, is_abandoned: bool) -> None:
        """What must hold of an ended attempt, whatever happened in whatever order."""
        assert self.source.num_attempts() == 0
        assert self.session.handoffs == {}
        assert len(self.events(tuple)) == len(self.events(KVFirstTokens)) <= 1
        if self.events(KVFirstTokens):
            assert self.kinds().index("emit") < self.kinds().index("firsttokens")
        landed: list[KVLanded] = self.events(KVLanded)
        counts = [event.num_tokens for event in landed]
        assert counts == sorted(set(counts))
        assert self.num_wrong_landings == 0
        has_landed = bool(landed) and landed[-1].is_last
        assert [event.is_last for event in landed[:-1]] == [False] * (len(landed) - 1) if landed else True
        has_failed = len(self.events(KVFailed))
        assert has_landed + has_failed <= 1
        assert has_landed or has_failed or is_abandoned
        assert len(self.events(KVReady)) <= 1
        assert len(self.events(KVQuiesced)) == (self.num_grants if not has_landed else 0)
        assert sum(count.count for count in self.source.counts()) == 1
        assert self.pipe.commands() == ["start", "release"]


async def ended(script: Script) -> None:
    """Waits until no attempt is left."""
    await until(lambda: script.source.num_attempts() == 0)
