"""The comparison of orders on SST-2: its runs differ in what they say, and times to equal loss are worked out right."""

import pytest
from support.scripts import loaded

from smoe_train.recipe import flat, load_recipe


@pytest.fixture(scope="module")
def script():
    with loaded("compare_curriculum") as module:
        yield module


@pytest.fixture
def options(script, monkeypatch):
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda _: {0, 1})
    return script.parse(["data.path=glue_data", "--rows", "8000", "--epochs", "4", "--batch-size", "64"])


def recipe_of(script, overrides, options):
    command = script.command_of("name", overrides, 1, options)
    return load_recipe(script.RECIPE, [part for part in command if "=" in part], 1)


def course(script, seconds, held_out, rows, dev=0.8):
    return script.Course(tuple(seconds), tuple(held_out), tuple(rows), dev, script.Batching(1.5, 1.4, (1.1, 1.3)))


@pytest.fixture
def pair(script):
    """Eight steps; the plain run is at .5 after 6 steps of 1 s, the other at .5 after 4: 2 of 1.1 s, then 2 of .9 s."""
    start = (2, 0.7)
    plain = course(script, [1.0] * 8, [start, (4, 0.6), (6, 0.5), (8, 0.45)], [(2, 40), (4, 80), (6, 120), (8, 160)])
    run = course(script, [1.1] * 2 + [0.9] * 6, [start, (4, 0.5), (6, 0.55), (8, 0.52)], [(2, 40), (4, 70), (8, 130)])
    return script.Pair("easy", 1, plain, run, 3, ((0.01, 0.03), (0.02, 0.05)))


def test_runs_differ_from_the_plain_one_in_what_the_arm_says(script, options):
    plain = flat(recipe_of(script, (), options).model_dump(mode="json"))
    changed = {
        "easy first, mean_ratio": {"curriculum.order"},
        "easy first, cosine": {"curriculum.order"},
        "top_k, k = 2": {"model.moe.router"},
        "sorted by length in windows of 16": {"task.length_window"},
    }
    assert plain["curriculum.order"] is None
    assert plain["task.length_window"] == 1
    assert plain["model.moe.router.type"] == "adaptive"
    for arm in script.ARMS:
        other = flat(recipe_of(script, arm.overrides, options).model_dump(mode="json"))
        different = {key for key in plain.keys() | other.keys() if plain.get(key, "") != other.get(key, "")}
        prefixes = changed.pop(arm.label)
        assert {prefix for prefix in prefixes for key in different if key.startswith(prefix)} == prefixes
        assert all(any(key.startswith(prefix) for prefix in prefixes) for key in different)
        assert arm.reorders == (prefixes == {"curriculum.order"})
    assert not changed


def test_steps_are_of_the_rows_that_are_not_held_out(script, options):
    """8,000 rows, a tenth held out: 7,200, so 112.5 batches of 64 an epoch; of 20,000 rows no more than 1,000 are."""
    recipe = recipe_of(script, (), options)
    assert (recipe.task.selection_fraction, recipe.task.selection_examples) == (
        script.SELECTION_FRACTION,
        script.MOST_SELECTED,
    )
    assert recipe.training.max_steps == 450
    assert script.steps_of(options, 1) == 112
    assert script.trained_rows(20_000) == 19_000


def test_costs_to_equal_loss(script, pair):
    """Both get to .5, the plain run's best being .45: 4 steps, 2*1.1 + 2*.9 = 4 s, 70 rows against 6, 6 s, 120."""
    found = pair.ratios()
    assert found["time_to_equal_loss"] == pytest.approx(4 / 6)
    assert found["steps_to_equal_loss"] == pytest.approx(4 / 6)
    assert found["expert_rows_to_equal_loss"] == pytest.approx(70 / 120)
    assert found["time"] == pytest.approx((2.2 + 5.4) / 8)
    assert found["expert_rows"] == pytest.approx(130 / 160)
    assert found["time_of_first_epoch"] == pytest.approx(1.1)
    assert pair.run.steps_to(0.45) is None
    assert script.same_start(pair)


