"""The k schedules against the released formulas, written out independently, and every other knob by hand."""

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from smoe_train.schedules import (
    AFTER_TRAINING,
    CompetitionConfig,
    CompetitionSchedule,
    Curriculum,
    CurriculumConfig,
    Knobs,
    SampleOrderConfig,
    SequenceLengthConfig,
    TopKScheduleConfig,
    ValueScheduleConfig,
    sequence_length_at,
    top_k_at,
    value_at,
)

FORMS = ["linear", "cosine", "exponential", "multi_step"]


def at(form, step, steps, low=8, high=16):
    return top_k_at(TopKScheduleConfig(form=form, low=low, high=high), step, steps)


def series(form, steps, low=8, high=16):
    return [at(form, step, steps, low, high) for step in range(steps + 1)]


def clip(value, low, high):
    return sorted((low, value, high))[1]


def released(form, t, total, low, high):
    """The released code's value at step t of T = total, with exact rounding (Python's, to even) where it can be."""
    if form == "linear":
        return clip(round(Fraction((high - low) * t, total)) + low, low, high)
    if form == "cosine":
        return clip(round((low - high) * math.cos(math.pi * t / (2 * total))) + high, low, high)
    if form == "exponential":
        return clip(round((low - high) * 0.99 ** (t // (total // 300))) + high, low, high)
    return clip([1, 2, 4, 8, 16][min(int(Fraction(5 * t, total)), 4)], low, high)


def test_linear_8_to_16():
    """Invariant 10: monotone, k(0) = 8, k(T) = 16, occupancy 1/16, seven times 1/8, 1/16, mean 12.0."""
    steps = 1600
    values = series("linear_increase", steps)[:steps]
    assert values == sorted(values)
    assert (values[0], at("linear_increase", steps, steps)) == (8, 16)
    shares = Counter(values)
    assert sorted(shares) == list(range(8, 17))
    for k, count in shares.items():
        # A half is rounded to even, so a boundary step may fall on either side.
        assert abs(count / steps - (1 / 16 if k in (8, 16) else 1 / 8)) <= 1.5 / steps
    assert sum(values) / steps == pytest.approx(12.0, abs=0.005)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("low", "high"), [(8, 16), (1, 2), (1, 16), (3, 5), (4, 4), (1, 64)])
@pytest.mark.parametrize("steps", [300, 900, 1500])
def test_every_form_is_the_released_formula(form, low, high, steps):
    expected = [released(form, t, steps, low, high) for t in range(steps + 1)]
    assert series(f"{form}_increase", steps, low, high) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [7, 300, 900])
def test_decreasing_forms_are_mirrors(form, steps):
    assert series(f"{form}_decrease", steps, 1, 16) == series(f"{form}_increase", steps, 1, 16)[::-1]


def test_values_by_hand():
    assert [at("linear_increase", t, 4, 1, 3) for t in range(5)] == [1, 1, 2, 3, 3]  # 0.5 -> 0, 1.5 -> 2
    assert [at("cosine_increase", t, 3, 1, 5) for t in range(4)] == [1, 2, 3, 5]  # 5 - 4, 3.46, 2, 0 rounded
    assert [at("multi_step_increase", t, 5, 1, 16) for t in range(6)] == [1, 2, 4, 8, 16, 16]
    assert [at("multi_step_decrease", t, 5, 1, 16) for t in range(6)] == [16, 16, 8, 4, 2, 1]
    assert at("exponential_increase", 100, 300) == 13  # 16 - 8 * 0.99^100 = 16 - 2.93


@settings(max_examples=60)
@given(st.sampled_from(FORMS), st.integers(1, 40), st.integers(0, 40), st.integers(1, 500))
def test_every_schedule_is_monotone_bounded_and_constant_afterwards(form, low, more, steps):
    for direction in ("increase", "decrease"):
        values = series(f"{form}_{direction}", steps, low, low + more)
        assert values == sorted(values, reverse=direction == "decrease")
        assert all(low <= value <= low + more for value in values)
        schedule = TopKScheduleConfig(form=f"{form}_{direction}", low=low, high=low + more)
        assert {top_k_at(schedule, steps + later, steps) for later in (0, 1, 1000)} == {values[-1]}
        if form in ("linear", "cosine"):
            assert {values[0], values[-1]} == {low, low + more}


def test_knobs_are_a_function_of_the_step_alone():
    """A resumed run asks for step t and gets what the first run had; evaluation cannot disturb it."""
    curriculum = Curriculum(CurriculumConfig(top_k=TopKScheduleConfig(low=8, high=16)), 2, 160, 64)
    there = [curriculum.knobs(step) for step in range(160)]
    back = [curriculum.knobs(step) for step in reversed(range(160))][::-1]
    assert there == back
    assert there[0] == Knobs(0, 8)
    assert there[159] == Knobs(159, 16)


def test_schedule_length():
    """Its own steps if given, else those of training."""
    short = Curriculum(CurriculumConfig(top_k=TopKScheduleConfig(low=2, high=4, steps=10)), 2, 1000, 64)
    assert [short.knobs(step).top_k for step in (0, 5, 10, 999)] == [2, 3, 4, 4]
    whole = Curriculum(CurriculumConfig(top_k=TopKScheduleConfig(low=2, high=4)), 2, 1000, 64)
    assert [whole.knobs(step).top_k for step in (0, 500, 999)] == [2, 3, 4]


def test_without_a_schedule_k_is_the_models():
    curriculum = Curriculum(CurriculumConfig(), 3, 100, 64)
    assert curriculum.knobs(57) == Knobs(57, 3)
    assert curriculum.top_k_values() == {3}


@settings(max_examples=60)
@given(
    st.sampled_from(FORMS),
    st.sampled_from(["increase", "decrease"]),
    st.integers(1, 8),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 90)),
    st.integers(1, 90),
)
def test_top_k_values_are_those_that_the_steps_use(form, direction, low, more, length, max_steps):
    schedule = TopKScheduleConfig(form=f"{form}_{direction}", low=low, high=low + more, steps=length)
    curriculum = Curriculum(CurriculumConfig(top_k=schedule), 2, max_steps, 64)
    assert curriculum.top_k_values() == {curriculum.knobs(step).top_k for step in range(max_steps)}


