"""Alarms: when they go off, when they do not, and that a resume makes no difference."""

import json
import math
import random

import pytest

from smoe_train.errors import CheckpointError
from smoe_train.training.alarms import Alarms, robust_spread
from smoe_train.training.health_config import (
    HealthConfig,
    LossSpikeConfig,
    NonFiniteConfig,
    RouterCollapseConfig,
)


def spike_alarms(**options):
    options = {"action": "rollback", "window_steps": 16, "in_a_row": 2, **options}
    return Alarms(HealthConfig(loss_spike=LossSpikeConfig(**options)))


def collapse_alarms(**options):
    options = {"action": "rollback", "patience_steps": 10, **options}
    return Alarms(HealthConfig(router_collapse=RouterCollapseConfig(**options)))


def losses(values, first=1):
    return [{"step": step, "loss": value} for step, value in enumerate(values, first)]


def window(last, load, experts_per_token=2.0, entropy=0.5, layer=0, length=5):
    """The records of steps last - length + 1 to last; the load is given, the figures follow from it."""
    steps = [{"step": step, "loss": 1.0} for step in range(last - length + 1, last + 1)]
    record = {
        "layer": layer, "tokens": 100.0, "load": load, "load_max_over_mean": max(load) * len(load),
        "experts_per_token": experts_per_token, "entropy_normalised": entropy,
    }  # fmt: skip
    return steps, [record]


EVEN = [0.25, 0.25, 0.25, 0.25]


def test_the_spread_is_that_of_a_hand_computation():
    # Median 3; deviations 2, 1, 0, 1, 97; their median is 1.
    assert robust_spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, pytest.approx(1.4826))


def test_a_spike_alarms_once_at_its_last_step_in_a_row_and_again_only_after_it_was_over():
    alarms = spike_alarms(action="warn")
    assert alarms.judge(losses([2.0, 2.1] * 4), []) == []
    (alarm,) = alarms.judge(losses([2.0, 9.0, 9.0, 9.0], first=9), [])
    assert (alarm.name, alarm.action, alarm.since, alarm.step) == ("loss_spike", "warn", 10, 11)
    # The median of 2.0 x5, 2.1 x4 and 9.0 is 2.05, the median deviation 0.05.
    assert "step 11" in alarm.message
    assert f"{(9.0 - 2.05) / (1.4826 * 0.05):.1f} robust" in alarm.message
    assert "median 2.05 of 10 steps" in alarm.message
    assert alarms.judge(losses([9.0], first=13), []) == []
    assert alarms.judge(losses([2.0], first=14), []) == []
    assert [alarm.since for alarm in alarms.judge(losses([30.0, 30.0], first=15), [])] == [15]


def test_neither_one_high_loss_nor_a_fall_nor_an_early_step_alarms():
    assert spike_alarms().judge(losses([2.0, 2.1] * 4 + [9.0, 2.0, 9.0, 2.0]), []) == []
    assert spike_alarms().judge(losses([2.0, 2.1] * 4 + [0.1] * 5), []) == []
    assert spike_alarms().judge(losses([2.0, 2.1] * 3 + [9.0, 9.0]), []) == [], "half the window is not there yet"


def test_a_level_that_stays_high_becomes_the_usual_one():
    alarms = spike_alarms(action="warn")
    assert len(alarms.judge(losses([2.0, 2.1] * 8 + [3.0, 3.1] * 16), [])) == 1
    assert len(alarms.judge(losses([5.0, 5.1], first=49), [])) == 1


def test_a_loss_that_hardly_varies_may_rise_a_little():
    assert spike_alarms().judge(losses([0.0] * 16 + [0.05, 0.05]), []) == []
    assert len(spike_alarms().judge(losses([0.0] * 16 + [0.07, 0.07]), [])) == 1, "6 x the smallest deviation is 0.06"


