"""Auxiliary losses of every policy: their defined values, their gradients, and that ranks and micro-batches agree."""

import dataclasses
import math

import pytest
import torch
from support.router_cases import (
    CASES,
    NUM_EXPERTS,
    assign,
    context,
    every_router,
    every_router_with,
    holds,
    run,
    token_ids,
    tokens,
)

from smoe_train.model.smoe_config import SmoeConfig
from smoe_train.model.transformer import weighted_router_loss
from smoe_train.routing import ROUTERS, Assignment
from smoe_train.routing.losses import load_balance_loss


def losses_of(case):
    """The losses that a case can return."""
    return ROUTERS.get(case.name).router.losses_of(case.options)


HAVE_BALANCE = [case for case in CASES if "load_balance_loss" in losses_of(case) and holds(case, "plain balance")]
HAVE_Z = [case for case in CASES if "z_loss" in losses_of(case)]
with_balance = pytest.mark.parametrize("case", HAVE_BALANCE, ids=str)


def assignment(ids, logits):
    ids = torch.tensor(ids)
    return Assignment(ids, torch.full(ids.shape, 1 / ids.shape[1]), torch.as_tensor(logits, dtype=torch.float32))


@every_router
def test_only_announced_losses_are_returned(case):
    """A coefficient may be set for announced losses only; each is one finite fp32 number."""
    losses = run(case.layer(), tokens(), context()).losses
    assert losses.keys() <= losses_of(case)
    for value in losses.values():
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()


@with_balance
@pytest.mark.parametrize("top_k", [1, 2, 4, NUM_EXPERTS])
def test_balance_is_one_at_uniformity(case, top_k):
    """Invariant 14: equal shares and uniform probabilities give 1, whatever k (a published form gives 1/k)."""
    router = case.routers()[0]
    ids = [[(token + slot) % NUM_EXPERTS for slot in range(top_k)] for token in range(3 * NUM_EXPERTS)]
    losses = router.losses(assignment(ids, torch.zeros(len(ids), NUM_EXPERTS)), context(top_k))
    assert float(losses["load_balance_loss"]) == pytest.approx(1.0, abs=1e-6)


@with_balance
def test_balance_is_n_at_collapse(case):
    """Invariant 14: all slots and all probability on one expert give N."""
    logits = torch.zeros(6, NUM_EXPERTS)
    logits[:, 3] = 1000.0
    losses = case.routers()[0].losses(assignment([[3]] * 6, logits), context(1))
    assert float(losses["load_balance_loss"]) == pytest.approx(NUM_EXPERTS, rel=1e-6)


@with_balance
def test_balance_by_hand(case):
    """Two experts used 3 : 1 with probabilities 3/4 and 1/4: 8 * (3/4 * 3/4 + 1/4 * 1/4) = 5."""
    logits = torch.full((2, NUM_EXPERTS), -1000.0)
    logits[:, 0], logits[:, 1] = math.log(3.0), 0.0
    ids = torch.tensor([[0, 1], [0, -1]])  # an empty slot counts nowhere
    shares = router_losses(case, ids, logits)
    assert float(shares) == pytest.approx(8 * (2 / 3 * 3 / 4 + 1 / 3 * 1 / 4), rel=1e-6)
    assert float(router_losses(case, torch.tensor([[0, 1], [0, 0]]), logits)) == pytest.approx(5.0, rel=1e-6)


def router_losses(case, ids, logits):
    slots = Assignment(ids, torch.ones(ids.shape), logits)
    return case.routers()[0].losses(slots, context())["load_balance_loss"]


@pytest.mark.parametrize("case", HAVE_Z, ids=str)
def test_z_loss_by_hand(case):
    """logsumexp of N equal scores c is c + ln N; the mean of squares over tokens."""
    logits = torch.tensor([[0.0] * NUM_EXPERTS, [2.0] * NUM_EXPERTS])
    value = case.routers()[0].losses(assignment([[0], [1]], logits), context(1))["z_loss"]
    log_n = math.log(NUM_EXPERTS)
    assert float(value) == pytest.approx((log_n**2 + (2 + log_n) ** 2) / 2, rel=1e-6)


@every_router_with("trained")
def test_each_loss_moves_the_trainable_router(case):
    """Invariant 14: the gradient of each loss alone reaches the router, at any k, even where the task's does not."""
    for name in sorted(losses_of(case) & {"load_balance_loss", "z_loss"}):
        for top_k in (1, 2):
            router = case.routers()[0]
            result = assign(router, tokens(), context(top_k))
            router.losses(result, context(top_k))[name].backward()
            gradients = [p.grad for p in router.parameters() if p.requires_grad]
            assert gradients
            assert any(g is not None and g.abs().max() > 1e-5 for g in gradients), (name, top_k)


