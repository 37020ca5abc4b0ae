"""The budget of prompt tokens, beside streams and without: what it settles at, and how it gets there. Steps take as
long as a model of a machine says; no test waits for anything."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pacing import MeasuredStep, StepPacer, WaitingPrompt
from tests.engine.machines import QUICK, SMALL, Machine, linear, make_machine


def make_pacer(*, max_slowdown: float = 2.0, max_tokens: int = 512) -> StepPacer:
    return StepPacer(max_slowdown=max_slowdown, max_tokens=max_tokens)


def generate(pacer: StepPacer, machine: Machine, *, num_generating: int = 1, num_steps: int = 1) -> None:
    """Steps that only generate."""
    for _ in range(num_steps):
        pacer.observe(MeasuredStep(num_generating, 0, machine(num_generating, 0)))


def prefill(pacer: StepPacer, machine: Machine, *, num_tokens: int = 512) -> None:
    """A step without streams."""
    pacer.observe(MeasuredStep(0, num_tokens, machine(0, num_tokens)))


def budget(pacer: StepPacer, *, num_streams: int = 1, num_prompts: int = 1, num_tokens: int = 1000) -> int:
    """While `num_prompts` wait that have just begun; by default long ones."""
    prompts = [WaitingPrompt(num_tokens, num_tokens)] * num_prompts
    return pacer.num_prompt_tokens(num_streams=num_streams, prompts=prompts)


def mix(
    pacer: StepPacer, machine: Machine, *, num_generating: int = 1, num_prompts: int = 1, num_steps: int = 1
) -> list[int]:
    """Steps that use the whole budget, and such as go without between them; those budgets."""
    found: list[int] = []
    while len(found) < num_steps:
        taken = budget(pacer, num_streams=num_generating, num_prompts=num_prompts)
        pacer.observe(MeasuredStep(num_generating, taken, machine(num_generating, taken)))
        found += [taken] if taken else []
    return found


def test_the_first_step_beside_streams_only_generates_to_learn_how_long_that_takes() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    assert budget(pacer) == 0
    generate(pacer, linear)
    assert budget(pacer) == 4


def test_steps_without_streams_tell_the_whole_budget_at_once() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear)
    assert mix(pacer, linear, num_steps=3) == [80, 80, 80]
    assert linear(1, 80) == pytest.approx(9.0 * linear(1, 0))


def test_a_long_prompt_alone_counts_more_than_a_short_one() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    pacer.observe(MeasuredStep(0, 8, 0.024))  # 3 ms a token, so 24 of them fit 80 ms
    assert budget(pacer) == 24
    pacer.observe(MeasuredStep(0, 512, 0.506))  # with what is kept of the first, 524 ms for 518 tokens
    assert budget(pacer) == 64


def test_without_such_steps_a_budget_climbs_rung_by_rung_to_what_a_step_may_take() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    assert mix(pacer, linear, num_steps=30) == [4, 8, 16, 24, 32, 40, 48, 56, 64, *[80] * 21]


def test_rungs_are_a_quarter_of_their_size_apart_and_end_at_what_a_step_may_compute() -> None:
    pacer = make_pacer(max_tokens=250)
    machine = make_machine(weights_s=1.0, row_s=0.0)
    generate(pacer, machine)
    assert mix(pacer, machine, num_steps=17) == [4, *range(8, 65, 8), 80, 96, 120, 144, 176, 216, 250, 250]


def test_what_costs_nothing_while_weights_are_read_promises_no_more_than_the_next_rung() -> None:
    # Beside a stream the first 99 tokens are free; alone, 512 take 0.1 ms each, and 10 ms are allowed.
    pacer = make_pacer(max_slowdown=2.0)
    prefill(pacer, QUICK)
    generate(pacer, QUICK)
    assert mix(pacer, QUICK, num_steps=6) == [96, 120, 144, 176, 216, 176]
    assert QUICK(1, 176) <= 2 * QUICK(1, 0) < QUICK(1, 216)


def test_a_budget_is_four_tokens_where_even_that_takes_too_long() -> None:
    pacer = make_pacer(max_slowdown=1.0)
    generate(pacer, linear)
    assert mix(pacer, linear, num_steps=4) == [4, 4, 4, 4]
    assert mix(pacer, linear, num_prompts=3, num_steps=4) == [12, 12, 12, 12]


def test_a_step_that_computes_fewer_than_four_tokens_at_most_allows_no_more() -> None:
    pacer = make_pacer(max_slowdown=9.0, max_tokens=3)
    generate(pacer, linear)
    assert mix(pacer, linear, num_prompts=8, num_steps=2) == [3, 3]


@pytest.mark.parametrize("num_prompts", [1, 2, 8])
@pytest.mark.parametrize("max_slowdown", [1.5, 2.0, 3.0, 8.0])
@pytest.mark.parametrize("num_generating", [1, 5, 16, 64])
@pytest.mark.parametrize("machine", [SMALL, QUICK, linear])
def test_on_every_machine_the_budget_rests_but_for_one_step_in_128(
    num_prompts: int, max_slowdown: float, num_generating: int, machine: Machine
) -> None:
    pacer = make_pacer(max_slowdown=max_slowdown)
    prefill(pacer, machine)
    generate(pacer, machine, num_generating=num_generating)
    idle_s = machine(num_generating, 0)
    allowed_s = (1 + num_prompts * (max_slowdown - 1)) * idle_s + 1e-9
    mix(pacer, machine, num_generating=num_generating, num_prompts=num_prompts, num_steps=30)
    found = mix(pacer, machine, num_generating=num_generating, num_prompts=num_prompts, num_steps=512)
    rest = statistics.mode(found)
    assert sum(budget != rest for budget in found) <= 4
    assert rest == 4 * num_prompts or machine(num_generating, rest) <= allowed_s
    assert rest == 512 or machine(num_generating, max(rest + 8, rest * 5 // 4)) > allowed_s - 2e-9


@pytest.mark.parametrize("max_slowdown", [2.0, 3.0, 8.0])
@pytest.mark.parametrize("machine", [SMALL, QUICK, linear])
def test_no_step_on_the_way_takes_much_more_than_it_may(max_slowdown: float, machine: Machine) -> None:
    for num_tokens in (64, 512):
        pacer = make_pacer(max_slowdown=max_slowdown)
        prefill(pacer, machine, num_tokens=num_tokens)
        generate(pacer, machine)
        allowed_s = max(machine(1, 8), 1.25 * max_slowdown * machine(1, 0))
        assert max(machine(1, each) for each in mix(pacer, machine, num_steps=500)) <= allowed_s


def test_each_further_prompt_lets_a_step_take_as_much_longer_until_the_eighth() -> None:
    pacer = make_pacer(max_slowdown=2.0)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear)
    assert [budget(pacer, num_prompts=count) for count in (1, 2, 3, 4, 6, 8)] == [8, 16, 24, 40, 56, 80]
    assert [budget(pacer, num_prompts=count) for count in (9, 100)] == [80, 80]


def test_a_short_prompt_counts_as_four_and_two_as_all_that_count() -> None:
    pacer = make_pacer(max_slowdown=2.0)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear)
    assert [budget(pacer, num_prompts=count, num_tokens=512) for count in (1, 2, 3)] == [40, 80, 80]
    assert [budget(pacer, num_prompts=count, num_tokens=513) for count in (1, 2, 3)] == [8, 16, 24]


def test_a_prompt_of_more_than_512_tokens_is_long_however_many_a_step_may_compute() -> None:
    pacer = make_pacer(max_slowdown=2.0, max_tokens=8192)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear)
    assert [budget(pacer, num_tokens=num_tokens) for num_tokens in (512, 513)] == [40, 8]


def test_after_32_steps_with_prompt_tokens_one_goes_without() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    found = []
    for _ in range(100):
        found.append(budget(pacer))
        pacer.observe(MeasuredStep(1, found[-1], linear(1, found[-1])))
    assert [number for number, taken in enumerate(found) if not taken] == [32, 65, 98]


def test_so_many_steps_in_a_row_count_whether_or_not_they_tell_anything_of_a_budget() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    for _ in range(32):
        assert budget(pacer, num_streams=4) > 0
        pacer.observe(MeasuredStep(4, 3, 0.02))  # as many streams have never only generated, and 3 are no budget
    assert budget(pacer, num_streams=4) == 0
    assert budget(pacer, num_streams=0) > 0
    generate(pacer, linear, num_generating=4)
    assert budget(pacer, num_streams=4) > 0


def test_a_prompt_keeps_its_budget_where_everything_becomes_slower_alike() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear, num_steps=5)
    assert mix(pacer, linear, num_steps=30)[-1] == 80
    found = mix(pacer, lambda *rows: 2 * linear(*rows), num_steps=400)
    assert min(found) < 80 and found[-100:] == [80] * 100


def test_a_prompt_is_as_short_as_it_was_when_it_began() -> None:
    pacer = make_pacer(max_slowdown=2.0)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear)
    assert pacer.num_prompt_tokens(num_streams=1, prompts=[WaitingPrompt(1000, 10)]) == 8
    assert pacer.num_prompt_tokens(num_streams=1, prompts=[WaitingPrompt(100, 10), WaitingPrompt(1000, 10)]) == 48


def test_four_tokens_are_always_allowed_of_a_short_prompt_too_and_no_more() -> None:
    pacer = make_pacer(max_slowdown=1.0)
    generate(pacer, linear)
    assert [budget(pacer, num_prompts=count, num_tokens=100) for count in (1, 2, 8, 9)] == [4, 8, 32, 32]


def test_a_budget_that_fits_is_taken_though_a_smaller_one_was_once_dearer() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    pacer.observe(MeasuredStep(1, 80, linear(1, 80)))
    pacer.observe(MeasuredStep(1, 32, 0.5))
    assert budget(pacer) == 80


def test_a_budget_that_took_too_long_is_tried_again_after_128_steps() -> None:
    # 72 ms are allowed. 8 tokens cost nothing, the weights are being read anyway; 16 take 75 ms.
    pacer = make_pacer(max_slowdown=1.8)
    generate(pacer, SMALL)
    assert mix(pacer, SMALL, num_steps=133) == [4, 8, 16, *[8] * 128, 16, 8]


def test_a_budget_that_became_too_large_shrinks_to_one_that_is_not() -> None:
    pacer = make_pacer(max_slowdown=3.0)
    prefill(pacer, QUICK)
    generate(pacer, QUICK)
    assert mix(pacer, QUICK, num_steps=60)[-1] == 264
    found = mix(pacer, lambda *rows: 3 * QUICK(*rows), num_steps=60)
    assert found == sorted(found, reverse=True) and found[-1] == 80


def test_one_slow_step_costs_a_budget_nothing() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    mix(pacer, linear, num_steps=12)
    pacer.observe(MeasuredStep(1, 80, 60.0))
    assert mix(pacer, linear, num_steps=3) == [80, 80, 80]


def test_one_slow_step_that_only_generates_allows_no_more() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear, num_steps=3)
    mix(pacer, linear, num_steps=12)
    generate(pacer, lambda *_: 60.0)
    assert mix(pacer, linear, num_steps=3) == [80, 80, 80]


def test_steps_that_stay_slow_cost_a_budget_its_rung_for_a_while() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    mix(pacer, linear, num_steps=12)
    for _ in range(3):
        assert budget(pacer) == 80
        pacer.observe(MeasuredStep(1, 80, 3 * linear(1, 80)))
    assert mix(pacer, linear, num_steps=131) == [*[64] * 128, 80, 80, 80]


def test_prompts_that_became_dearer_beside_streams_cost_one_long_step() -> None:
    pacer = make_pacer(max_slowdown=3.0)
    prefill(pacer, QUICK)
    generate(pacer, linear)
    assert mix(pacer, linear, num_steps=4) == [176, 16, 16, 16]


def test_what_a_token_costs_beside_streams_is_believed_before_what_it_costs_alone() -> None:
    pacer = make_pacer(max_slowdown=3.0)
    prefill(pacer, QUICK)
    generate(pacer, linear)
    pacer.observe(MeasuredStep(1, 8, linear(1, 8)))
    assert budget(pacer) == 16


def test_what_a_token_costs_alone_follows_the_newest_steps() -> None:
    pacer = make_pacer(max_slowdown=9.1)
    generate(pacer, linear)
    for seconds in [5.12] * 40 + [0.512] * 40:
        pacer.observe(MeasuredStep(0, 512, seconds))
    assert budget(pacer) == 80


def test_more_than_a_rung_counts_for_the_rung_in_its_part() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    pacer.observe(MeasuredStep(1, 60, linear(1, 60)))
    assert pacer._expected_s(7) == pytest.approx(0.056)


def test_the_short_rest_of_a_prompt_says_nothing() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    generate(pacer, linear)
    for seconds in (60.0, 0.0):
        pacer.observe(MeasuredStep(1, 3, seconds))
        assert budget(pacer) == 4


def test_what_a_step_may_take_follows_the_number_of_streams() -> None:
    def machine(num_generating: int, num_prompt_tokens: int) -> float:
        return 0.010 * num_generating + 0.001 * num_prompt_tokens

    pacer = make_pacer(max_slowdown=3.0)
    for num_generating in (1, 8):
        generate(pacer, machine, num_generating=num_generating)
    assert mix(pacer, machine, num_steps=60, num_generating=8)[-1] == 144
    assert mix(pacer, machine, num_steps=60, num_generating=1)[-1] == 16


def test_without_a_measure_for_so_many_streams_that_for_fewer_counts_then_that_for_more() -> None:
    for num_generating in (64, 1):
        pacer = make_pacer(max_slowdown=9.0)
        prefill(pacer, lambda *rows: 0.001 * rows[1])
        generate(pacer, linear, num_generating=4)
        assert mix(pacer, linear, num_steps=3, num_generating=num_generating) == [80, 80, 80]
    pacer = make_pacer(max_slowdown=9.0)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear, num_generating=1)
    generate(pacer, lambda *_: 1.0, num_generating=64)
    assert mix(pacer, linear, num_steps=3, num_generating=16) == [80, 80, 80]


def test_a_budget_is_not_measured_against_a_guess_of_what_generating_takes() -> None:
    pacer = make_pacer(max_slowdown=9.0)
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, linear, num_generating=1)
    for _ in range(3):
        pacer.observe(MeasuredStep(16, 80, 60.0))
    assert budget(pacer, num_streams=1) == 80


def test_an_infinite_slowdown_bounds_nothing() -> None:
    pacer = make_pacer(max_slowdown=math.inf)
    assert mix(pacer, linear, num_steps=3) == [512, 512, 512]


@pytest.mark.parametrize("max_slowdown", [0.99, 0.0, -1.0, math.nan])
def test_a_slowdown_below_one_is_refused(max_slowdown: float) -> None:
    with pytest.raises(ValueError, match=r"max_slowdown is .*, needs at least 1"):
        make_pacer(max_slowdown=max_slowdown)


# Without streams


def alone(pacer: StepPacer, *prompts: WaitingPrompt) -> int:
    return pacer.num_prompt_tokens(num_streams=0, prompts=prompts)


def make_experienced(*, generating_s: float = 0.010, token_s: float = 0.001) -> StepPacer:
    """A pacer that knows how long a step takes that generates for one, and what a prompt token costs alone."""
    pacer = make_pacer()
    generate(pacer, lambda *_: generating_s)
    prefill(pacer, lambda *rows: token_s * rows[1])
    return pacer


def test_without_streams_a_step_takes_short_prompts_until_it_is_as_long_as_eight_that_generate() -> None:
    assert alone(make_experienced(), *[WaitingPrompt(32, 32)] * 8) == 80
    assert alone(make_experienced(token_s=0.003), *[WaitingPrompt(16, 16)] * 8) == 27
    assert alone(make_experienced(generating_s=0.005), WaitingPrompt(10, 10)) == 40


def test_without_streams_a_step_takes_as_many_tokens_as_any_prompt_has_left() -> None:
    pacer = make_experienced()
    assert alone(pacer, WaitingPrompt(300, 300), WaitingPrompt(32, 32)) == 300
    assert alone(pacer, WaitingPrompt(32, 32), WaitingPrompt(300, 300)) == 300
    assert alone(pacer, WaitingPrompt(2000, 2000), WaitingPrompt(32, 32)) == 512
    assert alone(pacer, WaitingPrompt(2000, 20), WaitingPrompt(32, 32)) == 80


def test_without_streams_a_step_is_full_where_reading_weights_is_what_takes_so_long() -> None:
    assert alone(make_experienced(token_s=0.0001), *[WaitingPrompt(32, 32)] * 8) == 512
    assert alone(make_experienced(token_s=1e-300, generating_s=1e300), WaitingPrompt(32, 32)) == 512


def test_without_streams_a_step_is_full_until_both_its_costs_are_known() -> None:
    pacer = make_pacer()
    assert alone(pacer, WaitingPrompt(32, 32)) == 512
    prefill(pacer, linear)
    assert alone(pacer, WaitingPrompt(32, 32)) == 512
    pacer = make_pacer()
    generate(pacer, linear)
    assert alone(pacer, WaitingPrompt(32, 32)) == 512


def test_without_streams_what_a_step_for_more_of_them_takes_counts_while_nothing_else_is_known() -> None:
    pacer = make_pacer()
    prefill(pacer, lambda *rows: 0.001 * rows[1])
    generate(pacer, lambda *_: 0.020, num_generating=16)
    assert alone(pacer, WaitingPrompt(32, 32)) == 160
    generate(pacer, lambda *_: 0.010, num_generating=1)
    assert alone(pacer, WaitingPrompt(32, 32)) == 80


def test_without_streams_an_infinite_slowdown_bounds_nothing() -> None:
    pacer = make_pacer(max_slowdown=math.inf)
    generate(pacer, linear)
    prefill(pacer, linear)
    assert alone(pacer, WaitingPrompt(32, 32)) == 512


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 512), st.floats(0.0, 100.0)), max_size=60),
    st.integers(1, 64),
    st.integers(1, 100),
    st.integers(1, 1000),
)
def test_whatever_is_measured_the_budget_is_within_bounds(
    steps: list[tuple[int, int, float]], num_streams: int, num_prompts: int, num_tokens: int
) -> None:
    pacer = make_pacer()
    generate(pacer, linear)
    for step in steps:
        pacer.observe(MeasuredStep(*step))
        found = budget(pacer, num_streams=num_streams, num_prompts=num_prompts, num_tokens=num_tokens)
        if not found:
            generate(pacer, linear)
            found = budget(pacer, num_streams=num_streams, num_prompts=num_prompts, num_tokens=num_tokens)
        assert 4 * min(num_prompts, 8) <= found <= 512 and found % 4 == 0
        assert min(num_tokens, 512) <= budget(pacer, num_streams=0, num_tokens=num_tokens) <= 512
