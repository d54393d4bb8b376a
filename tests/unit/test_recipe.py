"""The recipe: shipped files, contradictions between settings, the published schema, and no raw error ever."""

import copy
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.tiny import classification

from smoe_train.config import Layered, merge
from smoe_train.errors import RecipeError
from smoe_train.recipe import (
    Pretrained,
    Recipe,
    check_recipe,
    find_recipe,
    json_schema,
    load_recipe,
    shipped_recipes,
)

SHIPPED = sorted(shipped_recipes())


def recipe(world_size=None, **sections):
    return check_recipe(Layered(merge({"version": 1}, sections)), "run", world_size)


def problems(world_size=None, **sections):
    try:
        recipe(world_size, **sections)
    except RecipeError as error:
        return {problem.key: problem.message for problem in error.problems}
    return {}


def write(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# Reading


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_survives_being_resolved(name, tmp_path):
    loaded = load_recipe(name)
    again = load_recipe(write(tmp_path, loaded.to_yaml()))
    assert again == loaded
    assert again.to_yaml() == loaded.to_yaml()
    assert again.identity() == loaded.identity()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_says_what_it_is_for(name):
    assert load_recipe(name).description


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=20), st.sampled_from(["1e5", "0x1", "null"]))
def test_texts_survive_being_resolved(tmp_path_factory, description, name):
    before = recipe(description=description, name=name)
    assert load_recipe(write(tmp_path_factory.mktemp("r"), before.to_yaml())) == before


@pytest.mark.parametrize(
    "text", ["1e5", "3", "no", "null", "~", "${seed}", "a: b", "# x", "'", '"', "???", "2020-01-01"]
)
def test_texts_that_look_like_something_else_stay_texts(tmp_path, text):
    before = recipe(description=text)
    assert load_recipe(write(tmp_path, before.to_yaml())).description == text


def test_a_run_is_named_after_its_file_unless_it_says_otherwise(tmp_path):
    path = write(tmp_path, "version: 1\n", "my-run.yaml")
    assert load_recipe(path).name == "my-run"
    assert load_recipe(path, ["name=other"]).name == "other"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", "-x", ".x", "a" * 101, "a b", "x\n", "ä"])
def test_a_name_cannot_leave_its_folder(name):
    assert "name" in problems(name=name)


def test_mistakes_of_every_kind_are_reported_together(tmp_path):
    path = write(
        tmp_path,
        "version: 1\n"
        "training:\n"
        "  max_step: 10\n"  # a typo
        "learning_rate:\n"
        "  peak: fast\n"  # a wrong type
        "model:\n"
        "  moe:\n"
        "    num_experts: 6\n"
        "parallel:\n"
        "  expert_parallel_size: 4\n",  # an impossible topology
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["training.global_batch_size=10"], world_size=4)
    found = {(problem.where.removeprefix(f"{path}:"), problem.key) for problem in caught.value.problems}
    assert found == {
        ("3", "training.max_step"),
        ("5", "learning_rate.peak"),
        ("10", "parallel.expert_parallel_size"),
        ("command line", "training.global_batch_size"),
    }
    message = str(caught.value)
    assert "did you mean 'max_steps'?" in message
    assert "valid for 4 processes and 6 experts: 1, 2" in message
    assert "10 is not a multiple of 32 = 4 processes x training.micro_batch_size 8" in message


def test_the_router_of_a_parent_is_replaced_not_mixed(tmp_path):
    write(tmp_path, "version: 1\nmodel: {moe: {router: {type: hyper_router, hyper_hidden: 8}}}\n", "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\nmodel: {moe: {router: {type: top_k, bias: true}}}\n")
    assert load_recipe(child).model.moe.router.model_dump(exclude_defaults=True) == {"bias": True}
    assert load_recipe(child, ["model.moe.router.type=hyper_router"]).model.moe.router.hyper_hidden == 256
    with pytest.raises(
        RecipeError, match=r"command line: model\.moe\.router\.hyper_hidden: unknown key; allowed: bias"
    ):
        load_recipe(child, ["model.moe.router.hyper_hidden=3"])


