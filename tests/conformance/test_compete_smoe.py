"""CompeteSMoE: contests against loops over tokens in fp64, the golden values and the invariants C1 to C12 of the notes.

C8 is in tests/unit/schedules/test_competition.py, C12 in tests/distributed/test_contest.py.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.naive_compete_smoe import RESPONSES as NAIVE_RESPONSES
from support.naive_compete_smoe import naive_compete
from support.router_cases import D_MODEL, NUM_EXPERTS, RouterCase, assign, context, run, tokens
from support.small_model import small_model, text

from smoe_train.parallel.contest import winners_outputs
from smoe_train.routing import EMPTY_SLOT, Assignment, Outcome, RouterPlan, RouterShape, router_config
from smoe_train.routing.compete_smoe import COMPETITION_LOSSES, CompeteSmoeRouter, diversity_loss
from smoe_train.routing.responses import RESPONSES, register_response
from smoe_train.schedules import CompetitionConfig, CompetitionSchedule, Curriculum, CurriculumConfig, Knobs

COEFFICIENTS = {"router_distillation_loss": 40.0, "diversity_loss": 0.7, "competition_balance_loss": 0.3}
MASK = [True, False, True, True, False, True]
SOFT = {"winner_weights": "softmax"}
VARIANTS = {
    "default": {},
    "v1": {"preset": "v1"},
    "l2norm": {"response": "l2norm"},
    "relu_mean": {"response": "relu_mean", **SOFT},
    "relu_mean shares": {"response": "relu_mean"},
    "silu_mean": {"response": "silu_mean", **SOFT},
    "sigmoid_mean": {"response": "sigmoid_mean"},
    "standardise": {"score_norm": "standardise", "temperature": 0.5},
    "topk": {"distillation": "topk", "score_norm": "standardise"},
    "hybrid": {"distillation": "hybrid", "theta": 0.2, "temperature": 0.05},
    "tribrid": {"distillation": "tribrid", "score_norm": "standardise"},
    "kl": {"distillation_loss": "kl", "score_norm": "standardise"},
    "kl topk": {"distillation_loss": "kl", "distillation": "topk", "temperature": 0.05},
    "kl hybrid winners": {"distillation_loss": "kl", "distillation": "hybrid", "target": "winners"},
    "kl tribrid winners": {"distillation_loss": "kl", "distillation": "tribrid", "preset": "v1"},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def case(**options):
    return RouterCase("compete_smoe", tuple({"init_std": 0.3, **options}.items()))


def competing(top_k=2, **changes):
    return context(top_k, competing=True, **changes)


def small_outputs(layer, scale=0.25):
    """Experts' outputs of moderate size, where responses are neither linear nor saturated."""
    with torch.no_grad():
        for name, parameter in layer.bank.experts.named_parameters():
            if name in ("w_out", "b_out"):
                parameter.mul_(scale)
    return layer


def weighted(out_TD, losses):
    weights = torch.linspace(-1, 1, out_TD.numel(), dtype=torch.float64).view(out_TD.shape).to(out_TD.dtype)
    return (out_TD * weights).sum() + sum(COEFFICIENTS[name] * losses[name] for name in COEFFICIENTS)


def naive_run(layer, x_TD, top_k, mask):
    leaves = {name: value.detach().double().requires_grad_() for name, value in layer.state_dict().items()}
    x_TD = x_TD.detach().double().requires_grad_()
    experts = {name.removeprefix("bank.experts."): v for name, v in leaves.items() if name.startswith("bank.")}
    options = layer.router.config.model_dump()
    result = naive_compete(x_TD, leaves["router.weight"], experts, top_k, options, mask)
    gradients = torch.autograd.grad(weighted(result.out_TD, result.losses), [x_TD, *leaves.values()], allow_unused=True)
    return result, dict(zip(["x", *leaves], gradients, strict=True))


def layer_run(layer, x_TD, ctx, rows=None):
    x_TD = x_TD.detach().clone().requires_grad_()
    merged = run(layer, x_TD, ctx)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(
        weighted(merged.out_TD[:rows], merged.losses), [x_TD, *parameters.values()], allow_unused=True
    )
    return merged, dict(zip(["x", *parameters], gradients, strict=True))