def test_k_of_a_step_that_is_never_run_is_not_counted():
    """The schedule ends at max_steps, one step after the last: k = 1 there is no reason to refuse a recipe."""
    schedule = TopKScheduleConfig(form="linear_decrease", low=1, high=2)
    assert Curriculum(CurriculumConfig(top_k=schedule), 2, 1, 64).top_k_values() == {2}


def test_long_schedules_are_listed_quickly():
    schedule = TopKScheduleConfig(low=1, high=64)
    assert Curriculum(CurriculumConfig(top_k=schedule), 2, 10**9, 64).top_k_values() == set(range(1, 65))


@pytest.mark.parametrize(
    "values", [{"low": 0, "high": 2}, {"low": 1}, {"low": 1, "high": 2, "form": "square"}], ids=str
)
def test_impossible_schedules_are_refused(values):
    with pytest.raises(ValidationError):
        TopKScheduleConfig(**values)


# Numbers


def numbers(form, at_steps, **options):
    schedule = ValueScheduleConfig(form=form, **options)
    return [value_at(schedule, step, 10) for step in at_steps]


def test_numbers_by_hand():
    assert numbers("linear", range(5), first=1.0, last=3.0, steps=4) == [1.0, 1.5, 2.0, 2.5, 3.0]
    half = math.sqrt(0.5)  # cos(pi / 4)
    cosine = [0.0, (1 - half) / 2, 0.5, (1 + half) / 2, 1.0]
    assert numbers("cosine", range(5), first=0.0, last=1.0, steps=4) == pytest.approx(cosine)
    assert numbers("exponential", range(4), first=8.0, last=1.0, steps=3) == pytest.approx([8.0, 4.0, 2.0, 1.0])
    assert numbers("linear", (0, 2, 3, 5, 7, 9), first=0.4, last=0.0, start_step=3, steps=4) == pytest.approx(
        [0.4, 0.4, 0.4, 0.2, 0.0, 0.0]
    )


@pytest.mark.parametrize("form", ["linear", "cosine", "exponential"])
@settings(max_examples=60)
@given(
    first=st.floats(1e-3, 1e3),
    last=st.floats(1e-3, 1e3),
    start=st.integers(0, 20),
    steps=st.none() | st.integers(1, 20),
    max_steps=st.integers(21, 50),
)
def test_numbers_go_one_way_and_end_to_the_bit(form, first, last, start, steps, max_steps):
    schedule = ValueScheduleConfig(form=form, first=first, last=last, start_step=start, steps=steps)
    end = start + steps if steps is not None else max_steps
    values = [value_at(schedule, step, max_steps) for step in range(end + 3)]
    assert values[: start + 1] == [first] * (start + 1)
    assert values[end:] == [last] * 3
    way = values[start : end + 1]
    direction = 1.0 if last >= first else -1.0
    assert all(direction * (after - before) >= -1e-9 * before for before, after in pairwise(way))
    assert value_at(schedule, AFTER_TRAINING, max_steps) == last


