"""Decides whether two workers fit together: equal in everything that could change a token or misread a block."""

from staffetta.errors import IncompatiblePeerError
from staffetta.rpc.session import PROTOCOL_VERSION
from staffetta.v1 import common_pb2


def check_protocol(version: int) -> None:
    """Raises IncompatiblePeerError unless the peer's protocol version is ours or adjacent."""
    if abs(version - PROTOCOL_VERSION) > 1:
        raise IncompatiblePeerError(
            f"protocol_version is {version} at the peer and {PROTOCOL_VERSION} here; they may differ by 1"
        )


def check_pair(ours: common_pb2.WorkerIdentity, theirs: common_pb2.WorkerIdentity) -> None:
    """Raises IncompatiblePeerError naming the first field that differs and both values."""
    for field, here, there in (
        ("model_digest", ours.model_digest, theirs.model_digest),
        # What an operator can read comes before what only machines can: another dtype changes all that follow.
        ("layout", _describe(ours.layout), _describe(theirs.layout)),
        ("layout_id", ours.layout.layout_id, theirs.layout.layout_id),
        ("numerics_digest", ours.numerics_digest, theirs.numerics_digest),
        ("key_fingerprint", ours.key_fingerprint, theirs.key_fingerprint),
    ):
        if here != there:
            raise IncompatiblePeerError(
                f"{field} is {there} at {theirs.worker_id or 'the peer'} and {here} at {ours.worker_id}; "
                f"both need the same model, dtype, quantization, block size, cluster key and class of CPU"
            )


def _describe(layout: common_pb2.KVLayout) -> str:
    return "; ".join(
        f"{g.kind}: {g.num_layers} layers x {g.num_kv_heads} heads x {g.head_dim}, blocks of {g.block_size}, {g.dtype}"
        for g in layout.groups
    )
