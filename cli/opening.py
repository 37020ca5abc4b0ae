"""The first minutes of `serve` once its processes run: ready, proven by a self-test, shown, and asked a first question.

Imported after the processes were started, because gRPC's import would hold them up.
"""

import random
import time
from collections.abc import Callable
from typing import Final

from cli.client import Client, make_request
from cli.output import Output, discard, say, write, write_json
from cli.plan import ServePlan, dialable
from cli.readiness import check_handoff, self_test, wait_until_registered
from cli.relay import relay_line
from cli.report import ReadyFacts, describe_links, describe_worker
from demo import EMBEDDED
from staffetta import __version__
from staffetta.config.schema import ClientConfig, ServeConfig

_SAMPLE_RECORDS: Final = 10
_SAMPLE_SEED: Final = 7


async def become_ready(
    client: Client,
    registry: Client,
    *,
    config: ServeConfig,
    plan: ServePlan,
    pid_of: Callable[[str], int | None],
    started: float,
) -> ReadyFacts:
    """Waits until every worker serves and a request has gone through both roles. Raises OperatorError.

    `registry` is a client of where workers register.
    """
    names = (*plan.names("prefill"), *plan.names("decode"))
    system = await wait_until_registered(
        registry, prefill=plan.names("prefill"), decode=plan.names("decode"), started=started, say=say
    )
    # Longer than what a decode worker keeps for itself, by two blocks that then have to move.
    min_tokens = config.local_prefill_max_tokens + 2 * config.block_size
    test = await self_test(client, min_tokens=min_tokens)
    if config.prefill > 0:
        check_handoff(test)
    plans = {worker.name: worker for worker in plan.workers}
    by_name = {worker.announcement.identity.worker_id: worker for worker in system.workers}
    first = by_name[names[0]].announcement
    return ReadyFacts(
        version=__version__,
        backend=first.backend,
        model=first.identity.model,
        num_parameters=first.num_parameters,
        is_embedded=config.model == EMBEDDED,
        workers=tuple(
            describe_worker(by_name[name], pid=pid_of(name) or 0, ready_s=system.ready_s[name], plan=plans[name])
            for name in names
        ),
        links=tuple(link for name in names for link in describe_links(by_name[name])),
        self_test=test,
        ready_s=round(time.monotonic() - started, 3),
        http=dialable(plan.gateway.http),
        grpc=dialable(plan.gateway.grpc),
        num_cpus=plan.num_cpus,
        cpu_quota=plan.cpu_quota,
    )


async def answer_once(client: Client, prompt: str, output: Output) -> None:
    """Streams the answer to `prompt` to standard output, or writes it as JSON at its end."""
    config = ClientConfig()
    request = make_request(config, [("user", prompt)])
    if output is Output.JSON:
        write_json((await client.generate(request, timeout_s=config.timeout_s, on_text=discard)).as_json())
        return
    answer = await client.generate(request, timeout_s=config.timeout_s, on_text=write)
    write("\n")
    say(relay_line(answer))


async def show_sample(client: Client) -> None:
    """Shows what the embedded model is for: it recalls what its prompt said, from KV that was handed over."""
    from demo.corpus import recall_sample

    # The seed is fixed: everybody's first answer is the same.
    sample = recall_sample(random.Random(_SAMPLE_SEED), num_records=_SAMPLE_RECORDS)  # noqa: S311
    question = sample.prompt.rpartition(". ")[2]
    write(f"\n  sample    a prompt with {_SAMPLE_RECORDS} codes in it ends with: {question}\n  answer    ")
    config = ClientConfig(temperature=0.0)
    request = make_request(config, [("user", sample.prompt)])
    answer = await client.generate(request, timeout_s=config.timeout_s, on_text=write)
    write(f"\n  expected  {sample.answer}\n  {relay_line(answer).replace('relay  ', 'relay     ')}\n")
