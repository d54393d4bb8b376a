"""C8: who competes when is random enough, limited, and a pure function of seed, step and layer."""

import math
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ranks import run_ranks

from smoe_train.schedules import CompetitionConfig, CompetitionSchedule, Curriculum, CurriculumConfig
from smoe_train.schedules.competition import WINDOW_STEPS, _window

LAYERS = tuple(range(16))
STEPS = 10 * WINDOW_STEPS  # whole windows, in which no event is lost


def schedule(seed=3, layers=LAYERS, **options):
    return CompetitionSchedule(CompetitionConfig(**options), seed, layers)


def table(one, steps, start=0):
    """Who competes: bool [steps, layers]."""
    competing = [one.competing(step) for step in range(start, start + steps)]
    return np.array([[layer in layers for layer in one.layers] for layers in competing])


def z_score(count, trials, rate):
    return (count - trials * rate) / math.sqrt(trials * rate * (1 - rate))


@pytest.mark.parametrize("max_layers", [None, 3])
@pytest.mark.parametrize("rate", [0.03, 0.07, 0.12])
def test_c8_events_are_as_many_as_coins_promise(rate, max_layers):
    """C8: binomial bounds overall and for every layer: events that exceed the limit move, they are not lost."""
    events = table(schedule(flip_rate=rate, max_layers=max_layers), STEPS)
    assert abs(z_score(events.sum(), events.size, rate)) < 4
    assert max(abs(z_score(count, STEPS, rate)) for count in events.sum(axis=0)) < 4
    for half in (events[: STEPS // 2], events[STEPS // 2 :]):
        assert abs(z_score(half.sum(), half.size, rate)) < 4


def test_cutting_off_what_exceeds_the_limit_would_be_noticed():
    """The bound above can fail: at this rate the limit would cost more events than chance explains."""
    events = table(schedule(flip_rate=0.12, max_layers=None), STEPS)
    cut = np.minimum(events.sum(axis=1), 3).sum()
    assert z_score(cut, events.size, 0.12) < -4
    assert table(schedule(flip_rate=0.12), STEPS).sum() == events.sum()


def test_the_notes_check():
    """16 layers, rate 0.07, limit 3: 2.2 % of steps would exceed it; few events move, and not far."""
    free, limited = (table(schedule(flip_rate=0.07, max_layers=limit), STEPS) for limit in (None, 3))
    assert (free.sum(axis=1) > 3).mean() == pytest.approx(0.022, abs=0.004)
    moved = (free & ~limited).sum()
    assert 0.015 < moved / free.sum() < 0.04
    assert moved == (limited & ~free).sum()


@pytest.mark.parametrize("max_layers", [1, 2, 3])
def test_c8_limit(max_layers):
    """C8: never more layers than allowed, also where nearly every step is full."""
    rate = 0.9 * max_layers / 16
    counts = table(schedule(flip_rate=rate, max_layers=max_layers), 5_000).sum(axis=1)
    assert counts.max() == max_layers


def highest_accepted_rate(layers, max_layers):
    """The highest rate, in ten-thousandths, that a recipe may ask for."""
    accepted = (
        rate / 10_000
        for rate in range(10_000, 0, -1)
        if not CompetitionConfig(flip_rate=rate / 10_000, max_layers=max_layers).problems(layers, STEPS)
    )
    return next(accepted)


@pytest.mark.parametrize(("layers", "max_layers"), [(16, 3), (16, 6), (8, 2), (4, 1), (2, 1), (8, 4), (4, 3), (8, 6)])
def test_c8_each_layer_near_the_limit(layers, max_layers):
    """C8: as full as a recipe may ask for, every layer competes as often as its coin promises, or nearly so."""
    rate = highest_accepted_rate(layers, max_layers)
    assert rate > 0.85 * max_layers / layers
    events = table(schedule(layers=tuple(range(layers)), flip_rate=rate, max_layers=max_layers), STEPS)
    assert events.sum(axis=1).max() <= max_layers
    for count in events.sum(axis=0):
        assert abs(z_score(count, STEPS, rate)) < 4 or 0.93 < count / (STEPS * rate) < 1.07


@pytest.mark.parametrize(("layers", "max_layers"), [(16, 3), (4, 1), (8, 2)])
@pytest.mark.parametrize("full", [0.4, 0.9])
@pytest.mark.parametrize(("steps", "warmup"), [(60, 5), (200, 20)])
def test_c8_short_runs(layers, max_layers, full, steps, warmup):
    """C8: runs far shorter than a window, over 40 seeds: nothing in the warm-up, then the rate that is asked for.

    Events move to earlier steps, so a run has a few per cent more than its share, never fewer than chance explains.
    """
    rate = full * max_layers / layers
    options = {"flip_rate": rate, "max_layers": max_layers, "warmup_steps": warmup}
    runs = [table(schedule(seed, tuple(range(layers)), **options), steps) for seed in range(40)]
    assert not any(run[:warmup].any() for run in runs)
    after = np.concatenate([run[warmup:] for run in runs])
    assert after.sum(axis=1).max() == max_layers
    assert z_score(after.sum(), after.size, rate) > -4
    assert after.mean() < 1.1 * rate


def test_a_limit_of_all_layers_is_no_limit():
    assert (
        table(schedule(flip_rate=0.5, max_layers=16), 500) == table(schedule(flip_rate=0.5, max_layers=None), 500)
    ).all()


@pytest.mark.parametrize("warmup", [0, 1, 100, WINDOW_STEPS + 5])
def test_c8_warmup(warmup):
    """C8: nothing before the warm-up, the full rate right after it."""
    one = schedule(flip_rate=0.5, warmup_steps=warmup, max_layers=None)
    assert not table(one, warmup).any()
    assert abs(z_score(table(one, 500, warmup).sum(), 500 * 16, 0.5)) < 4


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (1.0, 16)])
def test_never_and_always(rate, expected):
    one = schedule(flip_rate=rate, max_layers=None)
    assert {len(one.competing(step)) for step in range(50)} == {expected}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 5 * WINDOW_STEPS), min_size=1, max_size=8))