def test_extends_finds_neighbours_and_shipped_recipes(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "extends: demo\nseed: 5\n", "one.yaml")
    path = write(tmp_path, "extends: ../one.yaml\nname: two\n", "sub/two.yaml")
    loaded = load_recipe(path)
    demo = load_recipe("demo")
    own = {"name": demo.name, "description": demo.description, "seed": demo.seed}
    assert loaded.model_copy(update=own) == demo
    assert (loaded.name, loaded.description, loaded.seed) == ("two", "", 5)
    assert load_recipe(str(tmp_path / "one.yaml")).name == "one", "another run than the one it extends"


def test_extends_takes_a_list_of_neighbours_and_shipped_recipes(tmp_path):
    write(tmp_path, "version: 1\nname: neighbour\nseed: 5\nmodel: {moe: {router: {type: top_k}}}\n", "n.yaml")
    path = write(tmp_path, "extends: [glue/rte, routers/_x_moe, n.yaml, routers/_sim_smoe]\n")
    loaded = load_recipe(path)
    assert (loaded.name, loaded.description, loaded.seed) == ("r", "", 5)
    assert (loaded.data.task, loaded.model.moe.router.type) == ("rte", "sim_smoe")
    assert loaded.training == load_recipe("glue/rte").training


def test_a_missing_one_of_a_list_is_reported_where_it_is_named(tmp_path):
    path = write(tmp_path, "version: 1\nextends:\n- glue/rte\n- routers/sim_smoe\n", "mine.yaml")
    over = write(tmp_path, "extends: [demo, mine.yaml]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(over)
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == (f"{path}:2", "extends")
    assert "'routers/sim_smoe': no file and no shipped recipe of this name" in problem.message
    assert "did you mean 'routers/_sim_smoe'?" in problem.message, "among those that are only to be extended"


def test_a_mistake_on_the_command_line_is_sought_there():
    for override in ("model.moe.router.type=topk", "model.moe.top_k=1", "data.source=text", "training.max_steps=4"):
        with pytest.raises(RecipeError) as caught:
            load_recipe("smoke/top_k", [override])
        assert {problem.where for problem in caught.value.problems} == {"command line"}, override


@pytest.mark.parametrize(
    "name", ["nothere.yaml", "nothere", "deno", "''", "a" * 300, "a" * 300 + ".yaml", "~nobody-here/x", r'"a\0.yaml"']
)
def test_a_parent_that_is_missing_is_reported_where_it_is_named(tmp_path, name):
    path = write(tmp_path, f"version: 1\nextends: {name}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == (f"{path}:2", "extends")
    if name == "deno":
        assert "did you mean 'demo'?" in problem.message


@pytest.mark.parametrize("name", ["nothere.yaml", "nothere", "", "a" * 5000, "~nobody-here/x", "a\0b", "/", "."])
def test_a_recipe_that_is_missing_is_named(name):
    with pytest.raises(RecipeError):
        find_recipe(name)


def test_recipes_to_be_extended_only_are_not_listed():
    assert not [name for name in SHIPPED if name.rpartition("/")[2].startswith("_")]
    assert "demo" in SHIPPED


def test_the_identity_changes_with_what_a_checkpoint_cannot_outlive():
    base = recipe()
    same = recipe(
        name="x",
        training={"max_steps": 5},
        learning_rate={"peak": 0.5},
        parallel={"zero_stage": 2},
        optimizer={},
        model={"dropout": 0.1, "moe": {"top_k": 3, "load_balance_coefficient": 0.5}},
    )
    assert same.identity() == base.identity()
    for key, change in {
        "seed": {"seed": 1},
        "model.d_model": {"model": {"d_model": 128}},
        "training.sequence_length": {"training": {"sequence_length": 8}},
        "training.global_batch_size": {"training": {"global_batch_size": 32}},
    }.items():
        changed = recipe(**change).identity()
        assert {name for name in changed if changed[name] != base.identity()[name]} == {key}


# Contradictions between settings


def moe(**options):
    return {"moe": options}


CONTRADICTIONS = [
    (None, {"model": moe(top_k=9)}, "model.moe.top_k", "k = 9 exceeds num_experts 8"),
    (None, {"model": moe(layers=[0, 4])}, "model.moe.layers", "indices from 0 to 3"),
    (None, {"model": moe(layers=[1, 1])}, "model.moe.layers", "different"),
    (None, {"model": {"num_heads": 3}}, "model.num_heads", "3 does not divide d_model 256"),
    (None, {"model": {"d_model": 24, "num_heads": 8}}, "model.num_heads", "even head width, not 3"),
    (None, {"model": {"d_ff": 9}}, "model.d_ff", "no effect when every layer is MoE"),
    (None, {"model": {"positions": "learned", "rope_theta": 5.0}}, "model.rope_theta", "no effect"),
    (
        None,
        {"model": {"max_sequence_length": 8}},
        "model.max_sequence_length",
        "less than training.sequence_length 256",
    ),
    (None, {"curriculum": {"top_k": {"low": 3, "high": 2}}}, "curriculum.top_k.low", "3 exceeds high 2"),
    (
        None,
        {"curriculum": {"top_k": {"low": 2, "high": 9}}},
        "curriculum.top_k.high",
        "exceeds model.moe.num_experts 8",
    ),
    (None, {"evaluation": {"top_k": [1, 9, 0]}}, "evaluation.top_k", "[9, 0] is outside 1 to num_experts 8"),
    (
        None,
        {"learning_rate": {"form": "constant", "final_fraction": 0.1}},
        "learning_rate.final_fraction",
        "no effect with form: constant",
    ),
    (None, {"learning_rate": {"warmup_steps": 1000}}, "learning_rate.warmup_steps", "leaves no step"),
    (
        None,
        {"model": moe(layers=[]), "curriculum": {"top_k": {"low": 1, "high": 2}}},
        "curriculum.top_k",
        "has no effect: the model has no MoE layer",
    ),
    *(
        (
            None,
            {"model": moe(layers=[]), "curriculum": {key: value}},
            f"curriculum.{key}",
            "has no effect: the model has no MoE layer",
        )
        for key, value in {
            "threshold": {"first": 0.1, "last": 0.2},
            "competition": {},
            "loss_weights": {"load_balance_loss": {"first": 1.0, "last": 0.0}},
            "order": {},
        }.items()
    ),
    (
        None,
        {"curriculum": {"threshold": {"first": 0.1, "last": 0.2}}},
        "curriculum.threshold",
        "router top_k with these options has no threshold",
    ),
    (None, {"curriculum": {"competition": {}}}, "curriculum.competition", "router top_k has no contest"),
    (
        None,
        {
            "model": {"num_layers": 4, "moe": {"router": {"type": "compete_smoe"}}},
            "curriculum": {"competition": {"flip_rate": 1.0}},
        },
        "curriculum.competition.max_layers",
        "3 leaves too little room for the 4 contests a step",
    ),
    (
        None,
        {"curriculum": {"loss_weights": {"load_balance": {"first": 1.0, "last": 0.0}}}},
        "curriculum.loss_weights.load_balance",
        "router top_k has no such loss; did you mean 'load_balance_loss'",
    ),
    (
        None,
        {"curriculum": {"loss_weights": {"z_loss": {"first": 1.0, "last": 0.0}}}},
        "curriculum.loss_weights.z_loss",
        "multiplies the coefficient of the loss, which is 0",
    ),
    (
        None,
        {"curriculum": {"loss_weights": {"load_balance_loss": {"first": 1.0, "last": -0.5}}}},
        "curriculum.loss_weights.load_balance_loss",
        "cannot be negative",
    ),
    (
        None,
        {"curriculum": {"loss_weights": {"load_balance_loss": {"form": "exponential", "first": 1.0, "last": 0.0}}}},
        "curriculum.loss_weights.load_balance_loss.form",
        "exponential needs first and last above 0",
    ),
    (
        None,
        {"curriculum": {"loss_weights": {"load_balance_loss": {"first": 1.0, "last": 0.0, "start_step": 1000}}}},
        "curriculum.loss_weights.load_balance_loss.start_step",
        "1000 is not before training.max_steps 1000",
    ),
    *(
        (
            None,
            {"curriculum": {"sequence_length": {"low": low, "steps": 5}}},
            "curriculum.sequence_length.low",
            f"training.sequence_length 256 is not {low} times a power of two above 1",
        )
        for low in (256, 512, 3, 96)
    ),
    (
        None,
        {"curriculum": {"order": {}}},
        "curriculum.order",
        "has no effect: router top_k with these options gives all tokens as many experts",
    ),
    *(
        (
            None,
            {"model": moe(router={"type": "adaptive", "threshold": threshold}), "curriculum": {"order": {}}},
            "curriculum.order",
            "gives all tokens as many experts",
        )
        for threshold in (-0.1, 1.0)
    ),
    (
        None,
        {"model": moe(router={"type": "adaptive", "base": {"type": "compete_smoe"}}), "curriculum": {"order": {}}},
        "curriculum.order",
        "a contest gives all tokens k experts",
    ),
    *(
        (
            None,
            {"model": moe(router={"type": "adaptive"}), "curriculum": {"threshold": {"first": first, "last": last}}},
            "curriculum.threshold",
            text,
        )
        for first, last, text in (
            (30.0, 10.0, "lies between -1 and 1"),
            (-0.5, -0.1, "no token ever has a second expert"),
        )
    ),
    (
        None,
        {"model": moe(num_experts=8, router={"type": "sim_smoe"}), "training": {"max_steps": 17}},
        "model.moe.router",
        "no pair is ever checked",
    ),
    (
        None,
        {"model": moe(router={"type": "adaptive"}), "curriculum": {"order": {"window_samples": 16}}},
        "curriculum.order.window_samples",
        "orders samples within a step only; use more than training.global_batch_size 16",
    ),
    (
        None,
        {
            "curriculum": {"top_k": {"form": "multi_step_increase", "low": 1, "high": 17}},
            "model": moe(num_experts=32, router={"type": "top_k", "softmax": "before_top_k"}),
        },
        "curriculum.top_k.high",
        "17 is never reached",
    ),
    *(
        (None, {"health": {name: {"action": action, key: value}}}, f"health.{name}.{key}", f"action: {action}; leave")
        for name, action, key, value in (
            ("non_finite", "stop", "in_a_row", 5),
            ("loss_spike", "off", "threshold", 7.0),
            ("loss_spike", "off", "window_steps", 4000),
            ("router_collapse", "off", "dead_experts", None),
        )
    ),
    (
        None,
        {"model": moe(layers=[]), "health": {"router_collapse": {"action": "stop"}}},
        "health.router_collapse",
        "has no effect: the model has no MoE layer",
    ),
    (
        None,
        {"model": moe(layers=[]), "health": {"router_collapse": {"patience_steps": 3}}},
        "health.router_collapse",
        "has no effect: the model has no MoE layer",
    ),
    (
        None,
        {"health": {"router_collapse": {"dead_experts": None, "imbalance": None, "entropy_below": None}}},
        "health.router_collapse.action",
        "nothing to watch for",
    ),
    (
        None,
        {"health": {"loss_spike": {"window_steps": 1998}}},  # the first loss that has 999 before it, and two more
        "health.loss_spike.window_steps",
        "no alarm before training.max_steps 1000",
    ),
    (
        None,
        {"health": {"router_collapse": {"patience_steps": 1001}}},
        "health.router_collapse.patience_steps",
        "no alarm before training.max_steps 1000",
    ),
    *(
        (
            None,
            {
                "health": {name: {"action": "rollback"}},
                "checkpoint": {"every_steps": 1000},
                "evaluation": {"every_steps": 1000},
            },
            f"health.{name}.action",
            "no checkpoint to go back to",
        )
        for name in ("non_finite", "loss_spike", "router_collapse")
    ),
    (6, {"parallel": {"expert_parallel_size": 3}}, "parallel.expert_parallel_size", "valid for 6 processes"),
    (2, {"parallel": {"expert_parallel_size": 4}}, "parallel.expert_parallel_size", "does not divide the 2 processes"),
    (3, {"training": {"global_batch_size": 16}}, "training.global_batch_size", "not a multiple of 24 = 3 processes"),
    (1, {"parallel": {"zero_stage": 3}}, "parallel.zero_stage", "use 0, 1 or 2"),
    (1, {"parallel": {"zero_stage": 0, "precision": "bf16"}}, "parallel.precision", "use zero_stage 1"),
    (2, {"parallel": {"engine": "local"}}, "parallel.engine", "local runs in one process, not 2"),
    (1, {"parallel": {"engine": "local", "precision": "bf16"}}, "parallel.engine", "fp32 only"),
    (1, {"parallel": {"engine": "local", "zero_stage": 2}}, "parallel.zero_stage", "no effect"),
    (
        2,
        {"model": moe(layers=[]), "parallel": {"expert_parallel_size": 2}},
        "parallel.expert_parallel_size",
        "has no effect: the model has no MoE layer",
    ),
]


@pytest.mark.parametrize(("world_size", "sections", "key", "text"), CONTRADICTIONS)
def test_a_contradiction_is_the_one_thing_reported(world_size, sections, key, text):
    if world_size not in (None, 3):
        sections = {"training": {"global_batch_size": 8 * world_size}, **sections}
    found = problems(world_size, **sections)
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize("router", ["adaptive", "sim_smoe"])
def test_a_k_beyond_all_experts_is_a_problem_for_any_router(router):
    found = problems(model={"moe": {"num_experts": 4, "top_k": 38, "router": {"type": router}}})
    assert "k = 38 exceeds num_experts 4" in found["model.moe.top_k"]


def test_a_curriculum_that_has_an_effect_is_accepted():
    first_and_last = {"first": 0.5, "last": 1.0, "start_step": 999}
    assert problems(curriculum={"loss_weights": {"load_balance_loss": {**first_and_last, "form": "exponential"}}}) == {}
    assert problems(curriculum={"sequence_length": {"low": 128, "steps": 5}}) == {}
    assert problems(curriculum={"sequence_length": {"low": 1, "steps": 10**6}}) == {}
    adaptive = moe(router={"type": "adaptive"})
    order = {"by": "l2", "window_samples": 17}
    assert problems(model=adaptive, curriculum={"threshold": first_and_last, "order": order}) == {}
    over_adaptive = moe(router={"type": "sim_smoe", "base": {"type": "adaptive"}})
    assert "curriculum.order" not in problems(model=over_adaptive, curriculum={"order": {}})


def test_alarms_that_have_an_effect_are_accepted():
    short = {"training": {"max_steps": 9}, "learning_rate": {"warmup_steps": 0}}
    assert problems(**short) == {}, "a run may be shorter than the alarms' defaults"
    assert problems(model=moe(layers=[]), health={"router_collapse": {"action": "off"}}) == {}
    assert problems(health={"loss_spike": {"window_steps": 1994}, "router_collapse": {"patience_steps": 1000}}) == {}
    assert problems(health={"non_finite": {"action": "rollback", "in_a_row": 9}}) == {}
    assert list(problems(health={"non_finite": {"in_a_row": 1}})) == ["health.non_finite.in_a_row"]


def test_a_threshold_reaches_adaptive_gating_below_another_policy():
    """SimSMoE over adaptive gating has the threshold of its base, unless that follows from a share of tokens."""
    schedule = {"threshold": {"first": 0.5, "last": 0.1}}
    for base, has_threshold, varies in (
        ({"type": "adaptive"}, True, True),
        ({"type": "adaptive", "target_top2_share": 0.3}, False, True),
        ({"type": "top_k"}, False, False),
    ):
        router = {"type": "sim_smoe", "base": base}
        options = recipe(model=moe(router=router)).model.moe.router
        assert (options.has_threshold(), options.varies_experts()) == (has_threshold, varies)
        found = problems(model=moe(router=router), curriculum=schedule)
        assert list(found) == ([] if has_threshold else ["curriculum.threshold"])
        assert has_threshold or "router sim_smoe with these options has no threshold" in found["curriculum.threshold"]


def test_an_order_of_samples_can_neither_be_added_to_a_run_nor_taken_away():
    """In the middle of an epoch that would train some samples twice; how they are ordered may change."""
    adaptive = moe(router={"type": "adaptive"})
    without, cosine = recipe(model=adaptive).identity(), recipe(model=adaptive, curriculum={"order": {}}).identity()
    by_mean = recipe(model=adaptive, curriculum={"order": {"by": "mean_ratio", "window_samples": 99}}).identity()
    assert cosine == by_mean
    (key,) = cosine.keys() - without.keys()
    assert "curriculum.order" in key


def test_the_default_recipe_has_no_contradiction():
    for world_size in (None, 1, 2):
        assert problems(world_size) == {}


def test_topology_is_not_checked_without_a_number_of_processes():
    assert problems(None, parallel={"expert_parallel_size": 7, "zero_stage": 3}) == {}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        # In each, the default in place of the wrong value would contradict a sound one.
        ({"model": {"d_model": "x", "num_heads": 3}}, "model.d_model"),
        ({"model": moe(num_experts="x", top_k=64)}, "model.moe.num_experts"),
        ({"model": moe(num_experts="x"), "evaluation": {"top_k": [32]}}, "model.moe.num_experts"),
        ({"model": moe(num_experts="x"), "parallel": {"expert_parallel_size": 3}}, "model.moe.num_experts"),
        ({"training": {"max_steps": "x"}, "learning_rate": {"warmup_steps": 2000}}, "training.max_steps"),
        ({"training": {"micro_batch_size": "x", "global_batch_size": 3}}, "training.micro_batch_size"),
        ({"training": {"sequence_length": "x"}, "model": {"max_sequence_length": 8}}, "training.sequence_length"),
        ({"model": moe(layers="x"), "parallel": {"expert_parallel_size": 3}}, "model.moe.layers"),
        ({"training": 3, "learning_rate": {"warmup_steps": 2000}}, "training"),
        ({"model": None, "parallel": {"expert_parallel_size": 3}}, "model"),
    ],
)
def test_no_contradiction_with_a_value_that_nobody_wrote(sections, key):
    assert list(problems(3, **merge({"training": {"global_batch_size": 24}}, sections))) == [key]