def compare(layer, x_TD, top_k, mask, tolerance, **changes):
    expected, expected_gradients = naive_run(layer, x_TD, top_k, mask)
    mask_T = None if mask is None else torch.tensor(mask)
    merged, gradients = layer_run(layer, x_TD, competing(top_k, token_mask_T=mask_T, **changes))
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(merged.out_TD.double(), expected.out_TD, **close)
    for name, value in expected.losses.items():
        torch.testing.assert_close(merged.losses[name].double(), value, **close, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in expected_gradients.items():
        got = torch.zeros_like(gradient) if gradients[name] is None else gradients[name].double()
        scale = float(gradient.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(got / scale, gradient / scale, **close, msg=lambda m, n=name: f"{n}: {m}")
    counts = [sum(i in winners for winners in expected.winners) for i in range(NUM_EXPERTS)]
    assert merged.stats["slots_E"].tolist() == counts
    for name, value in (
        ("agreement", expected.agreement),
        ("tie_rate", expected.ties),
        ("score_spread", expected.spread),
    ):
        assert float(merged.stats[f"{name}/competing"]) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert merged.stats["competing"] == merged.stats["tokens"] == sum(len(winners) > 0 for winners in expected.winners)


@variants
@pytest.mark.parametrize("kind", ["relu", "swiglu"])
@pytest.mark.parametrize(("top_k", "padded"), [(1, False), (2, True), (3, False), (NUM_EXPERTS, True)])
def test_fp64(options, kind, top_k, padded):
    """C2: outputs, winners' counts, losses, statistics and all gradients are those of the loops, with padding."""
    layer = small_outputs(case(**options).layer(kind, d_ff=6).double())
    compare(layer, tokens(6, scale=1.0).double(), top_k, MASK if padded else None, 1e-9)


@variants
@pytest.mark.parametrize("d_ff", [6, 8], ids=["looped", "grouped"])
def test_fp32(options, d_ff):
    """C2 in fp32, for both forms of the product."""
    compare(small_outputs(case(**options).layer("swiglu", d_ff=d_ff)), tokens(6, scale=1.0), 2, MASK, 2e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 4, 6, 100])
def test_chunks_change_nothing(chunk_tokens):
    """Chunked is unchunked, with a last chunk that is smaller and padding in any of them."""
    layer = small_outputs(case(competition_chunk_tokens=chunk_tokens).layer("relu").double())
    compare(layer, tokens(6, scale=1.0).double(), 2, MASK, 1e-9)
    grouped = small_outputs(case(competition_chunk_tokens=chunk_tokens).layer("relu", d_ff=8))
    compare(grouped, tokens(6, scale=1.0), 2, MASK, 2e-5)


def test_the_comparison_can_fail():
    """Winners by the router, a target with gradient, and weights that stop the gradient are all noticed."""

    def wrong_winners(layer):
        settle = layer.router.settle
        layer.router.settle = lambda a, o, c: dataclasses.replace(settle(a, o, c), expert_ids_TK=a.expert_ids_TK)

    def wrong_weights(layer):
        settle = layer.router.settle

        def stopped(assignment, outcome, ctx):
            settled = settle(assignment, outcome, ctx)
            return dataclasses.replace(settled, weights_TK=settled.weights_TK.detach())

        layer.router.settle = stopped

    def wrong_scale(layer):
        layer.bank.experts.w_in.register_hook(lambda gradient: gradient * 1.001)

    for mutate in (wrong_winners, wrong_weights, wrong_scale):
        layer = small_outputs(case().layer("relu").double())
        mutate(layer)
        with pytest.raises(AssertionError):
            compare(layer, tokens(6, scale=1.0).double(), 2, None, 1e-9)


def contest_on(y_TED, logits_TE=None, top_k=2, ctx=None, **options):
    """A contest between given outputs, fp64, with a router of given (by default equal) logits."""
    num_tokens, num_experts, width = y_TED.shape
    router = CompeteSmoeRouter(router_config({"type": "compete_smoe", **options}), RouterShape(width, num_experts, 7))
    logits_TE = torch.zeros(num_tokens, num_experts, dtype=torch.float64) if logits_TE is None else logits_TE
    ctx = ctx or competing(top_k)
    contest = router.contest(ctx)
    responses_TE = contest.respond(y_TED.flatten(0, 1)).view(num_tokens, num_experts)
    ids_TK = contest.choose(responses_TE, slice(0, num_tokens))
    routed_TK = logits_TE.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    y_TKD = winners_outputs(y_TED, ids_TK)
    routed = Assignment(routed_TK, torch.full(routed_TK.shape, 1.0), logits_TE)
    settled = router.settle(routed, Outcome(responses_TE, ids_TK, y_TKD), ctx)
    return settled, router.merge(settled, y_TKD, ctx)


GOLDEN_OUTPUTS = torch.tensor([[[0.0, 0.0], [1.0, -1.0], [2.0, 0.0]]], dtype=torch.float64)


def test_golden_values_of_version_2():
    """C2: the notes' figures for N = 3, K = 2, D = 2 with a uniform router."""
    settled, merged = contest_on(GOLDEN_OUTPUTS)
    assert settled.responses_TE[0].tolist() == pytest.approx([0.693147, 0.813262, 1.410038], abs=1e-6)
    assert settled.expert_ids_TK.tolist() == [[2, 1]]
    assert settled.weights_TK[0].tolist() == pytest.approx([0.634210, 0.365790], abs=1e-6)
    assert merged.out_TD[0].tolist() == pytest.approx([1.634210, -0.365790], abs=1e-6)
    assert merged.losses["router_distillation_loss"].item() == pytest.approx(0.01250198, abs=1e-8)
    assert merged.losses["diversity_loss"].item() == pytest.approx(0.707107, abs=1e-6)
    shares = [0.239482, 0.270046, 0.490472]
    # Two of three experts have half of the slots each: N * (S_1 / 2 + S_2 / 2).
    assert merged.losses["competition_balance_loss"].item() == pytest.approx(1.5 * (shares[1] + shares[2]), abs=2e-6)
    for options, expected in (
        ({"distillation": "topk"}, 0.01434893),
        ({"distillation": "hybrid", "theta": 0.2}, 0.01537177),
        (
            {"distillation": "tribrid", "theta": 0.2},
            0.01537177 + 0.2 * ((1 / 3 - 0.239482) ** 2 + (1 / 3 - 0.270046) ** 2) / 2,
        ),
    ):
        losses = contest_on(GOLDEN_OUTPUTS, **options)[1].losses
        assert losses["router_distillation_loss"].item() == pytest.approx(expected, abs=3e-8), options


def test_golden_values_of_version_1():
    """C2: norms [0, sqrt 2, 2], weights from their softmax, and a target that is 0 on the loser."""
    settled, merged = contest_on(GOLDEN_OUTPUTS, preset="v1")
    assert settled.responses_TE[0].tolist() == pytest.approx([0.0, 1.414214, 2.0], abs=1e-6)
    assert settled.expert_ids_TK.tolist() == [[2, 1]]
    assert settled.weights_TK[0].tolist() == pytest.approx([0.642398, 0.357602], abs=1e-6)
    expected = ((1 / 3) ** 2 + (1 / 3 - 0.357602) ** 2 + (1 / 3 - 0.642398) ** 2) / 3
    assert merged.losses["router_distillation_loss"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", RESPONSES.names())
def test_c1_all_experts_win(name):
    """C1: at K = N the output is the sum over all experts with all weights, and none is left out."""
    layer = small_outputs(case(response=name, **SOFT).layer("relu").double())
    x_TD = tokens(9, scale=1.0).double()
    merged = run(layer, x_TD, competing(NUM_EXPERTS))
    everyone = torch.arange(NUM_EXPERTS).expand(9, -1)
    y_TED = layer.bank(x_TD, everyone)
    weights_TE = torch.softmax(RESPONSES.get(name).of(y_TED), dim=1)
    torch.testing.assert_close(merged.out_TD, (weights_TE.unsqueeze(2) * y_TED).sum(1), atol=1e-12, rtol=1e-12)
    assert merged.stats["slots_E"].tolist() == [9.0] * NUM_EXPERTS
    assert merged.stats["agreement/competing"] == 9


ROOT = 2**0.5
AT_K_EQUALS_N = [
    ("softplus_mean", [1, 2], [0.278854, 0.483478]),  # of .693147, .813262, 1.410038
    ("l2norm", [1, 2], [ROOT - 1, 2 - ROOT]),  # of 0, sqrt 2, 2
    ("relu_mean", [1, 2], [1 / 3, 2 / 3]),  # of 0, 1/2, 1
    ("sigmoid_mean", [1, 2], [0.295788, 0.408424]),  # of 1/2, 1/2, .690399
]


@pytest.mark.parametrize(("name", "ids", "weights"), AT_K_EQUALS_N)
def test_c1_all_experts_win_by_their_shares(name, ids, weights):
    """C1 with sum_norm, by hand: at K = N each expert's weight is its share of all responses, best first."""
    settled, merged = contest_on(GOLDEN_OUTPUTS, top_k=3, response=name)
    w = dict(zip(settled.expert_ids_TK[0].tolist(), settled.weights_TK[0].tolist(), strict=True))
    assert sorted(w) == [0, 1, 2]
    assert [w[i] for i in ids] == pytest.approx(weights, abs=1e-6)
    assert w[0] == pytest.approx(1 - sum(weights), abs=1e-6)
    # The outputs are (0, 0), (1, -1) and (2, 0).
    assert merged.out_TD[0].tolist() == pytest.approx([weights[0] + 2 * weights[1], -weights[0]], abs=2e-6)


@pytest.mark.parametrize("name", RESPONSES.names())
def test_c2_response_functions(name):
    """C2: each response function against its formula; the package has those that the oracle has, and no others."""
    assert set(RESPONSES.names()) == set(NAIVE_RESPONSES)
    y_RD = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([NAIVE_RESPONSES[name](row) for row in y_RD])
    torch.testing.assert_close(RESPONSES.get(name).of(y_RD), expected, atol=1e-12, rtol=1e-12)


@variants
def test_c3_permuting_the_experts_changes_nothing(options):
    """C3: permuted experts and router rows permute the winners and leave outputs and losses as they are."""
    layer, x = small_outputs(case(**options).layer("relu").double()), tokens(11, scale=1.0).double()
    order = torch.tensor([3, 7, 0, 1, 6, 2, 5, 4])
    permuted = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in permuted.parameters():
            parameter.copy_(parameter[order])
    before, after = run(layer, x, competing(3)), run(permuted, x, competing(3))
    torch.testing.assert_close(after.out_TD, before.out_TD, atol=1e-12, rtol=1e-12)
    for name, value in before.losses.items():
        torch.testing.assert_close(after.losses[name], value, atol=1e-12, rtol=1e-12, msg=name)
    assert torch.equal(after.stats["slots_E"], before.stats["slots_E"][order])
    assert len(before.stats["slots_E"].unique()) > 1


@pytest.mark.parametrize("loss", ["mse", "kl"])
@pytest.mark.parametrize("distillation", ["all", "topk", "hybrid", "tribrid"])
@pytest.mark.parametrize("target", ["all", "winners"])
def test_c4_the_distillation_loss_is_zero_exactly_at_the_target(loss, distillation, target):
    """C4: a router that has the target's distribution has no loss, any other has some."""
    options = {"distillation_loss": loss, "distillation": distillation, "target": target, "temperature": 0.1}
    y = torch.randn(5, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    settled, _ = contest_on(y, **options)
    logits = settled.responses_TE / 0.1
    if target == "winners":
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(1, settled.expert_ids_TK, True)
        logits = torch.where(keep, logits, torch.full_like(logits, -1e4))
    exact = contest_on(y, logits, **options)[1].losses["router_distillation_loss"]
    assert abs(exact.item()) < 1e-15
    other = logits + 0.3 * torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert contest_on(y, other, **options)[1].losses["router_distillation_loss"].item() > 1e-5


def gradients_of(layer, value):
    parameters = dict(layer.named_parameters())
    if not value.requires_grad:
        return set()
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name for name, one in zip(parameters, found, strict=True) if one is not None and one.abs().max() > 0}


@variants
def test_c4_c5_what_trains_what(options):
    """C4, C5: in a contest the task and the target leave the router and the experts alone, respectively."""
    layer, x = small_outputs(case(**options).layer("relu")), tokens(9, scale=1.0)
    experts = {name for name, _ in layer.named_parameters() if name.startswith("bank.")}
    merged = run(layer, x, competing())
    assert gradients_of(layer, merged.out_TD.square().sum()) == experts
    assert gradients_of(layer, merged.losses["router_distillation_loss"]) == {"router.weight"}
    assert gradients_of(layer, merged.losses["diversity_loss"]) == experts
    assert gradients_of(layer, merged.losses["competition_balance_loss"]) == experts
    routed = run(layer, x, context())
    assert gradients_of(layer, routed.out_TD.square().sum()) == {*experts, "router.weight"}
    for name in COMPETITION_LOSSES:
        assert gradients_of(layer, routed.losses[name]) == set()
    for ctx in (competing(), context()):
        declared = layer.router.trained_by(ctx)
        reaching = layer.router.losses_reaching_experts(ctx) | {"task"}
        result = run(layer, x, ctx)
        for name, value in {**result.losses, "task": result.out_TD.square().sum()}.items():
            own = {f"router.{parameter}" for parameter in declared[name]}
            assert gradients_of(layer, value) == own | (experts if name in reaching else set()), name


def test_competition_balance_reaches_the_losers():
    """Every expert's weights get gradient from it, also those of an expert that never wins; diversity's do not."""
    layer, x = small_outputs(case(score_norm="standardise").layer("relu")), tokens(9, scale=1.0)
    with torch.no_grad():
        layer.bank.experts.b_out[5] -= 50.0
    merged = run(layer, x, competing())
    assert merged.stats["slots_E"][5] == 0
    for name, reached in (("competition_balance_loss", True), ("diversity_loss", False)):
        gradient = torch.autograd.grad(merged.losses[name], layer.bank.experts.w_out, retain_graph=True)[0]
        assert (gradient[5].abs().max() > 0) == reached, name


def experts_rows(layer):
    rows = []
    layer.bank.experts.register_forward_pre_hook(
        lambda _, arguments: rows.append(arguments[1].rows_per_expert_E.tolist())
    )
    return rows


@pytest.mark.parametrize("changes", [{}, {"competing": True, "training": False}, {"training": False}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_c6_without_a_contest_it_is_top_k_bit_for_bit(changes, padded):
    """C6: outputs, gradients and expert rows of a routed step, and of evaluation whatever the curriculum says."""
    mask = torch.tensor(MASK) if padded else None
    ctx = context(token_mask_T=mask, **changes)
    results = []
    for name in ("top_k", "compete_smoe"):
        layer = RouterCase(name, (("init_std", 0.3),)).layer("relu")
        rows = experts_rows(layer)
        x = tokens(6, scale=1.0).requires_grad_()
        merged = run(layer, x, ctx)
        (merged.out_TD.square().sum() + sum(merged.losses.values())).backward()
        results.append((merged, [x.grad, *(p.grad for p in layer.parameters())], rows))
    (plain, plain_gradients, plain_rows), (ours, gradients, rows) = results
    assert torch.equal(ours.out_TD, plain.out_TD)
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))
    assert rows == plain_rows
    assert sum(rows[0]) == 2 * (sum(MASK) if padded else 6)
    for name, value in plain.losses.items():
        assert torch.equal(ours.losses[name], value), name
    for name, value in plain.stats.items():
        assert torch.equal(ours.stats[name], value), name


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("top_k", [1, 3, NUM_EXPERTS])
def test_c7_every_expert_runs_once_on_every_token(chunk_tokens, top_k):
    """C7: N * T rows in all; the winners are not run again."""
    layer = case(competition_chunk_tokens=chunk_tokens).layer("relu")
    rows = experts_rows(layer)
    run(layer, tokens(12), competing(top_k))
    assert [sum(column) for column in zip(*rows, strict=True)] == [12] * NUM_EXPERTS
    assert len(rows) == (1 if chunk_tokens is None else 3)


def test_c9_grad_mode_and_frozen_inputs_do_not_decide():
    """C9: with and without gradients, with an input that needs none, the same contest is held."""
    layer, x = case().layer("relu"), tokens(9, scale=1.0)
    outs = [run(layer, x.clone().requires_grad_(), competing()).out_TD.detach(), run(layer, x, competing()).out_TD]
    with torch.no_grad():
        outs.append(run(layer, x, competing()).out_TD)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    outs.append(run(layer, x, competing()).out_TD)
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not torch.equal(run(layer, x, context()).out_TD, outs[0])


def model_gradients(model, ids, knobs):
    model.zero_grad()
    output = model(ids, labels=ids, knobs=knobs)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


NEVER, LATE = CompetitionConfig(flip_rate=0.0), CompetitionConfig(flip_rate=1.0, max_layers=None, warmup_steps=5)


@pytest.mark.parametrize(
    ("competition", "step", "is_top_k"), [(NEVER, 0, True), (NEVER, 9, True), (LATE, 4, True), (LATE, 5, False)]
)
def test_c6_without_a_contest_a_model_is_top_k_bit_for_bit(competition, step, is_top_k):
    """C6 in a model, by the curriculum: with flip_rate 0 and in warm-up the loss and all gradients are top_k's."""
    knobs = Curriculum(CurriculumConfig(), 2, 100, 11, CompetitionSchedule(competition, 3, (0, 1))).knobs(step)
    results = []
    for name in ("top_k", "compete_smoe"):
        model = small_model(router={"type": name, "init_std": 0.3}, z_loss_coefficient=0.01).train()
        values = {parameter: value.detach().clone() for parameter, value in model.named_parameters()}
        results.append((values, *model_gradients(model, text(), knobs)))
    (plain_values, plain_loss, plain), (values, loss, ours) = results
    assert values.keys() == ours.keys() == plain.keys()
    assert all(torch.equal(values[parameter], value) for parameter, value in plain_values.items())
    assert torch.equal(loss, plain_loss) == is_top_k
    assert all(torch.equal(ours[parameter], gradient) for parameter, gradient in plain.items()) == is_top_k


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("layers", [{0}, {0, 1}], ids=str)
def test_c9_recomputed_activations_are_bit_identical(chunk_tokens, layers):
    """C9: the recomputation runs the experts again, and keeps the winners of the forward pass."""
    router = case(competition_chunk_tokens=chunk_tokens, temperature=0.1).options.model_dump(mode="json")
    model = small_model(router=router).train()
    ids, knobs = text(), Knobs(4, 2, competing_layers=frozenset(layers))
    loss, stored = model_gradients(model, ids, knobs)
    rows = experts_rows(model.model.layers[0].moe)
    model.recompute_activations()
    again, recomputed = model_gradients(model, ids, knobs)
    assert len(rows) == 2 * (1 if chunk_tokens is None else 4)
    assert torch.equal(loss, again)
    for name, gradient in stored.items():
        assert torch.equal(recomputed[name], gradient), name
    chosen = []
    for moe in (layer.moe for layer in model.model.layers):
        contest = moe.router.contest

        def counted(ctx, contest=contest):
            held = contest(ctx)
            if held is None:
                return None

            def choose(responses_TE, part):
                chosen.append(part)
                return held.choose(responses_TE, part)

            return dataclasses.replace(held, choose=choose)

        moe.router.contest = counted
    model_gradients(model, ids, knobs)
    assert len(chosen) == len(layers) * (1 if chunk_tokens is None else 4)


@pytest.mark.parametrize("options", [VARIANTS[n] for n in ("default", "v1", "l2norm", "relu_mean", "sigmoid_mean")])
def test_c10_weights_are_a_distribution(options):
    """C10: not negative, sum 1, largest first; equal shares where no winner responds at all."""
    layer, x = case(**options).layer("relu"), tokens(40, scale=1.0)
    outcome = layer._compete(x, layer.router.contest(competing(3)), None)
    settled = layer.router.settle(assign(layer.router, x, competing(3)), outcome, competing(3))
    assert settled.weights_TK.dtype == torch.float32
    assert (settled.weights_TK >= 0).all()
    assert (settled.weights_TK.diff(dim=1) <= 0).all()
    torch.testing.assert_close(settled.weights_TK.sum(1), torch.ones(40), atol=1e-6, rtol=0)
    silent = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    settled, merged = contest_on(silent, **{**options, "response": "relu_mean"} if "preset" not in options else options)
    assert settled.weights_TK.tolist() == [[0.5, 0.5]] * 2
    assert settled.expert_ids_TK.tolist() == [[0, 1]] * 2
    assert merged.stats["tie_rate/competing"] == 2
    (merged.out_TD.sum() + sum(merged.losses.values())).backward()
    assert silent.grad.isfinite().all()


@pytest.mark.parametrize("name", RESPONSES.names())
def test_c10_responses_are_fp32_under_bf16(name):
    """C10: bf16 outputs are scored in fp32, with and without autocast; bf16 scores would choose other winners."""
    y = (0.05 * torch.randn(200 * 8, 512, generator=torch.Generator().manual_seed(0))).bfloat16()
    contest = case(response=name, **SOFT).routers()[0].contest(competing())
    expected = RESPONSES.get(name).of(y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = contest.respond(y)
    for responses in (contest.respond(y), cast):
        assert responses.dtype == torch.float32
        assert torch.equal(responses, expected)
    winners = contest.choose(expected.view(200, 8), slice(0, 200))
    low = contest.choose(expected.bfloat16().float().view(200, 8), slice(0, 200))
    assert (winners != low).any()


def test_c10_a_bf16_layer_competes_in_fp32():
    """The layer's responses are those of fp32 arithmetic on its own bf16 outputs; losses are fp32."""
    layer, x = case().layer("swiglu", d_ff=16).bfloat16(), tokens(30, scale=1.0).bfloat16()
    outcome = layer._compete(x, layer.router.contest(competing()), None)
    y_TED = layer.bank(x, torch.arange(NUM_EXPERTS).expand(30, -1))
    expected = RESPONSES.get("softplus_mean").of(y_TED.float())
    torch.testing.assert_close(outcome.responses_TE, expected, atol=1e-2, rtol=1e-2)
    assert outcome.responses_TE.dtype == torch.float32
    assert outcome.y_TKD.dtype == torch.bfloat16
    merged = run(layer, x, competing())
    assert merged.out_TD.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and value.isfinite() for value in merged.losses.values())
    (merged.out_TD.float().sum() + sum(merged.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", [name for name in RESPONSES.names() if name != "l2norm"])
def test_c10_winners_of_a_bf16_layer_are_those_of_fp32_scores(name):
    """C10: the winners are those that a loop in fp32 finds in the layer's own bf16 outputs; bf16 scores find others."""
    layer = small_outputs(case(response=name, **SOFT).layer("swiglu", d_ff=16), 0.05).bfloat16()
    x, seen = tokens(1000, scale=1.0).bfloat16(), []
    contest = layer.router.contest(competing())

    def respond_and_note(y_RD):
        seen.append(y_RD.detach())
        return contest.respond(y_RD)

    outcome = layer._compete(x, dataclasses.replace(contest, respond=respond_and_note), None)
    (y_RD,) = seen
    assert y_RD.dtype == torch.bfloat16
    formulas = {
        "softplus_mean": F.softplus,
        "relu_mean": F.relu,
        "silu_mean": F.silu,
        "sigmoid_mean": torch.sigmoid,
    }

    def winners(dtype):
        scores_TE = formulas[name](y_RD.to(dtype)).mean(-1).view(1000, NUM_EXPERTS)
        return scores_TE.sort(dim=1, descending=True, stable=True).indices[:, :2]

    assert torch.equal(outcome.expert_ids_TK, winners(torch.float32))
    assert not torch.equal(outcome.expert_ids_TK, winners(torch.bfloat16))


def diversity(*rows):
    return diversity_loss(torch.tensor([rows], dtype=torch.float64), competing(len(rows))).item()


def test_c11_diversity():
    """C11: 1 for equal winners, 0 for orthogonal, at least -1 / (K - 1), blind to scale, 0 for K = 1 and for zeros."""
    assert diversity([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]) == pytest.approx(1.0)
    assert diversity([1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, -2.0]) == pytest.approx(0.0)
    assert diversity([1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]) == pytest.approx(-0.5)
    assert diversity([1.0, 2.0], [3.0, -1.0]) == pytest.approx(diversity([100.0, 200.0], [0.03, -0.01]))
    assert diversity([1.0, 2.0]) == 0.0
    assert diversity([0.0, 0.0], [1.0, 2.0]) == 0.0
    assert diversity([0.0, 0.0], [0.0, 0.0]) == 0.0
    y = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    diversity_loss(y, competing()).backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize(("top_k", "released"), [(2, 0.5), (4, 0.75), (8, 0.875)])
def test_c11_is_not_divided_by_k_squared(top_k, released):
    """C11: the released code divides the sum over pairs by K^2, so equal winners have (K - 1) / K; here they have 1."""
    rows = [[0.3, -1.2, 2.0]] * top_k
    pairs = top_k * (top_k - 1)  # each with cosine 1
    assert pairs / top_k**2 == released
    assert diversity(*rows) == pytest.approx(1.0, abs=1e-12)
    # The notes' winners (2, 0) and (1, -1): cosine .707107, which K^2 makes .353553.
    assert diversity([2.0, 0.0], [1.0, -1.0]) == pytest.approx(0.707107, abs=1e-6)
    assert abs(diversity([2.0, 0.0], [1.0, -1.0]) - 0.353553) > 0.3


def test_a_router_learns_who_wins():
    """Trained on the distillation loss alone against frozen experts, it agrees with contests far more than chance."""
    layer = small_outputs(case(score_norm="standardise", temperature=0.5).layer("relu"))
    layer.bank.requires_grad_(False)
    x, unseen = tokens(400, scale=1.0), tokens(400, seed=1, scale=1.0)
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.03)

    def agreement():
        with torch.no_grad():
            return float(run(layer, unseen, competing()).stats["agreement/competing"]) / 400

    before = agreement()
    for _ in range(150):
        optimizer.zero_grad()
        run(layer, x, competing()).losses["router_distillation_loss"].backward()
        optimizer.step()
    chance = 2 / NUM_EXPERTS
    assert before < 2 * chance
    assert agreement() > 2 * chance


def test_padding_takes_part_in_no_contest():
    """Pads that hold huge values change nothing: outputs, losses, statistics, gradients."""
    layer, x = small_outputs(case(score_norm="standardise").layer("relu", d_ff=16)), tokens(23, scale=1.0)
    padded = torch.cat([x, torch.full((9, D_MODEL), 1e30)])
    mask = torch.arange(32) < 23
    plain, gradients = layer_run(layer, x, competing())
    with_pads, padded_gradients = layer_run(layer, padded, competing(token_mask_T=mask), 23)
    torch.testing.assert_close(with_pads.out_TD[:23], plain.out_TD)
    assert (with_pads.out_TD[23:] == 0).all()
    assert (padded_gradients["x"][23:] == 0).all()
    padded_gradients["x"] = padded_gradients["x"][:23]
    for name, value in {**plain.losses, **plain.stats}.items():
        torch.testing.assert_close({**with_pads.losses, **with_pads.stats}[name], value, msg=name)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    nothing = run(layer, x, competing(token_mask_T=torch.zeros(23, dtype=torch.bool)))
    assert (nothing.out_TD == 0).all()
    assert all(value == 0 for value in nothing.losses.values())
    assert all((value == 0).all() for value in nothing.stats.values())
    assert run(layer, tokens(0), competing()).out_TD.shape == (0, D_MODEL)


def test_losses_and_statistics_have_the_same_names_in_every_pass():
    """The record of a step stacks them by name, whichever layers compete; what a pass does not have is 0 in it."""
    layer, x = case().layer("relu"), tokens(9)
    contested, routed = run(layer, x, competing()), run(layer, x, context())
    assert contested.losses.keys() == routed.losses.keys() == layer.router.losses_of(layer.router.config)
    assert contested.stats.keys() == routed.stats.keys()
    for name in ("load_balance_loss", "z_loss"):
        assert contested.losses[name] == 0
        assert routed.losses[name] > 0
    for name in COMPETITION_LOSSES:
        assert contested.losses[name] != 0
        assert routed.losses[name] == 0
    assert routed.stats["competing"] == routed.stats["agreement/competing"] == 0


def test_the_model_averages_over_all_moe_layers():
    """With one of two layers competing, each loss is half of its layer's."""
    model = small_model(router=case().options.model_dump(mode="json")).train()
    merged = {}
    for index, block in enumerate(model.model.layers):
        block.moe.register_forward_hook(lambda _, __, output, index=index: merged.update({index: output}))
    output = model(text(), knobs=Knobs(3, 2, competing_layers=frozenset({1})))
    assert merged[0].stats["competing"] == 0
    assert merged[1].stats["competing"] == text().numel()
    for name in COMPETITION_LOSSES:
        torch.testing.assert_close(output.router_losses[name], merged[1].losses[name] / 2)
    torch.testing.assert_close(output.router_losses["z_loss"], merged[0].losses["z_loss"] / 2)


def problems(top_k=(2,), **options):
    return router_config({"type": "compete_smoe", **options}).problems(RouterPlan(frozenset(top_k), 8, 100))


def test_presets_fill_in_what_is_not_given():
    v1 = router_config({"type": "compete_smoe", "preset": "v1"})
    assert (v1.response, v1.winner_weights, v1.target) == ("l2norm", "softmax", "winners")
    assert list(v1.loss_coefficients().values()) == [0.05, 0.0, 0.0]
    assert router_config(v1.model_dump(mode="json")) == v1
    given = router_config({"type": "compete_smoe", "preset": "v1", "router_coefficient": 0.2})
    assert given.loss_coefficients()["router_distillation_loss"] == 0.2
    v2 = router_config({"type": "compete_smoe"})
    assert (v2.response, v2.winner_weights, v2.target, v2.preset) == ("softplus_mean", "sum_norm", "all", "v2")
    assert not problems()
    assert not problems(preset="v1")


def test_settings_that_contradict_each_other_are_named():
    assert "preset: v1 means response: l2norm" in problems(preset="v1", response="softplus_mean")[0]
    assert "needs winner_weights: softmax" in problems(response="silu_mean")[0]
    assert not problems(response="silu_mean", winner_weights="softmax")
    assert "theta has no effect" in problems(theta=0.5)[0]
    assert not problems(theta=0.5, distillation="hybrid")
    assert any("diversity_coefficient has no effect" in p for p in problems((1,), diversity_coefficient=0.5))
    with pytest.raises(ValueError, match="unknown response; did you mean 'l2norm'"):
        router_config({"type": "compete_smoe", "response": "l2_norm"})


def test_a_registered_response_can_be_named():
    """A new response function is one decorated function."""
    register_response("first_dimension", signed=True)(lambda y_RD: y_RD[:, 0])
    try:
        settled, _ = contest_on(-GOLDEN_OUTPUTS, response="first_dimension", winner_weights="softmax")
        assert settled.expert_ids_TK.tolist() == [[0, 1]]
    finally:
        del RESPONSES._entries["first_dimension"]


def test_empty_slots_have_no_output():
    y = torch.ones(2, 3, 4)
    picked = winners_outputs(y.transpose(0, 1), torch.tensor([[0, 1], [EMPTY_SLOT, EMPTY_SLOT], [1, 0]]))
    assert picked.sum(dim=(1, 2)).tolist() == [8.0, 0.0, 8.0]