def test_c8_purity(seed, steps):
    """C8: the same whatever was asked before, in whatever order, and in another process, which pickling stands for."""
    first = [schedule(seed).competing(step) for step in steps]
    _window.cache_clear()
    shuffled = list(range(len(steps)))
    random.Random(0).shuffle(shuffled)
    copied = pickle.loads(pickle.dumps(schedule(seed)))
    again = {place: copied.competing(steps[place]) for place in shuffled}
    assert [again[place] for place in range(len(steps))] == first


def _of_a_rank():
    _window.cache_clear()
    return [sorted(schedule().competing(step)) for step in range(200)]


def test_c8_all_ranks_agree():
    ranks = run_ranks(2, _of_a_rank)
    assert ranks[0] == ranks[1] == [sorted(schedule().competing(step)) for step in range(200)]
    assert any(ranks[0])


def test_c8_longer_training_and_resuming_change_no_step():
    """C8: a schedule knows no end; a curriculum of more steps has the same contests in the steps before."""
    short, long = (Curriculum(CurriculumConfig(), 2, steps, 64, schedule()) for steps in (100, 10_000))
    assert all(short.knobs(step) == long.knobs(step) for step in range(300))
    assert any(long.knobs(step).competing_layers for step in range(9_000, 9_100))


def test_seed_and_layer_decide():
    """Another seed is another schedule, layers have coins of their own, and a layer keeps its coins among others."""
    steps = 3_000
    base = table(schedule(flip_rate=0.3, max_layers=None), steps)
    assert (base != table(schedule(4, flip_rate=0.3, max_layers=None), steps)).any()
    correlation = np.corrcoef(base.T) - np.eye(16)
    assert np.abs(correlation).max() < 5 / math.sqrt(steps)
    assert abs(np.corrcoef(base[:-1, 0], base[1:, 0])[0, 1]) < 5 / math.sqrt(steps)
    some = table(schedule(layers=(2, 9), flip_rate=0.3, max_layers=None), steps)
    assert (some == base[:, [2, 9]]).all()


def test_evaluation_has_no_contest():
    curriculum = Curriculum(CurriculumConfig(), 2, 100, 64, schedule(flip_rate=1.0, max_layers=None))
    assert curriculum.knobs(5).competing_layers == frozenset(LAYERS)
    assert curriculum.evaluation_knobs(5).competing_layers == frozenset()


def test_settings_that_lose_contests_are_named():
    """Where coins promise more contests than fit, later layers would lose theirs; a warm-up can leave no step."""
    always = CompetitionConfig(flip_rate=1.0)
    assert [key for key, _ in always.problems(num_layers=4, max_steps=10)] == ["max_layers"]
    assert not always.problems(num_layers=3, max_steps=10)
    assert not CompetitionConfig(flip_rate=1.0, max_layers=None).problems(num_layers=40, max_steps=10)
    assert not CompetitionConfig().problems(num_layers=16, max_steps=10)
    late = CompetitionConfig(warmup_steps=10)
    assert [key for key, _ in late.problems(num_layers=4, max_steps=10)] == ["warmup_steps"]
    assert not late.problems(num_layers=4, max_steps=11)