@pytest.mark.parametrize("case", [case for case in HAVE_BALANCE if holds(case, "trained")], ids=str)
def test_descending_the_balance_loss_balances(case):
    """The sign is right: gradient steps on the loss alone reduce it from an unbalanced start."""
    router = case.with_options(jitter=0.0).routers()[0]
    x = tokens(400) + 4.0  # a common offset makes some experts everyone's favourites
    trained = router.trained_by(context())["load_balance_loss"]
    trainable = [p for name, p in router.named_parameters() if name in trained]
    values = []
    for _ in range(30):
        loss = router.losses(assign(router, x, context()), context())["load_balance_loss"]
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
        values.append(loss.item())
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
        scale = 0.05 * math.sqrt(sum(p.square().sum().item() for p in trainable)) / norm
        with torch.no_grad():
            for parameter, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(scale * gradient)
    assert values[0] > 1.05
    assert min(values[-5:]) < 1 + 0.7 * (values[0] - 1)


def test_a_coefficient_of_zero_contributes_nothing():
    """Invariant 14: not even a multiplication by zero: a NaN loss with coefficient 0 does not reach the total."""
    losses = {"load_balance_loss": torch.tensor(3.0, requires_grad=True), "z_loss": torch.tensor(math.nan)}
    config = SmoeConfig(load_balance_coefficient=0.5, z_loss_coefficient=0.0)
    total = weighted_router_loss(losses, config, {})
    assert total.item() == 1.5
    total.backward()
    assert float(losses["load_balance_loss"].grad) == 0.5
    none = SmoeConfig(load_balance_coefficient=0.0, z_loss_coefficient=0.0)
    assert weighted_router_loss(losses, none, {}) == 0.0


def on_ranks(router, x, sizes, masks=None, top_k=2):
    """Each rank's losses and the gradients averaged over ranks, with collectives played back from the whole.

    As data-parallel training does: each rank sees its tokens, counts are summed over ranks, gradients are averaged.
    The gradients are those of the router's trained parameters and of the tokens, which a frozen router has too.
    """
    x = x.clone().requires_grad_()
    declared = router.trained_by(context())
    trained = declared["load_balance_loss"] | declared["z_loss"]
    trainable = [*(p for name, p in router.named_parameters() if name in trained), x]
    num_ranks = len(sizes)
    parts = list(zip(x.split(sizes), torch.arange(len(x)).split(sizes), strict=True))
    masks = [None] * num_ranks if masks is None else masks
    real = [size if mask is None else int(mask.sum()) for size, mask in zip(sizes, masks, strict=True)]
    average = torch.tensor(float(sum(real) / num_ranks))

    def rank_context(rank, total=None):
        def sum_over_ranks(values):
            assert not values.requires_grad
            return total if total is not None else values

        return context(
            top_k,
            token_index_T=parts[rank][1],
            token_mask_T=masks[rank],
            tokens_per_rank=average,
            sum_over_ranks=sum_over_ranks,
            num_ranks=num_ranks,
        )

    def slots(rank):
        ids = assign(router, parts[rank][0], rank_context(rank)).expert_ids_TK
        return torch.tensor([float((ids == expert).sum()) for expert in range(NUM_EXPERTS)])

    total = sum(slots(rank) for rank in range(num_ranks))
    values, gradients = [], []
    for rank in range(num_ranks):
        ctx = rank_context(rank, total)
        losses = router.losses(assign(router, parts[rank][0], ctx), ctx)
        loss = losses["load_balance_loss"] + 0.1 * losses["z_loss"]
        values.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, trainable, allow_unused=True))
    mean = [torch.stack([torch.as_tensor(g) for g in of_one]).mean(0) for of_one in zip(*gradients, strict=True)]
    return torch.stack(values).mean(), mean