def test_contradictions_elsewhere_are_reported_beside_wrong_values():
    found = problems(3, seed="x", training={"global_batch_size": 16}, data={"source": "text"})
    assert set(found) == {"seed", "training.global_batch_size", "data.path"}


def test_a_long_curriculum_is_checked_at_once():
    training = {"max_steps": 10**15}
    curriculum = {"top_k": {"form": "cosine_increase", "low": 1, "high": 9}}
    assert "curriculum.top_k.high" in problems(training=training, curriculum=curriculum)
    assert recipe(training=training, curriculum={"top_k": {"low": 2, "high": 6}}).schedule().top_k_values() == {
        2, 3, 4, 5, 6
    }  # fmt: skip


# The published schema


def violations(value, schema, root, path="$"):
    """Yields what a value violates: an independent reading of the part of JSON Schema that is published."""
    known = {
        "$ref", "$defs", "title", "description", "default", "type", "properties", "additionalProperties", "required",
        "enum", "const", "anyOf", "oneOf", "discriminator", "items", "minimum", "maximum", "exclusiveMinimum",
        "exclusiveMaximum", "pattern", "format", "minItems", "maxItems",
    }  # fmt: skip
    assert set(schema) <= known, f"{path}: {set(schema) - known}"
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    for word, good in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
        if word in schema:
            fits = sum(not list(violations(value, branch, root, path)) for branch in schema[word])
            if not good(fits):
                yield f"{path}: fits {fits} branches of {word}"
    if "const" in schema and value != schema["const"]:
        yield f"{path}: is not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: is none of {schema['enum']}"
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kind = schema.get("type")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "number" or kind == "integer":
        if not number or (kind == "integer" and value != int(value)):
            yield f"{path}: is no {kind}"
    elif kind is not None and not isinstance(value, kinds[kind]):
        yield f"{path}: is no {kind}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        for key, item in value.items():
            if key in properties:
                yield from violations(item, properties[key], root, f"{path}.{key}")
            elif schema.get("additionalProperties") is False:
                yield f"{path}.{key}: unknown"
        yield from (f"{path}.{key}: missing" for key in schema.get("required", []) if key not in value)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from violations(item, schema["items"], root, f"{path}[{index}]")
    if number:
        bounds = {
            "minimum": lambda bound: value >= bound,
            "maximum": lambda bound: value <= bound,
            "exclusiveMinimum": lambda bound: value > bound,
            "exclusiveMaximum": lambda bound: value < bound,
        }
        yield from (f"{path}: {word}" for word, holds in bounds.items() if word in schema and not holds(schema[word]))
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: pattern"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_accepts_shipped_recipes_as_written_and_as_resolved(name):
    schema = json_schema()
    written = OmegaConf.to_container(OmegaConf.load(find_recipe(name)))
    assert list(violations(written, schema, schema)) == []
    resolved = load_recipe(name).model_dump(mode="json")
    assert list(violations(resolved, schema, schema)) == []


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"modle": {}}, "$.modle"),
        ({"version": 2}, "$.version"),
        ({"training": {"max_steps": 0}}, "$.training.max_steps"),
        ({"training": {"max_steps": "3"}}, "$.training.max_steps"),
        ({"name": "../x"}, "$.name"),
        ({"extends": 3}, "$.extends"),
        ({"model": {"moe": {"router": {"type": "top_q"}}}}, "$.model.moe.router"),
        ({"model": {"moe": {"router": {"type": "top_k", "hyper_dim": 3}}}}, "$.model.moe.router"),
        ({"data": {"source": "text"}}, "$.data"),
        ({"curriculum": {"top_k": {"low": 1}}}, "$.curriculum.top_k"),
    ],
)
def test_the_schema_refuses_what_the_recipe_refuses(change, where):
    schema = json_schema()
    found = list(violations({"version": 1, **change}, schema, schema))
    assert len(found) >= 1
    assert all(fault.startswith(where) for fault in found)