def test_steps_that_were_not_applied_or_are_not_finite_are_passed_over():
    """A NaN in the window would make every later comparison false, as it does in a rolling mean."""
    records = losses([2.0, 2.1] * 8 + [math.nan, math.inf, 9.0, 9.0])
    for record in records[-2:]:
        record["skipped"] = True
    alarms = spike_alarms()
    assert alarms.judge(records, []) == []
    assert len(alarms.judge(losses([9.0, 9.0], first=21), [])) == 1


def test_rollbacks_that_do_not_help_end_the_run():
    alarms = spike_alarms()
    alarms.judge(losses([2.0, 2.1] * 8), [])
    saved = json.loads(json.dumps(alarms.to_json()))
    actions = []
    for first in (17, 19, 21, 23):  # each time the steps of the spike before were left out, and the next are as bad
        (alarm,) = alarms.judge(losses([9.0, 9.0], first=first), [])
        actions.append(alarm.action)
        alarms.go_back(saved)
    assert actions == ["rollback", "rollback", "rollback", "stop"]
    assert alarms.judge(losses([2.0], first=17), []) == [], "on the way back, which is before the spike"
    assert alarms.judge(losses([9.0, 9.0], first=25), [])[0].action == "stop"
    alarms.judge(losses([2.0], first=27), [])
    assert alarms.judge(losses([9.0, 9.0], first=28), [])[0].action == "rollback", "that was another spike"


def test_rollbacks_do_not_help_a_router_that_collapses_again_each_time():
    alarms = collapse_alarms(patience_steps=10)
    saved = alarms.to_json()
    actions = []
    for first in (0, 10, 20, 30):  # a checkpoint of step `first`; the steps before it were left out
        steps, routing = window(first + 5, [0.5, 0.5, 0.0, 0.0])
        assert alarms.judge(steps, routing) == []
        (alarm,) = alarms.judge(*window(first + 10, [0.5, 0.5, 0.0, 0.0]))
        actions.append(alarm.action)
        alarms.go_back(saved)
        left_out = [{**step, "skipped": True} for step in steps]
        assert alarms.judge(left_out, []) == [], "the meter counts no routing of steps that are left out"
    assert actions == ["rollback", "rollback", "rollback", "stop"]
    alarms.judge(*window(45, EVEN))
    alarms.judge(*window(50, [0.5, 0.5, 0.0, 0.0]))
    assert alarms.judge(*window(55, [0.5, 0.5, 0.0, 0.0]))[0].action == "rollback", "it had recovered"


def test_an_expert_that_gets_nothing_for_long_enough_is_dead():
    alarms = collapse_alarms(dead_experts=0.5, imbalance=None, entropy_below=None)
    assert alarms.judge(*window(5, EVEN)) == []
    assert alarms.judge(*window(10, [0.5, 0.5, 0.0, 0.0])) == []
    assert alarms.judge(*window(15, [0.5, 0.4, 0.1, 0.0])) == [], "expert 2 has come back"
    assert alarms.judge(*window(20, [0.5, 0.5, 0.0, 0.0])) == []
    (alarm,) = alarms.judge(*window(25, [0.5, 0.5, 0.0, 0.0]))
    assert (alarm.name, alarm.action, alarm.since, alarm.step) == ("router_collapse", "rollback", 16, 25)
    assert "layer 0: experts 2, 3 of 4 have received no token, since step 16" in alarm.message
    assert "health.router_collapse.dead_experts" in alarm.message
    assert alarms.judge(*window(30, [0.5, 0.5, 0.0, 0.0])) == [], "it goes on"


def test_fewer_dead_experts_than_the_share_are_no_alarm():
    alarms = collapse_alarms(dead_experts=0.5)
    assert [alarms.judge(*window(last, [0.4, 0.3, 0.3, 0.0])) for last in range(5, 60, 5)] == [[]] * 11


