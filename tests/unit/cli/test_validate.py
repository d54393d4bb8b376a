"""``validate``: layout and cost, against numbers made by hand."""

import json

import pytest
from typer.testing import CliRunner

from smoe_train.cli.app import app
from smoe_train.errors import CheckFailedError, RecipeError
from smoe_train.routing.top_k import TopKRouter

RECIPE = """
version: 1
model:
  d_model: 8
  num_layers: 3
  num_heads: 2
  d_ff: 12
  feed_forward: relu
  moe: {layers: [0, 2], num_experts: 4, d_ff: 5, top_k: 1, router: {type: top_k, softmax: before_top_k, bias: true}}
curriculum: {top_k: {low: 1, high: 3}}
training: {sequence_length: 16, micro_batch_size: 2, global_batch_size: 8}
"""

# Two layers of 4 experts, each 8x5 + 5 + 5x8 + 8; one dense layer of 8x12 + 12 + 12x8 + 8.
EXPERTS = 2 * 4 * (40 + 5 + 40 + 8)
DENSE = 96 + 12 + 96 + 8
EMBEDDING = 256 * 8
ATTENTION = 4 * 64
NORMS = 7 * 2 * 8
ROUTERS = 2 * (4 * 8 + 4)
SHARED = EMBEDDING + 3 * ATTENTION + NORMS + DENSE + ROUTERS


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def call(*arguments):
    result = CliRunner().invoke(app, ["validate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def plan(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


def test_a_plan_for_four_processes(recipe):
    found = plan(recipe, "parallel.expert_parallel_size=2", "--nproc", "4")
    # 4 experts of 2 layers over 2 ranks; their state over the 2 ranks with the same experts, the rest over all 4.
    experts, share = EXPERTS // 2, EXPERTS // 4 + SHARED // 4
    bytes_of_rank = {
        "weights_bytes": 4 * (experts + SHARED),
        "gradients_bytes": 4 * (experts + SHARED),
        "optimizer_bytes": 12 * share,
        "reduction_buffer_bytes": 4 * (experts + SHARED),
        # 32 tokens of a rank and step, at most 3 experts, 2 layers, half of it to the other rank, 4 directions.
        "all_to_all_bytes_per_step": 4 * 32 * 3 * 8 * 4 * 2 // 2,
    }
    bytes_of_rank["model_state_bytes"] = sum(
        bytes_of_rank[name]
        for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes", "reduction_buffer_bytes")
    )
    # 32 tokens: 3 layers of 8 x 8 and 2 x 8 values, a dense one of 12, two with 3 experts of 2 x 8 + 5, 2 x 8 at the
    # end; and 256 logits a token.
    bytes_of_rank["activation_bytes"] = 32 * 4 * (3 * 80 + 12 + 2 * 3 * 21 + 16) + 32 * 256 * 16
    bytes_of_rank["step_copies_bytes"] = 4 * max(EXPERTS // 4, SHARED // 4)
    bytes_of_rank["peak_bytes"] = (
        bytes_of_rank["model_state_bytes"] - bytes_of_rank["gradients_bytes"] + bytes_of_rank["activation_bytes"]
    )
    assert found == {
        "name": "r",
        "processes": 4,
        "moe_layers": [0, 2],
        "experts_of_rank": {"0": [0, 1], "1": [2, 3], "2": [0, 1], "3": [2, 3]},
        "valid_expert_parallel_sizes": [1, 2, 4],
        "parameters": {
            "total": EXPERTS + SHARED,
            "active": EXPERTS // 4 + SHARED,
            "trainable": EXPERTS + SHARED,
            "frozen": 0,
            "experts": EXPERTS,
            "routers": ROUTERS,
        },
        "tokens_per_step": 128,
        "accumulation_steps": 1,
        "top_k_in_training": [1, 2, 3],
        "forward_flops_per_token": {
            str(k): 2.0 * (3 * (256 + 2 * 16 * 8) + 192 + 2 * (32 + k * 80) + 8 * 256) for k in (1, 2, 3)
        },
        # From 1 to 3 in 1000 steps, read at step 0, the quarters of 999, and 999.
        "curriculum": [{"step": s, "top_k": k} for s, k in ((0, 1), (249, 1), (499, 2), (749, 2), (999, 3))],
        "bytes_per_rank": bytes_of_rank,
    }


def test_one_process_sends_nothing_and_accumulates(recipe):
    found = plan(recipe)
    assert found["bytes_per_rank"]["all_to_all_bytes_per_step"] == 0
    assert (found["processes"], found["accumulation_steps"]) == (1, 4)
    assert found["experts_of_rank"] == {"0": [0, 3]}


def test_a_hypernetwork_is_frozen(recipe):
    found = plan(recipe, "model.moe.router={type: hyper_router, hyper_hidden: 6, softmax: before_top_k}")["parameters"]
    # e (8) is trained; hidden 6x8 + 6, output (4x8 + 4) x 6 + (4x8 + 4) are not; once a layer.
    frozen = 2 * (48 + 6 + 36 * 6 + 36)
    assert found["frozen"] == frozen
    assert found["routers"] == frozen + 2 * 8
    assert found["trainable"] == EXPERTS + SHARED - ROUTERS + 2 * 8
    assert found["total"] == found["trainable"] + frozen


def test_a_dense_model_has_no_experts_to_place(recipe):
    found = plan(recipe, "model.moe={layers: []}", "curriculum.top_k=null", "--nproc", "2")
    assert found["moe_layers"] == []
    assert found["experts_of_rank"] == {}
    assert found["valid_expert_parallel_sizes"] == [1]
    assert found["parameters"]["experts"] == found["bytes_per_rank"]["all_to_all_bytes_per_step"] == 0
    assert found["parameters"]["active"] == found["parameters"]["total"]


def test_the_table_shows_the_same(recipe):
    text = call(recipe, "--nproc", "2", "parallel.expert_parallel_size=2").stdout
    assert "r: valid" in text
    assert f"{EXPERTS + SHARED:,}" in text
    assert "0 to 1" in text
    assert "2 to 3" in text
    assert [line.split()[1::2] for line in text.splitlines() if line.startswith("│ 499")] == [["499", "2"]]


def test_every_scheduled_knob_is_planned(recipe):
    found = plan(
        recipe,
        "curriculum.top_k=null",
        "model.moe.z_loss_coefficient=0.1",
        "curriculum.loss_weights.z_loss={first: 0.0, last: 1.0}",
        "curriculum.sequence_length={low: 4, steps: 2}",
        "training.max_steps=3",
    )
    # Doubled twice over two steps; from 0 to 1 over three.
    assert found["curriculum"] == [
        {"step": step, "sequence_length": length, "loss_weights.z_loss": pytest.approx(step / 3)}
        for step, length in ((0, 4), (1, 8), (2, 16))
    ]
    assert plan(recipe, "curriculum.top_k=null")["curriculum"] == []


def test_mistakes_are_those_of_the_recipe(recipe):
    with pytest.raises(RecipeError, match="valid for 3 processes and 4 experts: 1") as caught:
        call(recipe, "--nproc", "3", "parallel.expert_parallel_size=2", "training.global_batch_size=6", "seed=x")
    assert {problem.key for problem in caught.value.problems} == {"seed", "parallel.expert_parallel_size"}


@pytest.mark.parametrize("nproc", ["0", "-1", "x"])
def test_a_number_of_processes_is_a_positive_number(recipe, nproc):
    assert call(recipe, "--nproc", nproc).exit_code == 2


@pytest.fixture
def readable(recipe, text, monkeypatch, tmp_path):
    monkeypatch.setenv("SMOE_TRAIN_CACHE", str(tmp_path / "cache"))
    with recipe.open("a") as file:
        file.write(f"data: {{source: text, path: {text}}}\n")
    return recipe


def test_the_self_test_runs_the_first_step(readable):
    """bf16 and expert parallelism are the run's; here one process in fp32 takes one step."""
    overrides = ("--nproc", "2", "parallel.expert_parallel_size=2", "parallel.precision=bf16")
    tested = plan(readable, "--self-test", *overrides)["self_test"]
    assert tested["losses"] == ["task", "load_balance_loss", "z_loss"]
    assert tested["moe_layers"] == [0, 2]
    printed = call(readable, "--self-test").stdout
    assert "self-test passed, in one process in fp32: task, load_balance_loss, z_loss train what they should" in printed
    assert "self_test" not in plan(readable)


def test_the_self_test_has_no_use_for_an_order_of_later_epochs(readable):
    """With the whole batch 300 steps reach the second epoch; with the one micro-batch of the self-test they do not."""
    overrides = ("model.moe.router={type: adaptive}", "curriculum.order.by=l2", "training.max_steps=300")
    assert plan(readable, "--self-test", *overrides)["self_test"]["moe_layers"] == [0, 2]


def test_the_self_test_names_what_is_wrong(readable, monkeypatch):
    losses = TopKRouter.losses
    monkeypatch.setattr(
        TopKRouter, "losses", lambda *given: {name: loss.detach() for name, loss in losses(*given).items()}
    )
    with pytest.raises(CheckFailedError, match="layer 2: z_loss has no gradient at all, but should train") as caught:
        call(readable, "--self-test")
    assert caught.value.exit_code == 3


def test_what_a_contest_sends(recipe):
    """64 tokens a rank of 32 bytes, 4 experts on 2 ranks, 3 winners: the other rank's share of each."""
    arguments = (recipe, "parallel.expert_parallel_size=2", "--nproc", "2", "model.moe.router.type=compete_smoe")
    found = plan(*arguments, "curriculum.top_k.low=2", "model.moe.top_k=2")
    values, responses, outputs, winners = 32, 2 * 4, 3 * 32 // 2, 3 * 4
    expected = 64 * (2 * (values + responses + outputs) + winners)
    assert found["bytes_per_rank"]["contest_bytes_per_layer_and_step"] == expected
    assert "a contest of one layer" in call(*arguments, "curriculum.top_k.low=2", "model.moe.top_k=2").stdout
    assert "contest_bytes_per_layer_and_step" not in plan(recipe)["bytes_per_rank"]