def test_every_key_is_described_in_the_schema():
    schema = json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    tags = {"type", "source"}
    silent = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
        # A field described with the very words of its section is not described twice.
        if key not in tags
        and "description" not in value
        and "description" not in sections[value.get("$ref", "Recipe").rpartition("/")[2]]
    ]
    assert silent == []


# Nothing but a RecipeError


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["top_k", "text", "hyper_router", "all", "bf16", "${seed}", "???", "\ud800", "1e5"]),
)
keys = st.one_of(
    st.sampled_from(["model", "moe", "router", "type", "source", "path", "top_k", "curriculum", "training", "extends"]),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=8,
)


def paths_of(tree, prefix=()):
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*prefix, key))


FULL = recipe(curriculum={"top_k": {"low": 2, "high": 4}}, reporting={"wandb": {}}).model_dump(mode="json")
PATHS = sorted(paths_of(FULL))


def replaced(tree, path, value):
    tree = copy.deepcopy(tree)
    block = tree
    for key in path[:-1]:
        if not isinstance(block.get(key), dict):
            return tree
        block = block[key]
    block[path[-1]] = value
    return tree


def only_recipe_errors(load, *arguments):
    problems = ()
    try:
        assert isinstance(load(*arguments), Recipe)
    except RecipeError as error:
        problems = error.problems or None
    assert problems is not None
    assert all(problem.where and problem.message for problem in problems)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(keys, values, max_size=5), st.sampled_from([None, 1, 4]))
