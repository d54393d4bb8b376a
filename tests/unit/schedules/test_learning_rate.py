"""Learning rates, computed by hand."""

import math

import pytest

from smoe_train.schedules import LearningRateConfig, learning_rate


def rates(max_steps, **options):
    config = LearningRateConfig(**options)
    return [learning_rate(config, step, max_steps) for step in range(max_steps + 1)]


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
    assert rates(8, peak=0.4, warmup_steps=4, form="constant") == pytest.approx([0.1, 0.2, 0.3] + [0.4] * 6)


def test_linear():
    values = rates(4, peak=1.0, form="linear", final_fraction=0.2)
    assert values == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    values = rates(6, peak=1.0, form="linear", warmup_steps=2)
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine():
    values = rates(4, peak=2.0, form="cosine")
    half = math.sqrt(0.5)
    assert values == pytest.approx([2.0, 1 + half, 1.0, 1 - half, 0.0])
    values = rates(4, peak=2.0, form="cosine", final_fraction=0.1)
    assert values == pytest.approx([2.0, 0.2 + 0.9 * (1 + half), 1.1, 0.2 + 0.9 * (1 - half), 0.2])


def test_no_step_is_spent_at_zero():
    assert all(rate > 0 for rate in rates(50, form="cosine", warmup_steps=5)[:50])


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_after_the_end_it_stays(form):
    config = LearningRateConfig(peak=1.0, form=form, final_fraction=0.3)
    assert learning_rate(config, 10, 10) == learning_rate(config, 1000, 10) == pytest.approx(0.3)


def test_warm_up_of_the_whole_run():
    assert rates(3, peak=3.0, warmup_steps=3)[:3] == pytest.approx([1.0, 2.0, 3.0])