@pytest.mark.parametrize(
    ("load", "experts_per_token", "alarmed"),
    [
        ([0.5, 0.2, 0.2, 0.1], 2.0, True),  # every token goes to expert 0: (2 - 1) / (4 / 2 - 1) = 1
        ([0.44, 0.2, 0.2, 0.16], 2.0, False),  # (1.76 - 1) / 1 = 0.76
        ([0.97, 0.01, 0.01, 0.01], 1.0, True),  # (3.88 - 1) / (4 - 1) = 0.96
        ([0.25, 0.25, 0.25, 0.25], 4.0, False),  # all experts see every token, which is no collapse
    ],
)
def test_imbalance_is_measured_between_balance_and_everything_to_one_expert(load, experts_per_token, alarmed):
    alarms = collapse_alarms(imbalance=0.9)
    found = [alarms.judge(*window(last, load, experts_per_token)) for last in (5, 10)]
    assert [bool(one) for one in found] == [False, alarmed]
    if alarmed:
        assert f"one expert receives {max(load) * experts_per_token:.0%} of the tokens" in found[1][0].message


def test_a_saturated_router_alarms_and_a_break_starts_the_count_anew():
    alarms = collapse_alarms(entropy_below=0.01)
    entropies = [0.001, 0.5, 0.001, 0.001, 0.001]
    found = [alarms.judge(*window(5 * (i + 1), EVEN, entropy=value)) for i, value in enumerate(entropies)]
    assert [len(one) for one in found] == [0, 0, 0, 1, 0]
    assert found[3][0].since == 11
    assert "entropy is 0.001 of the highest" in found[3][0].message


def test_layers_that_collapse_together_share_one_alarm_that_goes_back_before_the_first():
    alarms = collapse_alarms(patience_steps=10)
    dead = [0.5, 0.5, 0.0, 0.0]

    def judge(last, saturated, load):  # a router of layer 0 that saturates, and one of layer 3 that loses experts
        steps, records = window(last, EVEN, entropy=0.0 if saturated else 0.5)
        return alarms.judge(steps, [*records, *window(last, load, layer=3)[1]])

    assert judge(5, True, EVEN) == []
    assert judge(10, False, EVEN) == []
    assert judge(15, True, dead) == []
    (alarm,) = judge(20, True, dead)
    assert alarm.since == 11
    assert "layer 0: its router" in alarm.message
    assert "layer 3: experts 2, 3" in alarm.message


def test_a_layer_that_collapses_later_has_an_alarm_of_its_own():
    alarms = collapse_alarms(patience_steps=10)
    messages = []
    for last in range(5, 35, 5):
        steps, records = window(last, [0.5, 0.5, 0.0, 0.0])
        later = window(last, [0.5, 0.5, 0.0, 0.0] if last > 15 else EVEN, layer=3)[1]
        messages += [(last, alarm.since) for alarm in alarms.judge(steps, [*records, *later])]
    assert messages == [(10, 1), (25, 16)]


def test_one_expert_alone_and_a_layer_without_tokens_are_not_judged():
    alarms = collapse_alarms()
    for last in range(5, 50, 5):
        steps, (record,) = window(last, [1.0], experts_per_token=1.0, entropy=0.0)
        assert alarms.judge(steps, [record]) == []
        steps, (record,) = window(last, [0.0] * 4, experts_per_token=0.0, entropy=0.0)
        assert alarms.judge(steps, [{**record, "tokens": 0.0}]) == []


def test_switched_off_alarms_stay_silent_and_remember_nothing():
    config = HealthConfig(loss_spike=LossSpikeConfig(action="off"), router_collapse=RouterCollapseConfig(action="off"))
    alarms = Alarms(config)
    for last in range(5, 500, 5):
        steps, routing = window(last, [1.0, 0.0, 0.0, 0.0], entropy=0.0)
        assert alarms.judge([{**step, "loss": 1.0 + 9.0 * (last > 300)} for step in steps], routing) == []
    assert alarms.to_json() == Alarms(config).to_json()


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_so_many_steps_that_are_not_finite_in_a_row_end_the_run(action):
    alarms = Alarms(HealthConfig(non_finite=NonFiniteConfig(action=action, in_a_row=3)))
    found = [alarms.judge_step(step, finite=step in (1, 4)) for step in range(1, 8)]
    assert [alarm and alarm.action for alarm in found] == [None, action, action, None, action, action, "stop"]
    assert (found[1].since, found[1].step) == (2, 2)
    assert "for the 3rd time in a row (health.non_finite.in_a_row)" in found[6].message