def test_random_trees_never_raise_anything_else(tree, world_size):
    only_recipe_errors(check_recipe, Layered({"version": 1, **tree}), "run", world_size)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), values), min_size=1, max_size=4), st.sampled_from([None, 1, 2, 3]))
def test_mutated_recipes_never_raise_anything_else(mutations, world_size):
    tree = FULL
    for path, value in mutations:
        tree = replaced(tree, path, value)
    only_recipe_errors(check_recipe, Layered(tree), "run", world_size)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_files_never_raise_anything_else(tmp_path, data):
    text = bytearray(load_recipe(data.draw(st.sampled_from(SHIPPED))).to_yaml().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        new = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"\n", b": ", b"\t", b"&a ", b"*a", b"- "])))
        text[place : place + data.draw(st.integers(0, 3))] = new
    path = tmp_path / "r.yaml"
    path.write_bytes(bytes(text))
    only_recipe_errors(load_recipe, str(path), (), 1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), st.builds(
    "{}={}".format, st.sampled_from([".".join(path) for path in PATHS]), st.text(max_size=8)
)), max_size=3))  # fmt: skip
def test_random_overrides_never_raise_anything_else(overrides):
    only_recipe_errors(load_recipe, "demo", overrides, 2)


# Pretrained weights


def fine_tuning(router, **sections):
    """A short fine-tuning of a model that was pretrained with a router."""
    model = {"d_model": 16, "num_heads": 2, "num_layers": 2, "moe": {"num_experts": 4, "d_ff": 8, "router": router}}
    values = {"version": 1, "training": {"max_steps": 5}, **classification(Path("unused"))}
    values = merge(merge(values, {"initialise": {"path": "weights"}}), sections)
    return check_recipe(Layered(values), "fine-tuned", None, Pretrained(Path("weights"), False, model))


