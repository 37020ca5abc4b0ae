"""Two workers fit together or are told the field and both values."""

import pytest

from staffetta.errors import IncompatiblePeerError
from staffetta.rpc.session import PROTOCOL_VERSION
from staffetta.v1 import common_pb2
from worker.pairing import check_pair, check_protocol


def make_identity(worker_id: str, **changes: object) -> common_pb2.WorkerIdentity:
    group = {
        "kind": "full",
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "block_size": 16,
        "dtype": "float32",
    }
    group.update({name: value for name, value in changes.items() if name in group})
    return common_pb2.WorkerIdentity(
        worker_id=worker_id,
        incarnation=f"incarnation of {worker_id}",
        role=common_pb2.WORKER_ROLE_PREFILL,
        model=f"model of {worker_id}",
        model_digest=str(changes.get("model_digest", "m")),
        numerics_digest=str(changes.get("numerics_digest", "n")),
        key_fingerprint=str(changes.get("key_fingerprint", "k")),
        layout=common_pb2.KVLayout(
            layout_id=str(changes.get("layout_id", "l")),
            groups=[common_pb2.KVGroup(**group)],  # type: ignore[arg-type]
        ),
    )


def test_names_roles_and_incarnations_may_differ() -> None:
    check_pair(make_identity("a"), make_identity("b"))


@pytest.mark.parametrize(
    ("change", "here", "there", "field"),
    [
        ({"model_digest": "x"}, "m", "x", "model_digest"),
        ({"numerics_digest": "x"}, "n", "x", "numerics_digest"),
        ({"key_fingerprint": "x"}, "k", "x", "key_fingerprint"),
        ({"layout_id": "x"}, "l", "x", "layout_id"),
        ({"dtype": "bfloat16"}, "float32", "bfloat16", "layout"),
        ({"block_size": 32}, "blocks of 16", "blocks of 32", "layout"),
        ({"num_layers": 3}, "2 layers", "3 layers", "layout"),
        ({"num_kv_heads": 1}, "x 2 heads", "x 1 heads", "layout"),
        ({"head_dim": 64}, "heads x 8", "heads x 64", "layout"),
        # The first that differs, and the readable one first: another dtype is another numerics digest as well.
        ({"dtype": "bfloat16", "numerics_digest": "x", "layout_id": "x"}, "float32", "bfloat16", "layout"),
        ({"model_digest": "x", "dtype": "bfloat16"}, "m", "x", "model_digest"),
    ],
)
def test_a_difference_is_told_by_field_and_both_values(
    change: dict[str, object], here: str, there: str, field: str
) -> None:
    with pytest.raises(IncompatiblePeerError) as raised:
        check_pair(make_identity("ours"), make_identity("theirs", **change))
    message = raised.value.message
    assert message.startswith(f"{field} is ")
    before, _, after = message.partition(" at theirs and ")
    assert there in before
    assert here in after.partition(" at ours; start both with the same model")[0]


def test_a_peer_without_a_name_is_still_told_of() -> None:
    with pytest.raises(IncompatiblePeerError, match="model_digest is x at the peer and m at ours"):
        check_pair(make_identity("ours"), make_identity("", model_digest="x"))


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION, PROTOCOL_VERSION + 1])
def test_adjacent_protocols_fit(version: int) -> None:
    check_protocol(version)


@pytest.mark.parametrize("version", [PROTOCOL_VERSION + 2, 2**32 - 1])
def test_distant_protocols_do_not(version: int) -> None:
    with pytest.raises(IncompatiblePeerError, match=f"protocol_version is {version} at the peer and 1 here"):
        check_protocol(version)
