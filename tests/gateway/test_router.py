"""The router as a pure function: who is chosen, who never is, and how ties break."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.router import DecodeView, Demand, Refusal, Route, Snapshot, WorkerView, choose, matched_tokens


def make_decode(worker_id: str = "d0", **changes: object) -> DecodeView:
    values: dict[str, object] = {
        "worker_id": worker_id,
        "block_size": 16,
        "num_available_blocks": 100,
        "max_requests": 8,
        "max_model_len": 2048,
        "links": frozenset({"p0", "p1"}),
    }
    return DecodeView(**(values | changes))  # type: ignore[arg-type]


def make_prefill(worker_id: str = "p0", **changes: object) -> WorkerView:
    return WorkerView(**({"worker_id": worker_id, "block_size": 16} | changes))  # type: ignore[arg-type]


def make_demand(**changes: object) -> Demand:
    values: dict[str, object] = {"num_prompt_tokens": 64, "max_tokens": 16, "hashes": {16: (1, 2, 3, 4)}}
    return Demand(**(values | changes))  # type: ignore[arg-type]


def test_without_workers_there_is_no_route() -> None:
    assert choose(Snapshot([], []), make_demand()) is Refusal.NO_WORKER
    assert choose(Snapshot([], [make_prefill()]), make_demand()) is Refusal.NO_WORKER


def test_a_decode_worker_alone_prefills_itself() -> None:
    assert choose(Snapshot([make_decode()], []), make_demand()) == Route("d0", None)


def test_a_decode_worker_that_must_not_prefill_waits_for_a_linked_prefill_worker() -> None:
    decode = make_decode(prefills_locally=False, links=frozenset({"p1"}))
    assert choose(Snapshot([decode], []), make_demand()) is Refusal.NO_WORKER
    assert choose(Snapshot([decode], [make_prefill("p0")]), make_demand()) is Refusal.NO_WORKER
    assert choose(Snapshot([decode], [make_prefill("p0"), make_prefill("p1")]), make_demand()) == Route("d0", "p1")


def test_the_less_loaded_pair_wins() -> None:
    decode = [make_decode("d0", num_sequences=3), make_decode("d1", num_sequences=1)]
    prefill = [make_prefill("p0", num_pending_tokens=10), make_prefill("p1", num_pending_tokens=500)]
    assert choose(Snapshot(decode, prefill), make_demand()) == Route("d1", "p0")


def test_a_cached_prefix_outweighs_as_much_load_as_it_spares() -> None:
    holder = make_prefill("p1", num_pending_tokens=47, cached_blocks={1, 2, 3})
    assert choose(Snapshot([make_decode()], [make_prefill("p0"), holder]), make_demand()) == Route("d0", "p1")
    busier = make_prefill("p1", num_pending_tokens=49, cached_blocks={1, 2, 3})
    assert choose(Snapshot([make_decode()], [make_prefill("p0"), busier]), make_demand()) == Route("d0", "p0")


def test_only_leading_blocks_count_as_a_match() -> None:
    hashes = {16: (1, 2, 3, 4)}
    assert matched_tokens(make_prefill(cached_blocks={1, 2, 4}), hashes) == 32
    assert matched_tokens(make_prefill(cached_blocks={2, 3, 4}), hashes) == 0
    assert matched_tokens(make_prefill(cached_blocks={1, 2, 3, 4, 9}), hashes) == 64
    assert matched_tokens(make_prefill(cached_blocks={1}, block_size=32), hashes) == 0


def test_a_prefix_that_decode_holds_already_is_not_counted_twice() -> None:
    decode = make_decode(cached_blocks={1, 2})
    prefill = [make_prefill("p0", cached_blocks={1, 2}), make_prefill("p1")]
    # p1 was never chosen; p0's cache spares nothing that decode does not spare.
    aged = [make_prefill("p0", cached_blocks={1, 2}, last_chosen=5), prefill[1]]
    assert choose(Snapshot([decode], aged), make_demand()) == Route("d0", "p1")


def test_a_worker_short_of_blocks_is_avoided() -> None:
    decode = [make_decode("d0", num_available_blocks=1), make_decode("d1", num_sequences=2)]
    assert choose(Snapshot(decode, []), make_demand()) == Route("d1", None)


def test_a_stalled_worker_is_chosen_only_when_nobody_else_can_be() -> None:
    stalled, busy = make_decode("d0", is_stalled=True), make_decode("d1", num_sequences=7, num_pending_tokens=9000)
    assert choose(Snapshot([stalled, busy], []), make_demand()) == Route("d1", None)
    assert choose(Snapshot([stalled], []), make_demand()) == Route("d0", None)


def test_workers_of_different_arithmetic_are_never_paired_whatever_their_links_say() -> None:
    decode = make_decode(numerics_digest="a")
    other, equal = make_prefill("p0", numerics_digest="b"), make_prefill("p1", numerics_digest="a", num_sequences=9)
    assert choose(Snapshot([decode], [other, equal]), make_demand()) == Route("d0", "p1")
    assert choose(Snapshot([decode], [other]), make_demand()) == Route("d0", None)
    unable = make_decode(numerics_digest="a", prefills_locally=False)
    assert choose(Snapshot([unable], [other]), make_demand()) is Refusal.NO_WORKER


def test_a_request_whose_client_has_numbers_goes_on_with_equal_arithmetic_only() -> None:
    decode = [make_decode("d0", numerics_digest="a"), make_decode("d1", numerics_digest="b", num_sequences=9)]
    assert choose(Snapshot(decode, []), make_demand()) == Route("d0", None)
    assert choose(Snapshot(decode, []), make_demand(numerics_digest="b")) == Route("d1", None)
    assert choose(Snapshot(decode, []), make_demand(numerics_digest="c")) is Refusal.NO_WORKER


def test_a_worker_is_full_when_it_has_no_room_for_every_choice() -> None:
    nearly_full = make_decode(num_in_flight=6)
    assert choose(Snapshot([nearly_full], []), make_demand(num_choices=2)) == Route("d0", None)
    assert choose(Snapshot([nearly_full], []), make_demand(num_choices=3)) is Refusal.FULL


def test_every_choice_needs_blocks_for_its_own_output_and_they_share_the_prompt() -> None:
    # 64 tokens of prompt and 3 × 16 of output are 7 blocks.
    short, roomy = make_decode("d0", num_available_blocks=6), make_decode("d1", num_available_blocks=7, num_sequences=1)
    assert choose(Snapshot([short, roomy], []), make_demand(num_choices=2)) == Route("d0", None)
    assert choose(Snapshot([short, roomy], []), make_demand(num_choices=3)) == Route("d0", None)
    shorter = make_decode("d0", num_available_blocks=5)
    assert choose(Snapshot([shorter, roomy], []), make_demand(num_choices=3)) == Route("d1", None)


def test_ties_go_to_whom_was_chosen_longest_ago_then_to_the_smaller_name() -> None:
    decode = [make_decode("d1", last_chosen=3), make_decode("d0", last_chosen=4)]
    assert choose(Snapshot(decode, []), make_demand()) == Route("d1", None)
    assert choose(Snapshot([make_decode("d1"), make_decode("d0")], []), make_demand()) == Route("d0", None)


def test_full_is_told_apart_from_absent() -> None:
    full = make_decode(num_in_flight=8)
    assert choose(Snapshot([full], []), make_demand()) is Refusal.FULL
    assert choose(Snapshot([full, make_decode("d1", is_draining=True)], []), make_demand()) is Refusal.FULL
    assert choose(Snapshot([make_decode(is_draining=True)], []), make_demand()) is Refusal.NO_WORKER


def test_a_context_too_short_and_a_refusal_before_exclude_a_worker() -> None:
    short = make_decode("d0", max_model_len=79)
    assert choose(Snapshot([short], []), make_demand()) is Refusal.NO_WORKER
    assert choose(Snapshot([make_decode("d0", max_model_len=80)], []), make_demand()) == Route("d0", None)
    demand = make_demand(excluded={"d0"})
    assert choose(Snapshot([make_decode("d0"), make_decode("d1", num_sequences=5)], []), demand) == Route("d1", None)


BLOCKS = st.frozensets(st.integers(1, 6), max_size=6)
PREFILL = st.builds(
    make_prefill,
    st.sampled_from(["p0", "p1", "p2"]),
    num_pending_tokens=st.integers(0, 500),
    is_draining=st.booleans(),
    cached_blocks=BLOCKS,
    last_chosen=st.integers(0, 9),
)
DECODE = st.builds(
    make_decode,
    st.sampled_from(["d0", "d1", "d2"]),
    num_sequences=st.integers(0, 20),
    num_in_flight=st.integers(0, 9),
    is_draining=st.booleans(),
    is_stalled=st.booleans(),
    prefills_locally=st.booleans(),
    cached_blocks=BLOCKS,
    links=st.frozensets(st.sampled_from(["p0", "p1", "p2"])),
    last_chosen=st.integers(0, 9),
)
SNAPSHOTS = st.builds(
    Snapshot,
    st.lists(DECODE, max_size=3, unique_by=lambda worker: worker.worker_id),
    st.lists(PREFILL, max_size=3, unique_by=lambda worker: worker.worker_id),
)


@given(SNAPSHOTS)
def test_whoever_is_chosen_is_there_and_able_and_linked(snapshot: Snapshot) -> None:
    route = choose(snapshot, make_demand())
    if isinstance(route, Refusal):
        return
    decode = next(worker for worker in snapshot.decode if worker.worker_id == route.decode_worker)
    linked = {peer.worker_id for peer in snapshot.prefill if not peer.is_draining} & decode.links
    assert not decode.is_draining
    assert decode.num_in_flight < decode.max_requests
    assert route.prefill_worker in linked if linked else (route.prefill_worker is None and decode.prefills_locally)


@given(SNAPSHOTS)
def test_the_order_of_workers_does_not_matter(snapshot: Snapshot) -> None:
    turned = Snapshot(list(reversed(snapshot.decode)), list(reversed(snapshot.prefill)))
    assert choose(snapshot, make_demand()) == choose(turned, make_demand())


@given(SNAPSHOTS)
def test_a_request_is_refused_only_when_no_pair_could_serve_it(snapshot: Snapshot) -> None:
    able = [
        worker
        for worker in snapshot.decode
        if not worker.is_draining
        and (
            worker.prefills_locally
            or any(peer.worker_id in worker.links and not peer.is_draining for peer in snapshot.prefill)
        )
    ]
    has_room = any(worker.num_in_flight < worker.max_requests for worker in able)
    assert isinstance(choose(snapshot, make_demand()), Route) == has_room