def refusals(router, **sections):
    with pytest.raises(RecipeError) as refused:
        fine_tuning(router, **sections)
    return {problem.key: problem.message for problem in refused.value.problems}


def router_options(**options):
    return {"model": {"moe": {"router": options}}}


STABLE = {"type": "stable_moe", "stage_1_steps": 200, "distilled_dim": 7}


def test_a_pretrained_stable_moe_keeps_to_the_router_it_has_distilled():
    router = fine_tuning(STABLE).model.moe.router
    assert (router.stage_1_steps, router.distilled_dim) == (0, 7)
    assert fine_tuning(STABLE, **router_options(stage_1_steps=3)).model.moe.router.stage_1_steps == 3
    again = {**STABLE, "stage_1_steps": 0}
    assert fine_tuning(again).model.moe.router.stage_1_steps == 0, "fine-tuned from what was fine-tuned"
    assert "a model with 7" in refusals(STABLE, **router_options(distilled_dim=8))["model.moe.router.distilled_dim"]
    over = {"type": "sim_smoe", "base": STABLE}
    assert fine_tuning(over, training={"max_steps": 50}).model.moe.router.base.stage_1_steps == 0


def test_a_new_stable_moe_goes_through_both_stages():
    new = {"initialise": {"router": "new"}}
    assert "begins at step 6000" in refusals(STABLE, **new)["model.moe.router"]
    assert fine_tuning(STABLE, **new, **router_options(stage_1_steps=2)).model.moe.router.stage_1_steps == 2
    assert "nothing has trained" in refusals(STABLE, **new, **router_options(stage_1_steps=0))["model.moe.router"]
    assert "nothing has trained" in problems(**router_options(**STABLE | {"stage_1_steps": 0}))["model.moe.router"]