def test_a_start_that_differs_shows(script, pair):
    run = course(script, pair.run.step_seconds, [(2, 0.71), *pair.run.held_out[1:]], pair.run.expert_rows)
    assert not script.same_start(script.Pair("easy", 1, pair.plain, run, 2))
    assert not script.same_start(script.Pair("easy", 1, pair.plain, pair.plain, 1))  # nothing to compare


@pytest.mark.parametrize(
    ("ratios", "noise", "expected"),
    [
        ([0.80, 0.85, 0.89], [0.98, 1.10], "less in every seed"),
        ([0.80, 0.85, 0.91], [0.98, 1.10], "no gain beyond the noise"),
        ([1.2, 1.3], [0.9], "more in every seed"),
        ([0.9, 1.2], [], "no gain beyond the noise"),
    ],
)
def test_a_verdict_needs_every_seed_and_more_than_the_noise(script, ratios, noise, expected):
    assert script.verdict(ratios, noise) == expected


def test_rows_are_summed_over_layers_and_readings(script):
    """Two layers, 10 tokens at 1.5 and 2 experts: 35 rows; then 10 at 1 and 1.2: 22 more; validation does not count."""
    routing = [
        {"step": 5, "split": "train", "tokens": 10, "experts_per_token": 1.5},
        {"step": 5, "split": "train", "tokens": 10, "experts_per_token": 2.0},
        {"step": 5, "split": "selection", "tokens": 99, "experts_per_token": 2.0},
        {"step": 10, "split": "train", "tokens": 10, "experts_per_token": 1.0},
        {"step": 10, "split": "train", "tokens": 10, "experts_per_token": 1.2},
    ]
    metrics = [
        {"step": 1, "split": "train", "step_seconds": 0.5, "loss": 0.7},
        {"step": 2, "split": "train", "step_seconds": 0.25, "loss": 0.7},
        {"step": 2, "split": "selection", "loss": 0.6, "accuracy": 0.7},
        {"step": 2, "split": "dev", "accuracy": 0.75},
    ]
    found = script.course_of(metrics, routing, script.Batching(1.5, 1.4))
    assert found == script.Course((0.5, 0.25), ((2, 0.6),), ((5, 35.0), (10, 57.0)), 0.75, script.Batching(1.5, 1.4))


def test_table(script, pair):
    """Medians over two seeds; plain bests .45 and .41, so the goal is .43, which the second plain run alone gets to."""
    plain = course(script, [1.0] * 8, [(2, 0.7), (4, 0.6), (6, 0.41)], [(2, 40), (4, 80), (6, 120), (8, 160)], 0.9)
    run = course(script, [1.0] * 8, [(2, 0.7), (4, 0.6), (6, 0.41)], [(2, 40), (4, 80), (6, 120), (8, 160)], 0.9)
    second = script.Pair("easy", 2, plain, run, 2, ((0.03, 0.04),))
    text = script.table([pair, second])
    assert "| | plain | easy |\n" in text
    assert "| time to equal loss | 1 | 0.83 (0.67 to 1.00) |\n| which is |  | no gain beyond the noise |\n" in text
    assert "| gets to 0.4300 | 1 of 2, steps 6 | 1 of 2, steps 6 |\n" in text
    assert "| dev accuracy | 0.850 (0.800 to 0.900) | 0.850 (0.800 to 0.900) |\n" in text
    assert "Time of the first epoch, which is the same in both orders: 1.05 (1.00 to 1.10)." in text
    assert "easy, deviation of difficulty within a batch: 0.0200, 0.0400 if shuffled." in text
    assert "easy, expert rows of the busiest of 8 ranks over their mean: 1.1000, 1.3000 if shuffled." in text
