"""The self-test passes for what is right and names what is wrong, for every kind of mistake it is there for."""

import dataclasses

import pytest
import torch
from support.router_cases import every_router
from support.small_model import VOCAB, small_model
from support.tiny import tiny_recipe

from smoe_train import assembly
from smoe_train.data.batches.loader import MicroBatch
from smoe_train.errors import CheckFailedError
from smoe_train.schedules import CompetitionConfig, CompetitionSchedule, Curriculum, CurriculumConfig
from smoe_train.training.config import OptimizerConfig
from smoe_train.training.objectives import language_modelling
from smoe_train.training.optimizer import parameter_groups
from smoe_train.training.self_test import check_expert_update, check_gradients, check_optimizer_groups, fingerprints


def batch(size=3, length=16):
    ids = torch.randint(0, VOCAB, (size, length + 1), generator=torch.Generator().manual_seed(0))
    index = torch.arange(size)
    return MicroBatch.full(ids[:, :-1], ids[:, 1:], index)


def curriculum(competing=False):
    schedule = CompetitionSchedule(CompetitionConfig(), 0, (0, 1)) if competing else None
    return Curriculum(CurriculumConfig(), 2, 10**6, 16, schedule)


def objective_of(model):
    return lambda forward, batch, knobs, totals: language_modelling(forward, batch, knobs, model.config, totals)


@pytest.fixture
def model():
    return small_model()