@pytest.mark.parametrize("case", [c for c in HAVE_BALANCE if c in HAVE_Z], ids=str)
@pytest.mark.parametrize("sizes", [(12, 12), (6, 6, 6, 6), (20, 4), (1, 3, 12, 8)], ids=str)
def test_mean_over_ranks_is_the_value_of_the_whole_batch(case, sizes):
    """Invariant 14: equal for 1, 2 and 4 ranks in value and gradient, even when ranks hold different numbers."""
    router, x = case.routers()[0], tokens(24)
    value, gradient = on_ranks(router, x, [24])
    split_value, split_gradient = on_ranks(router, x, list(sizes))
    torch.testing.assert_close(split_value, value, atol=1e-6, rtol=1e-5)
    for one, other in zip(split_gradient, gradient, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", [c for c in HAVE_BALANCE if c in HAVE_Z], ids=str)
def test_mean_over_ranks_with_padding(case):
    """The same with masked tokens, where one of four ranks has nothing but padding."""
    router, x = case.routers()[0], tokens(24)
    mask = torch.tensor([True] * 9 + [False] * 3 + [False] * 6 + [True] * 5 + [False])
    value, gradient = on_ranks(router, x, [24], [mask])
    split_value, split_gradient = on_ranks(router, x, [6] * 4, list(mask.split(6)))
    torch.testing.assert_close(split_value, value, atol=1e-6, rtol=1e-5)
    for one, other in zip(split_gradient, gradient, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_local_counts_would_be_noticed():
    """The comparison above can fail: with each rank's own counts, the mean over ranks is another value."""
    router, x = CASES[0].routers()[0], tokens(24)
    whole = load_balance_loss(assign(router, x, context()), context())
    local = [load_balance_loss(assign(router, part, context()), context()) for part in x.split(6)]
    assert abs((torch.stack(local).mean() - whole).item()) > 1e-3


@pytest.mark.parametrize("case", HAVE_Z, ids=str)
def test_token_averaged_losses_of_micro_batches(case):
    """Two micro-batches with the step's tokens_per_rank average to the whole, though their real tokens differ."""
    router, x = case.with_options(jitter=0.0).routers()[0], tokens(24)
    mask = torch.ones(24, dtype=torch.bool)
    mask[13:20] = False
    whole_context = context(token_mask_T=mask)
    whole = router.losses(assign(router, x, whole_context), whole_context)["z_loss"]
    halves = []
    for part in (slice(0, 12), slice(12, 24)):
        ctx = context(token_mask_T=mask[part], tokens_per_rank=mask.sum() / 2)
        result = router.assign(x[part], token_ids(24)[part], ctx)
        halves.append(router.losses(result, ctx)["z_loss"])
        own = dataclasses.replace(ctx, tokens_per_rank=None)
        # Not the own mean: that would weigh a half-empty micro-batch's tokens more.
        assert abs((router.losses(result, own)["z_loss"] - halves[-1]).item()) > 1e-3
    torch.testing.assert_close(torch.stack(halves).mean(), whole, atol=1e-6, rtol=1e-5)


@every_router_with("token local")
def test_stats_add_up(case):
    """Statistics of two parts sum to those of the whole; slots and tokens are exact counts."""
    router, x = case.routers()[0], tokens(24)
    layer = case.layer()
    layer.router = router
    index = torch.arange(24)
    whole = run(layer, x, context(token_index_T=index)).stats
    parts = [
        layer(x[part], token_ids(24)[part], context(token_index_T=index[part])).stats
        for part in (slice(0, 10), slice(10, 24))
    ]
    for name, value in whole.items():
        assert not value.requires_grad
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, atol=1e-4, rtol=1e-5, msg=name)
    ids = assign(router, x, context(token_index_T=index)).expert_ids_TK
    assert whole["slots_E"].tolist() == [int((ids == e).sum()) for e in range(NUM_EXPERTS)]
    assert float(whole["tokens"]) == 24


@pytest.mark.parametrize("case", [c for c in HAVE_BALANCE if not c.changes], ids=str)
def test_stats_by_hand(case):
    """Entropy in nats and margin p_first - p_second of known probabilities."""
    p = [0.5, 0.25, 0.125, 0.125]
    logits = torch.tensor([[math.log(value) for value in p] + [-1000.0] * (NUM_EXPERTS - 4)] * 3)
    given = assignment([[0, 1]] * 3, logits)
    merged = case.routers()[0].merge(given, torch.zeros(3, 2, 16), context())
    assert float(merged.stats["entropy"]) == pytest.approx(3 * 1.75 * math.log(2), rel=1e-5)
    assert float(merged.stats["margin"]) == pytest.approx(3 * 0.25, rel=1e-5)
    assert merged.stats["probability_E"].tolist()[:4] == pytest.approx([3 * value for value in p], rel=1e-5)
    assert merged.stats["slots_E"].tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