def test_what_allowed_a_look_ahead_in_pretraining_is_not_taken_up():
    leaking = {"type": "expert_choice", "allow_future_leak": True}
    both_sides = fine_tuning(leaking, task={"attention": "bidirectional"}, model={"moe": {"top_k": 1}})
    assert not both_sides.model.moe.router.allow_future_leak
    assert "looks at later tokens" in refusals(leaking)["model.moe.router"]
    assert fine_tuning(leaking, **router_options(allow_future_leak=True)).model.moe.router.allow_future_leak


def test_a_bias_that_was_frozen_late_in_pretraining_moves_again():
    frozen = {"type": "sigmoid", "bias_frozen_after_steps": 900}
    assert fine_tuning(frozen).model.moe.router.bias_frozen_after_steps is None
    set_anew = fine_tuning(frozen, **router_options(bias_frozen_after_steps=4))
    assert set_anew.model.moe.router.bias_frozen_after_steps == 4


def test_an_order_leaves_no_room_for_sorting_by_length():
    adaptive = {"type": "adaptive", "threshold": 0.1, "base": {"type": "top_k"}}
    order = {"curriculum": {"order": {"by": "mean_ratio"}}}
    for harmless in ({}, {"task": {"length_window": 1}}):
        assert fine_tuning(adaptive, **order, **harmless)
    found = refusals(adaptive, **order, task={"length_window": 8})
    assert found == {
        "task.length_window": "has no effect: curriculum.order says which examples stand together; leave it out"
    }


def test_a_classification_has_no_logits_over_the_vocabulary():
    found = refusals({"type": "top_k"}, performance={"logits_chunk_tokens": 64})
    expected = "has no effect on classification, which has no logits over the vocabulary; leave it out"
    assert found == {"performance.logits_chunk_tokens": expected}


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", "all"), ("false", "none"), ("none", "none"), ("attention", "attention"), ("experts", "experts")],
)
def test_activation_checkpointing_is_a_policy_and_was_a_switch(tmp_path, written, read):
    for before, overrides in ((f"activation_checkpointing: {written}", ()), ("", (written,))):
        path = write(tmp_path, f"version: 1\nname: one\ndata: {{source: enwik8}}\ntraining: {{{before}}}\n")
        recipe = load_recipe(path, [f"training.activation_checkpointing={value}" for value in overrides])
        assert recipe.training.activation_checkpointing == read


def test_a_model_without_routers_has_none_to_start_anew():
    found = refusals({"type": "top_k"}, model={"moe": {"layers": []}}, initialise={"router": "new"})
    assert found["initialise.router"] == "has no effect: the model has no MoE layer"