def test_finite_steps_on_the_way_back_do_not_end_the_row():
    """Otherwise a fault that stays would be rolled back from for ever, one step further each time."""
    alarms = Alarms(HealthConfig(non_finite=NonFiniteConfig(action="rollback", in_a_row=3)))
    saved = alarms.to_json()
    actions = []
    for bad in (7, 8, 9):
        for step in range(5, 7):
            assert alarms.judge_step(step, finite=True) is None
        actions.append(alarms.judge_step(bad, finite=False).action)
        alarms.go_back(saved)
    assert actions == ["rollback", "rollback", "stop"]


def test_stop_ends_the_run_at_the_first():
    alarms = Alarms(HealthConfig(non_finite=NonFiniteConfig(action="stop")))
    assert alarms.judge_step(1, finite=False).action == "stop"


def test_a_run_resumed_anywhere_gives_the_same_verdicts():
    """The state goes through JSON after every window; the reference keeps it."""
    draw = random.Random(5)
    config = HealthConfig(
        loss_spike=LossSpikeConfig(action="rollback", window_steps=16, in_a_row=2, threshold=3.0),
        router_collapse=RouterCollapseConfig(patience_steps=8, entropy_below=0.2, imbalance=0.5),
    )
    whole, resumed = Alarms(config), Alarms(config)
    seen = []
    for last in range(4, 1200, 4):
        collapsed = draw.random() < 0.6
        steps, routing = window(last, [0.5, 0.5, 0.0, 0.0] if collapsed else EVEN, entropy=draw.random() / 2, length=4)
        high = draw.random() < 0.05
        steps = [{**step, "loss": draw.gauss(9.0 if high else 2.0, 0.1)} for step in steps]
        finite = draw.random() < 0.7
        expected = [whole.judge_step(last, finite), *whole.judge(steps, routing)]
        assert [resumed.judge_step(last, finite), *resumed.judge(steps, routing)] == expected
        seen += [alarm.name for alarm in expected if alarm is not None]
        state = json.loads(json.dumps(resumed.to_json()))
        resumed = Alarms(config)
        resumed.restore(state)
    assert set(seen) == {"loss_spike", "router_collapse", "non_finite"}


def test_state_of_a_checkpoint_without_alarms_is_a_beginning():
    alarms = spike_alarms()
    alarms.judge(losses([2.0] * 20), [])
    alarms.restore({})
    assert alarms.to_json() == spike_alarms().to_json()


@pytest.mark.parametrize(
    "state",
    [
        {"non_finite": 5},
        {"losses": ["a"] * 16},
        {"losses": [math.nan]},
        {"spike": [1]},
        {"layers": []},
        {"layers": {"first": {}}},
        {"layers": {"0": {"idle_after": ["a"]}}},
        {"rollbacks": {"loss_spike": [1]}},
        {"rollbacks": {"earthquake": [1, 2]}},
    ],
    ids=json.dumps,
)
def test_a_state_that_was_never_written_is_refused(state):
    with pytest.raises(CheckpointError, match="state of the alarms is none"):
        spike_alarms().restore(state)


def test_what_is_remembered_of_another_number_of_experts_is_forgotten():
    alarms = collapse_alarms()
    alarms.restore({"layers": {"0": {"idle_after": [0, 0, 0]}}})
    assert alarms.judge(*window(40, EVEN)) == []