@every_router
def test_every_policy_passes(case):
    case = case.with_options(hyper_hidden=16, hypernet_std=0.15, init_std=0.3)
    model = small_model(router=case.options.model_dump(mode="json"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert check_gradients(model, batch(), curriculum(case.options.competes()), objective_of(model)) == ([], [])
    assert check_optimizer_groups(model, parameter_groups(model, OptimizerConfig())) == []
    assert torch.equal(torch.get_rng_state(), state), "the self-test draws no random number that training would"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def with_losses(router, change):
    """Lets a router return other losses."""
    losses = router.losses
    router.losses = lambda assignment, context: change(losses(assignment, context))


def test_a_dead_loss_is_named(model):
    """The mistake of published code: a balance loss that is logged, and trains nothing."""
    with_losses(model.routers()[1], lambda found: {name: value.detach() for name, value in found.items()})
    found = check_gradients(model, batch(), curriculum(), objective_of(model)).problems
    assert found == [
        "layer 1: load_balance_loss has no gradient at all, but should train ['weight']",
        "layer 1: z_loss has no gradient at all, but should train ['weight']",
    ]


def test_a_loss_that_is_connected_but_without_effect_is_named(model):
    with_losses(model.routers()[0], lambda found: {**found, "z_loss": found["z_loss"] * 0 + 1})
    assert check_gradients(model, batch(), curriculum(), objective_of(model)).problems == [
        "layer 0: z_loss does not reach weight, which it should train"
    ]


def test_a_loss_that_trains_the_experts_is_named(model):
    router = model.routers()[0]
    merge = router.merge

    def leaking(assignment, y_TKD, context):
        merged = merge(assignment, y_TKD, context)
        return dataclasses.replace(merged, losses={**merged.losses, "z_loss": merged.losses["z_loss"] + y_TKD.mean()})

    router.merge = leaking
    found = check_gradients(model, batch(), curriculum(), objective_of(model)).problems
    assert len(found) == 4
    assert all(one.startswith("layer 0: z_loss reaches the experts' ") for one in found)


def test_a_loss_that_is_not_returned_is_named(model):
    with_losses(model.routers()[0], lambda found: {"z_loss": found["z_loss"]})
    assert check_gradients(model, batch(), curriculum(), objective_of(model)).problems == [
        "layer 0: load_balance_loss is declared by the router but was not returned"
    ]


def test_experts_that_the_task_does_not_reach_are_named(model):
    bank = model.moe_layers()[1].bank
    run = bank.run
    bank.run = lambda x_TD, plan: run(x_TD, plan).detach()
    found = check_gradients(model, batch(), curriculum(), objective_of(model)).problems
    assert {one.split(" which")[0] for one in found} == {
        f"layer 1: task does not reach the experts' {name}," for name in ("w_in", "w_out", "b_in", "b_out")
    }


def test_a_cut_below_the_experts_is_named(model):
    attention = model.model.layers[0].attention
    forward = attention.forward
    attention.forward = lambda *arguments: forward(*arguments).detach()
    found = check_gradients(model, batch(), curriculum(), objective_of(model)).problems
    assert found
    assert all(one.startswith("the task loss does not reach model.layers.0.attention") for one in found)


def test_optimizer_groups(model):
    """A parameter that is left out, held twice, frozen but held, and one that is not the model's."""
    groups = parameter_groups(model, OptimizerConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    left_out = groups[0]["params"].pop()
    twice = groups[0]["params"][0]
    groups[1]["params"] += [twice, torch.nn.Parameter(torch.zeros(1))]
    frozen = groups[1]["params"][0].requires_grad_(False)
    assert sorted(check_optimizer_groups(model, groups)) == sorted(
        [
            f"{names[id(left_out)]} is trainable but in 0 optimizer groups",
            f"{names[id(twice)]} is trainable but in 2 optimizer groups ['decayed', 'not_decayed']",
            f"{names[id(frozen)]} is frozen but in the optimizer group not_decayed",
            "the optimizer group not_decayed holds a tensor that is no parameter",
        ]
    )


def test_experts_that_do_not_change_are_named(model):
    read = torch.Tensor.detach
    before = fingerprints(model, read)
    slots = {0: torch.tensor([5.0, 0.0, 2.0, 1.0]), 1: torch.zeros(4)}
    with torch.no_grad():
        for name, parameter in model.moe_layers()[0].bank.experts.named_parameters():
            if name != "w_out":
                parameter.add_(1e-3)
            else:
                parameter[2].add_(1e-3)
    found = check_expert_update(before, fingerprints(model, read), slots)
    assert found == [
        "model.layers.0.moe.bank.experts.w_out: the first optimizer step left experts [0, 3] as they were, though they "
        "had tokens"
    ]


def start(text, tmp_path, **training):
    recipe = tiny_recipe(text, 1, parallel={"engine": "local"}, training=training)
    tmp_path.mkdir(exist_ok=True)
    return assembly.build_trainer(recipe, assembly.start_process(recipe), tmp_path)


def test_a_run_that_would_train_wrongly_ends_before_its_first_step(text, tmp_path):
    trainer = start(text, tmp_path)
    with_losses(trainer.model.routers()[0], lambda found: {name: value.detach() for name, value in found.items()})
    with pytest.raises(CheckFailedError, match=r"layer 0: load_balance_loss has no gradient at all") as caught:
        trainer.train()
    assert caught.value.exit_code == 3
    assert trainer.state.step == 0
    assert trainer.store.complete() == []


def test_a_run_whose_experts_stand_still_ends_after_its_first_step(text, tmp_path):
    trainer = start(text, tmp_path)
    step = trainer.engine.step
    trainer.engine.step = lambda rate, **options: step(0.0, **options)
    with pytest.raises(CheckFailedError, match="the first optimizer step left experts"):
        trainer.train()
    assert trainer.store.complete() == []


def test_the_self_test_can_be_switched_off_and_changes_nothing(text, tmp_path):
    losses = []
    for folder, enabled in (("on", True), ("off", False)):
        trainer = start(text, tmp_path / folder, self_test=enabled, max_steps=3)
        losses.append(trainer.train().best_cost)
    assert losses[0] == losses[1]


def test_a_rehearsal_takes_one_step_and_keeps_nothing(text, tmp_path):
    trainer = start(text, tmp_path)
    trainer.rehearsal = True
    assert trainer.train().step == 1
    assert trainer.store.complete() == []


def wrapped(**options):
    return small_model(router={**options, "base": {"type": "top_k", "init_std": 0.3}})


@pytest.mark.parametrize("similarity", ["cka_linear", "cka_rbf"])
def test_a_similarity_loss_that_reaches_no_expert_is_named(similarity):
    """It is 0 before the first check of a pair; the self-test rehearses one."""
    model = wrapped(type="sim_smoe", similarity=similarity)
    assert check_gradients(model, batch(), curriculum(), objective_of(model)) == ([], [])
    router = model.routers()[0]
    real = router._similarity_loss
    router._similarity_loss = lambda ids_TK, y_TKD, context: real(ids_TK, y_TKD.detach(), context)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    found = check_gradients(model, batch(), curriculum(), objective_of(model)).problems
    assert {one.split(" which")[0] for one in found} == {
        f"layer 0: similarity_loss does not reach the experts' {name}," for name in ("w_in", "w_out", "b_in", "b_out")
    }
    assert all(torch.equal(before[name], value) for name, value in router.state_dict().items()), "a trace of rehearsal"


def test_a_balance_loss_that_trains_nothing_is_named_while_no_token_has_one_expert():
    """Adaptive gating's balance loss is 0 then; the self-test gives half of the tokens one expert."""
    model = wrapped(type="adaptive", threshold=1.0)
    router = model.routers()[0]
    x = batch().input_ids_BS
    assert model(x).router_losses["load_balance_loss"].detach() == 0.0
    assert check_gradients(model, batch(), curriculum(), objective_of(model)) == ([], [])
    with_losses(
        router, lambda found: {**found, "load_balance_loss": found["load_balance_loss"].detach() + 0 * found["z_loss"]}
    )
    assert check_gradients(model, batch(), curriculum(), objective_of(model)).problems == [
        "layer 0: load_balance_loss does not reach base.weight, which it should train"
    ]
