"""From the one sequence that goes through a prompt to one for each choice that goes on. Engine thread only.

Forks share every block of their parent, the last, part-full one included. Nobody copies anything here: whoever comes to
write into a block that others hold gets a copy of it in that step's plan, and the last holder writes in place.
"""

from engine.sequence import Sequence, SequenceState


def fork(parent: Sequence) -> list[Sequence]:
    """Makes a sequence for every open choice of `parent`, which does not end with its first token, and ends `parent`.

    `parent` has computed its prompt, knows its first tokens and is in no queue; it gives its blocks back. What the
    prompt cost, every fork tells as its own.
    """
    forks = [_fork_of(parent, choice) for choice in parent.open_choices]
    parent.release_blocks()
    parent.state = SequenceState.FINISHED
    return forks


def _fork_of(parent: Sequence, choice: int) -> Sequence:
    fork = Sequence(
        parent.request,
        parent.hasher,
        parent.lease.fork(),
        parent.arrived_at,
        choices=(choice,),
        num_computed_tokens=parent.num_computed_tokens,
        num_published_blocks=parent.num_published_blocks,
        num_scored_tokens=parent.num_scored_tokens,
        started_at=parent.started_at,
        first_token_at=parent.first_token_at,
        num_cached_tokens=parent.num_cached_tokens,
        num_local_prompt_tokens=parent.num_local_prompt_tokens,
        num_recomputed_tokens=parent.num_recomputed_tokens,
        num_preemptions=parent.num_preemptions,
        max_computed_tokens=parent.max_computed_tokens,
        prompt_ids=parent.prompt_ids,
        hashes=list(parent.hashes),
    )
    fork.token_ids.append(parent.first_tokens[choice].token_id)
    fork.grant(choice, parent.granted[choice])
    return fork
