"""An attempt for several choices, and one that scores the prompt: what is passed on, what is refused."""

import pytest

from engine.cache.source import AttemptId, KVFailed, KVFirstTokens, KVLanded
from engine.request import PromptToken, SampledToken
from staffetta.v1 import common_pb2, prefill_pb2
from tests.decode_svc.scripted import ATTEMPT, PROMPT, STOP, Script, ended, make_request
from tests.rpc.in_loop import in_loop

# Several choices


@in_loop
async def test_the_first_tokens_of_all_choices_travel_together() -> None:
    script = Script(request=make_request(choices=(0, 1, 2)))
    await script.begin()
    script.first_tokens(5, 6, STOP)
    three = (SampledToken(0, 5), SampledToken(0, 6), SampledToken(0, STOP))
    assert script.log == [three, KVFirstTokens(ATTEMPT, three)]
    script.chunk(0, 1)
    script.grant()
    await ended(script)
    script.check(is_abandoned=False)
    assert script.log[-1] == KVLanded(ATTEMPT, 7, is_last=True)
    assert script.route.record.num_blocks == 2  # as many as for one choice


@pytest.mark.parametrize("token_ids", [(5,), (5, 6), (5, 6, 7, 8)], ids=len)
def test_first_tokens_that_are_not_one_for_each_choice_fail_the_attempt(token_ids: tuple[int, ...]) -> None:
    @in_loop
    async def run() -> None:
        script = Script(request=make_request(choices=(0, 1, 2)), may_recover=False)
        await script.begin()
        script.first_tokens(*token_ids)
        await ended(script)
        assert script.kinds() == ["failed"]
        (failed,) = script.events(KVFailed)
        came = f"{len(token_ids)} first tokens came"
        assert failed.error.message == f"the hand-off failed: {came} where one of index 0 was due for each of 3 choices"

    run()


@in_loop
async def test_choices_that_all_end_with_their_first_tokens_need_no_landing() -> None:
    script = Script(request=make_request(choices=(0, 1)))
    await script.begin()
    script.first_tokens(STOP, STOP)
    script.abandon()  # as the engine does
    await ended(script)
    assert [(c.state, c.outcome) for c in script.source.counts()] == [("open", "done")]
    assert script.route.record.prefill_worker == "prefill-0"


@in_loop
async def test_the_prefill_worker_is_known_with_the_first_tokens_and_forgotten_when_its_kv_does_not_come() -> None:
    script = Script(request=make_request(choices=(0, 1)))
    await script.begin()
    script.first_tokens(STOP, 5)
    assert script.route.record.prefill_worker == "prefill-0"
    script.fail()
    await ended(script)
    assert script.route.record.prefill_worker == ""
    assert [(c.state, c.outcome) for c in script.source.counts()] == [("open", "failed")]


@in_loop
async def test_a_restart_names_its_choice() -> None:
    script = Script(request=make_request(choices=(2,), first_token_index=3))
    await script.begin()
    (start,) = (message.start for message in script.pipe.sent)
    assert (start.first_token_index, start.choice_index) == (3, 2)


# Log-probabilities of the prompt


@in_loop
async def test_log_probabilities_of_the_prompt_go_on_at_once_and_in_order() -> None:
    script = Script(request=make_request(num_prompt_logprobs=0))
    await script.begin()
    script.prompt_logprobs(1, 2, 3)
    assert script.prompt_tokens == [PromptToken(p, PROMPT[p], -float(p)) for p in (1, 2, 3)]
    script.prompt_logprobs(4)
    script.prompt_logprobs(5, 6)
    assert [token.position for token in script.prompt_tokens] == [1, 2, 3, 4, 5, 6]
    script.first_tokens()
    script.chunk(0, 1)
    script.grant()
    await ended(script)
    script.check(is_abandoned=False)


OUT_OF_PLACE: dict[str, tuple[tuple[int, ...], ...]] = {
    "from position 0": ((0,),),
    "a gap": ((1, 2), (4,)),
    "twice": ((1, 2), (2, 3)),
    "out of order": ((2, 1),),
    "beyond the prompt": ((1, 2, 3, 4, 5, 6), (7,)),
}


@pytest.mark.parametrize("parts", OUT_OF_PLACE.values(), ids=OUT_OF_PLACE)
def test_log_probabilities_out_of_place_are_not_passed_on(parts: tuple[tuple[int, ...], ...]) -> None:
    @in_loop
    async def run() -> None:
        script = Script(request=make_request(num_prompt_logprobs=2), may_recover=False)
        await script.begin()
        for part in parts:
            script.prompt_logprobs(*part)
        script.first_tokens()
        await ended(script)
        assert [token.position for token in script.prompt_tokens] == [p for part in parts[:-1] for p in part]
        (failed,) = script.events(KVFailed)
        assert "log-probabilities came that are not those of the prompt from position" in failed.error.message
        assert script.events(tuple) == []

    run()


@in_loop
async def test_log_probabilities_of_other_tokens_are_not_passed_on() -> None:
    script = Script(request=make_request(num_prompt_logprobs=0))
    await script.begin()
    script.prompt_logprobs(1, 2, token_ids=(*PROMPT[:2], 99))
    await ended(script)
    assert (script.prompt_tokens, script.kinds()) == ([], ["failed"])


@in_loop
async def test_log_probabilities_that_nobody_asked_for_fail_the_attempt() -> None:
    script = Script()
    await script.begin()
    script.prompt_logprobs(1)
    await ended(script)
    assert (script.prompt_tokens, script.kinds()) == ([], ["failed"])


@pytest.mark.parametrize("positions", [(), (1, 2, 3, 4, 5)], ids=["none", "all but one"])
def test_first_tokens_before_the_whole_prompt_is_scored_are_not_passed_on(positions: tuple[int, ...]) -> None:
    @in_loop
    async def run() -> None:
        script = Script(request=make_request(num_prompt_logprobs=0), may_recover=False)
        await script.begin()
        script.prompt_logprobs(*positions)
        script.first_tokens()
        await ended(script)
        assert script.kinds() == ["failed"]
        (failed,) = script.events(KVFailed)
        assert failed.error.message == (
            f"the hand-off failed: first tokens came with {len(positions) + 1} prompt tokens scored"
        )

    run()


@in_loop
async def test_what_was_generated_before_a_restart_is_not_scored() -> None:
    script = Script(request=make_request(choices=(1,), first_token_index=2, num_prompt_logprobs=0))
    await script.begin()
    script.prompt_logprobs(1, 2, 3, 4)
    script.tell(first_tokens=prefill_pb2.FirstTokens(tokens=[common_pb2.Token(index=2, token_id=42)]))
    assert script.kinds() == ["emit", "firsttokens"]
    script.prompt_logprobs(5)
    await ended(script)
    assert [token.position for token in script.prompt_tokens] == [1, 2, 3, 4]
    assert script.kinds() == ["emit", "firsttokens", "failed"]


@in_loop
async def test_a_second_attempt_scores_the_prompt_from_its_beginning() -> None:
    script = Script(request=make_request(num_prompt_logprobs=0))
    await script.begin()
    script.prompt_logprobs(1, 2, 3)
    script.fail()
    await ended(script)
    await script.begin(AttemptId(2))
    script.prompt_logprobs(1, 2, 3, 4, 5, 6)
    script.first_tokens()
    assert [token.position for token in script.prompt_tokens] == [1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert script.kinds() == ["failed", "emit", "firsttokens"]
    script.fail()
    await ended(script)
