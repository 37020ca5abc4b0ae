"""Which workers make a pair, and by which transport: equal in all that could change a token, or refused by name."""

import asyncio
import logging
import shutil
from pathlib import Path

import pytest

from decode_svc import peers
from prefill_svc import servicer
from tests.handoff.cluster import client_of, copy_model, decode_worker, make_prompt, prefill_worker
from tests.rpc.in_loop import in_loop, until

PROMPT = make_prompt(100, seed=1)


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"dtype": "bfloat16"}, ("float32", "bfloat16")),
        ({"block_size": 32}, ("blocks of 16", "blocks of 32")),
    ],
)
def test_workers_of_different_layouts_are_not_paired(
    settings: dict[str, object], both: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    @in_loop
    async def run() -> None:
        async with prefill_worker(**settings) as prefill, decode_worker(prefill_peers=(prefill.address,)) as decode:
            await until(lambda: "cannot be paired" in caplog.text)
            assert not decode.service.links()

    caplog.set_level(logging.ERROR, "decode_svc.peers")
    run()
    (message,) = {record.getMessage() for record in caplog.records if record.name == "decode_svc.peers"}
    for value in (*both, "prefill-0", "decode-0"):
        assert value in message


@pytest.mark.parametrize("lenient", [peers, servicer], ids=["the prefill worker looks", "the decode worker looks"])
def test_workers_of_different_numerics_are_not_paired_whichever_of_them_looks(
    lenient: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @in_loop
    async def run() -> None:
        async with (
            prefill_worker(quantization="int8") as prefill,
            decode_worker(prefill_peers=(prefill.address,)) as decode,
        ):
            await until(lambda: "cannot be paired" in caplog.text)
            ours, theirs = (worker.host.rank.identity.numerics_digest for worker in (decode, prefill))
            assert ours != theirs
            assert not decode.service.links()
            assert decode.host.rank.identity.layout == prefill.host.rank.identity.layout
            for worker_id, digest in (("decode-0", ours), ("prefill-0", theirs)):
                assert f"{digest} at {worker_id}" in caplog.text

    monkeypatch.setattr(lenient, "check_pair", lambda ours, theirs: None)
    caplog.set_level(logging.ERROR, "decode_svc.peers")
    run()
    assert "numerics_digest is " in caplog.text


@in_loop
async def test_workers_of_different_models_are_not_paired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = copy_model(tmp_path / "other")
    async with prefill_worker(model=str(model)) as prefill, decode_worker(prefill_peers=(prefill.address,)) as decode:
        await until(lambda: "cannot be paired" in caplog.text)
        digests = [worker.host.rank.identity.model_digest for worker in (prefill, decode)]
    assert digests[0] != digests[1]
    assert f"model_digest is {digests[1]} at decode-0 and {digests[0]} at prefill-0" in caplog.text


@in_loop
async def test_workers_without_a_common_transport_are_not_paired(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        prefill_worker(transports=("loopback",)) as prefill,
        decode_worker(prefill_peers=(prefill.address,), transports=("tcp",)),
    ):
        await until(lambda: "cannot be paired" in caplog.text)
    assert "transports is loopback at the peer and tcp here; none works" in caplog.text


@in_loop
async def test_a_prefill_worker_without_a_directory_for_shm_offers_tcp(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"transports": ("shm", "tcp"), "shm_dir": str(tmp_path / "missing")}
    async with prefill_worker(**settings) as prefill:
        assert "transport shm is not offered" in caplog.text
        async with decode_worker(prefill, transports=("shm", "tcp")) as decode, client_of(decode) as client:
            assert (await client.ask(PROMPT)).handoff.transport == "tcp"


@in_loop
async def test_a_decode_worker_that_cannot_reach_the_shm_socket_uses_tcp(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"transports": ("shm", "tcp"), "shm_dir": str(tmp_path)}
    async with prefill_worker(**settings) as prefill:
        await asyncio.to_thread(shutil.rmtree, tmp_path)
        async with decode_worker(prefill, transports=("shm", "tcp")) as decode, client_of(decode) as client:
            assert (await client.ask(PROMPT)).handoff.transport == "tcp"
    assert "transport shm cannot be used" in caplog.text


@in_loop
async def test_the_fastest_of_two_transports_is_used(tmp_path: Path) -> None:
    settings = {"transports": ("shm", "tcp"), "shm_dir": str(tmp_path)}
    async with prefill_worker(**settings) as prefill, decode_worker(prefill, **settings) as decode:
        (link,) = decode.service.links()
        assert (link.prefill_worker, link.transport) == ("prefill-0", "shm")
        assert link.bytes_per_s > 0
