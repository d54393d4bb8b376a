"""The search for what first was not finite: it names the place and leaves nothing behind."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_model import small_model, text

from smoe_train.training.diagnosis import BACKWARD, FORWARD, Finding, describe, find_non_finite

NAN, INF = float("nan"), float("inf")
EXPERTS = "model.layers.1.moe.bank.experts"


class PoisonedGradient(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * NAN


@pytest.fixture
def model():
    return small_model(dropout=0.1).train()


def losses_of(model, micro_batches=2, poison=None):
    def losses():
        for number in range(micro_batches):
            ids = text(seed=number)
            output = model(input_ids=ids)
            loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + 0.1 * sum(output.router_losses.values())
            yield loss if poison is None else poison(number, loss)

    return losses


def search(model, **options):
    return find_non_finite(model, losses_of(model, **options))


def test_a_finite_step_has_no_finding(model):
    assert search(model) is None


def test_a_weight_that_is_damaged_is_named_with_its_expert(model):
    with torch.no_grad():
        model.get_parameter(f"{EXPERTS}.w_in")[2, 0, 0] = INF
    found = search(model)
    assert found.order[:2] == (0, FORWARD)
    assert found.text == f"the weight {EXPERTS}.w_in of expert 2 (1 of 768 values, infinite)"
    assert describe([None, found]) == f"first on rank 1, {found.text}, before anything was computed"


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.0.attention.out", "model.norm", "lm_head"])
def test_the_first_module_whose_output_is_not_finite_is_named(model, path):
    def poison(module, arguments, output):
        return output.index_fill(0, torch.tensor([1]), NAN)

    model.get_submodule(path).register_forward_hook(poison)
    found = search(model)
    assert found.text.startswith(f"the output of {path} (")
    assert "NaN" in found.text
    assert found.order[:2] == (0, FORWARD)


def test_experts_are_named_by_their_global_number(model):
    def poison(module, arguments, output):
        plan = arguments[1]
        of_expert_3 = (plan.row_of_slot_TK >= int(plan.rows_per_expert_E[:3].sum())) & plan.valid_TK
        return torch.where(of_expert_3.unsqueeze(-1), output * INF, output)

    model.get_submodule(EXPERTS).register_forward_hook(poison)
    model.get_submodule(EXPERTS).expert_ids = range(4, 8)  # as on the second rank of two
    assert search(model).text.startswith(f"the output of {EXPERTS} (experts 7) (")


def change_assignments(router, change):
    """Lets a router's assignments pass through ``change``."""

    class Changed(type(router)):
        def assign(self, *arguments):
            return change(super().assign(*arguments))

    router.__class__ = Changed


def test_a_router_is_named_by_its_logits(model):
    def poison(assignment):
        return replace(assignment, logits_TE=assignment.logits_TE * NAN, weights_TK=assignment.weights_TK * NAN)

    change_assignments(model.routers()[1], poison)
    assert search(model).text == "the logits of model.layers.1.moe.router (88 of 88 values, NaN)"


def test_a_router_is_named_by_its_weights_if_they_are_at_fault(model):
    change_assignments(model.routers()[0], lambda found: replace(found, weights_TK=found.weights_TK / 0.0))
    assert search(model).text.startswith("the weights of model.layers.0.moe.router (")


def test_minus_infinity_is_a_way_to_exclude_an_expert(model):
    def exclude(assignment):
        return replace(assignment, logits_TE=assignment.logits_TE.detach().index_fill(1, torch.tensor([0]), -INF))

    change_assignments(model.routers()[1], exclude)
    assert search(model) is None


def test_the_loss_itself_is_named_where_all_modules_are_finite(model):
    found = search(model, poison=lambda number, loss: loss * NAN if number == 1 else loss)
    assert found.order[:2] == (1, FORWARD)
    assert found.text.startswith("the loss, though the output of every module is finite (1 of 1 values, NaN)")


def test_a_gradient_is_named_by_the_modules_around_it(model):
    model.get_submodule("model.layers.1.attention.out").register_forward_hook(
        lambda module, arguments, output: PoisonedGradient.apply(output)
    )
    found = search(model)
    assert found.order[:2] == (0, BACKWARD)
    assert "when that at the output of model.layers.1.attention.out was finite" in found.text
    assert found.text.startswith("the gradient at the output of model.layers.1.attention.qkv")


def test_the_gradient_of_a_parameter_alone_is_named_with_its_experts(model):
    parameter = model.get_parameter(f"{EXPERTS}.w_out")
    parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), INF))
    found = search(model)
    assert found.text == f"the gradient of the parameter {EXPERTS}.w_out of expert 1 (192 of 768 values, infinite)"


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_nothing_is_left_behind(model, recompute):
    model.recompute_activations(recompute)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    ran = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: ran.append(1))  # as ZeRO reduces gradients
    model.routers()[0].register_forward_hook(lambda *_: None)
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert search(model) is None
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert ran == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks


def test_a_failing_pass_leaves_no_hooks_either(model):
    def losses():
        yield from losses_of(model, 1)()
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        find_non_finite(model, losses)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("assign" in vars(router) for router in model.routers().values())


@pytest.mark.parametrize(
    "router",
    [
        {"type": "compete_smoe"},
        {"type": "sim_smoe"},
        {"type": "x_moe"},
        {"type": "expert_choice"},
        {"type": "adaptive"},
    ],
    ids=lambda router: router["type"],
)
def test_healthy_routers_have_no_finding(router):
    assert search(small_model(router=router).train()) is None


def test_the_earliest_finding_of_all_ranks_is_the_one_told():
    first, later = Finding((0, FORWARD, 3), "the output of a"), Finding((0, FORWARD, 9), "the output of b")
    backward = Finding((0, BACKWARD, 1), "the gradient of c")
    expected = "first on rank 2, the output of a, in the forward pass of micro-batch 0"
    assert describe([later, None, first]) == expected
    assert describe([first, later, None, first]) == expected.replace("rank 2", "rank 0 (at the same time on 3)")
    assert describe([None, backward]).startswith("first on rank 1, the gradient of c, in the backward pass")
    assert describe([backward, later]).startswith("first on rank 1, the output of b")
    assert "finite on all ranks" in describe([None, None])


def test_all_generators_are_put_back(model):
    def losses():
        for loss in losses_of(model)():
            random.random()
            np.random.random()  # noqa: NPY002
            torch.rand(1)
            yield loss

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert find_non_finite(model, losses) is None
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