def test_a_change_without_a_length_lasts_until_the_end_of_training():
    schedule = ValueScheduleConfig(first=1.0, last=0.0, start_step=10)
    assert [value_at(schedule, step, 30) for step in (10, 20, 30)] == [1.0, 0.5, 0.0]
    assert [value_at(schedule, step, 10) for step in (10, 11)] == [1.0, 0.0], "no step is left: at once"


# Lengths


def test_lengths_double_at_equal_intervals():
    config = SequenceLengthConfig(low=32, steps=9)
    lengths = [sequence_length_at(config, step, 256) for step in range(12)]
    assert lengths == [32] * 3 + [64] * 3 + [128] * 3 + [256] * 3
    assert sequence_length_at(SequenceLengthConfig(low=8, steps=1), 0, 32) == 8
    assert sequence_length_at(SequenceLengthConfig(low=8, steps=1), 1, 32) == 32


@settings(max_examples=60)
@given(st.integers(1, 16), st.integers(1, 6), st.integers(1, 60))
def test_every_length_divides_the_full_one_and_none_is_left_out(low, doublings, steps):
    config, full = SequenceLengthConfig(low=low, steps=steps), low * 2**doublings
    lengths = [sequence_length_at(config, step, full) for step in range(steps + 3)]
    assert lengths == sorted(lengths)
    assert (lengths[0], set(lengths[steps:])) == (low, {full})
    assert all(full % length == 0 for length in lengths)
    if steps >= doublings:
        assert set(lengths) == {low * 2**power for power in range(doublings + 1)}


# All of it together


def everything():
    config = CurriculumConfig(
        top_k=TopKScheduleConfig(low=1, high=3),
        threshold=ValueScheduleConfig(first=0.4, last=0.0),
        loss_weights={"z_loss": ValueScheduleConfig(first=0.0, last=1.0, steps=2)},
        sequence_length=SequenceLengthConfig(low=16, steps=8),
        order=SampleOrderConfig(),
    )
    contests = CompetitionConfig(flip_rate=1.0, warmup_steps=2, max_layers=None)
    return Curriculum(config, 2, 8, 64, CompetitionSchedule(contests, 0, (1, 2)))


def test_one_step_has_all_knobs():
    assert everything().knobs(4) == Knobs(
        step=4,
        top_k=2,
        threshold=pytest.approx(0.2),
        competing_layers=frozenset({1, 2}),
        loss_weights={"z_loss": 1.0},
        sequence_length=32,
    )
    assert everything().knobs(1).competing_layers == frozenset()


def test_evaluation_is_a_plain_pass_with_the_threshold_of_its_step():
    """Full length, k of the model or as asked, no contest, no factors: figures of all steps are of one kind."""
    assert everything().evaluation_knobs(4) == Knobs(step=4, top_k=2, threshold=pytest.approx(0.2))
    assert everything().evaluation_knobs(8, 5) == Knobs(step=8, top_k=5, threshold=0.0)
    assert Curriculum(CurriculumConfig(), 2, 8, 64).evaluation_knobs(3) == Knobs(step=3, top_k=2)


def test_the_outline_has_what_is_scheduled_and_nothing_else():
    names = {"step", "top_k", "threshold", "sequence_length", "loss_weights.z_loss"}
    rows = everything().outline()
    assert all(set(row) == names for row in rows)
    assert [(row["step"], row["top_k"], row["sequence_length"]) for row in rows] == [
        (0, 1, 16), (1, 1, 16), (3, 2, 16), (5, 2, 32), (7, 3, 32)
    ]  # fmt: skip
    assert Curriculum(CurriculumConfig(order=SampleOrderConfig()), 2, 8, 64).outline() == []
    assert [row["step"] for row in Curriculum(everything().config, 2, 1, 64).outline()] == [0]


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ValueScheduleConfig, {"first": 1.0}),
        (ValueScheduleConfig, {"first": 1.0, "last": 0.0, "steps": 0}),
        (ValueScheduleConfig, {"first": math.nan, "last": 0.0}),
        (ValueScheduleConfig, {"first": 1.0, "last": 0.0, "start_step": -1}),
        (SequenceLengthConfig, {"low": 0, "steps": 1}),
        (SequenceLengthConfig, {"low": 8}),
        (SampleOrderConfig, {"by": "random"}),
        (SampleOrderConfig, {"window_samples": 1}),
    ],
    ids=str,
)
def test_impossible_values_are_refused(model, values):
    with pytest.raises(ValidationError):
        model(**values)
