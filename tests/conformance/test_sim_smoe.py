"""SimSMoE over any base: the layer against loops in fp64, the counters, and what the similarity loss reaches.

The numbers S1 to S12 are those of the notes; S1 to S5 of CKA alone are in tests/unit/routing/test_cka.py.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from support import naive_sim_smoe as naive
from support.naive_moe import feed_forward, naive_moe
from support.router_cases import NUM_EXPERTS, RouterCase, context, run, tokens
from support.small_model import small_model, text

from smoe_train.routing import EMPTY_SLOT, ROUTERS, Assignment, Context, RouterPlan, StepTotals, router_config
from smoe_train.routing.expert_pairs import co_routed_tokens
from smoe_train.routing.sim_smoe import SimSmoeConfig
from smoe_train.routing.top_k import TopKConfig
from smoe_train.schedules import Knobs

LOSS = "similarity_loss"
# What a base needs in order to route at all at this size; every policy without a base of its own can be one.
BASES = [name for name, entry in ROUTERS.items() if "base" not in entry.config.model_fields] + [
    name for name in ("adaptive",) if name in ROUTERS.names()
]
PAIRS = ((0, 1), (1, 3), (0, 2))


def case_of(base="top_k", **options):
    """SimSMoE that fires on every pair it measures, unless told otherwise."""
    values = {"threshold": 0.0, "min_tokens": 4, "base": router_config({"type": base}), **options}
    return RouterCase("sim_smoe", tuple(values.items()))


def layer_of(base="top_k", kind="gelu", num_experts=4, due=PAIRS, seed=0, **options):
    """A layer of four experts in fp64 that have much in common, with pairs that are due."""
    layer = case_of(base, **options).layer(kind, seed, num_experts).double()
    with torch.no_grad():
        for parameter in layer.bank.experts.parameters():
            parameter[1:] += parameter[:1]
    set_due(layer.router, due)
    return layer


def set_due(router, pairs):
    with torch.no_grad():
        router.due_P2.fill_(-1)
        for row, pair in enumerate(pairs):
            router.due_P2[row] = torch.tensor(pair)


def base_layer(layer):
    """The same layer with the base alone."""
    twin = copy.deepcopy(layer)
    twin.router = twin.router.base
    return twin


def gradients(layer, total, also=()):
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, [*also, *named.values()], allow_unused=True, retain_graph=True)
    return dict(zip([*range(len(also)), *named], found, strict=True))


SHAPES = [
    {},
    {"projection": "none"},
    {"projection": "mlp", "projection_dim": 5, "estimator": "debiased"},
    {"similarity": "cka_rbf"},
    {"similarity": "cka_rbf", "projection": "none", "estimator": "debiased", "sigma": 1.5, "max_tokens": 7},
    {"similarity": "cka_rbf", "sigma_mode": "absolute", "projection_dim": 3, "candidate_tokens": 40},
    {"threshold": 0.12},
    {"min_tokens": 8},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "top_k", "padded"), [("gelu", 2, False), ("relu", 2, True), ("swiglu", 3, True)])
def test_against_loops(options, kind, top_k, padded):
    """Outputs, losses and all gradients of the layer, with padding and k = 3 (S6: pairs of any k)."""
    layer = layer_of(kind=kind, **options)
    config = layer.router.config
    x = tokens(80, scale=1.0).double().requires_grad_()
    mask = [token % 7 != 3 for token in range(80)] if padded else None
    ctx = context(top_k, token_mask_T=None if mask is None else torch.tensor(mask))
    merged = run(layer, x, ctx)
    weights = torch.linspace(-1, 1, merged.out_TD.numel()).view_as(merged.out_TD).double()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    inputs = x.detach().clone().requires_grad_()
    experts = {n.removeprefix("bank.experts."): v for n, v in leaves.items() if n.startswith("bank.")}
    head = {n.removeprefix("router.head."): v for n, v in leaves.items() if n.startswith("router.head.")}
    plain = naive_moe(inputs, (leaves["router.base.weight"], None), experts, kind, top_k, "after_top_k", mask)
    outputs = [
        {expert: feed_forward(x_D, expert, experts, kind) for expert in ids}
        for x_D, ids in zip(inputs, plain.ids, strict=True)
    ]
    expected, fired = naive.similarity_loss(
        plain.ids,
        outputs,
        PAIRS,
        head,
        kernel=config.similarity,
        estimator=config.estimator,
        threshold=config.threshold,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        candidates=config.candidate_tokens,
        sigma=config.sigma,
        mode=config.sigma_mode,
    )
    torch.testing.assert_close(merged.out_TD, plain.out_TD, atol=1e-9, rtol=1e-9)
    assert fired
    torch.testing.assert_close(merged.losses[LOSS], expected, atol=1e-9, rtol=1e-9)
    assert float(merged.stats["pairs_fired"]) == len(fired) * float(merged.stats["tokens"])
    shared = naive.shared_counts(plain.ids, 4)
    assert merged.stats["co_routed_EE"].tolist() == shared
    total = (merged.out_TD * weights).sum() + 0.7 * merged.losses["load_balance_loss"] + 1.3 * merged.losses[LOSS]
    naive_total = (plain.out_TD * weights).sum() + 0.7 * plain.load_balance_loss + 1.3 * expected
    got = gradients(layer, total, [x])
    names = [name for name in got if name != 0]
    found = torch.autograd.grad(naive_total, [inputs, *(leaves[name] for name in names)], allow_unused=True)
    for name, gradient in zip(got, found, strict=True):
        gradient = torch.zeros_like(got[name]) if gradient is None else gradient
        scale = float(gradient.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(got[name] / scale, gradient / scale, atol=1e-9, rtol=1e-9, msg=str(name))


def test_some_pairs_fire_and_others_do_not():
    """The comparison above is not one of zeros: thresholds let some of the same three pairs fire and not others."""
    x = tokens(80, scale=1.0).double()
    stats = [run(layer_of(threshold=threshold), x, context()).stats for threshold in (0.0, 0.12, 1.0)]
    fired = [float(one["pairs_fired"]) / 80 for one in stats]
    assert fired[0] > fired[1] > fired[2] == 0
    assert [float(one["pairs_measured"]) / 80 for one in stats] == [3, 3, 3]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("projection", ["none", "mlp"])
def test_without_a_firing_pair_every_base_is_itself(base, projection):
    """S8: outputs, losses and gradients of any base, bit for bit: nothing due, or a threshold above 1."""
    x = tokens(30, scale=1.0)
    for due, threshold in (((), 0.0), (PAIRS, 1.5)):
        layer = case_of(base, threshold=threshold, projection=projection).layer("gelu")
        set_due(layer.router, due)
        twin, results = base_layer(layer), []
        for one in (twin, layer):
            values = x.clone().requires_grad_()
            merged = run(one, values, context(token_index_T=torch.arange(30)))
            total = merged.out_TD.square().sum() + sum(merged.losses.values())
            results.append((merged, gradients(one, total, [values])))
        (plain, plain_gradients), (merged, own_gradients) = results
        assert float(merged.losses[LOSS].detach()) == 0.0
        assert torch.equal(merged.out_TD, plain.out_TD)
        for name, value in plain.losses.items():
            assert torch.equal(merged.losses[name], value), name
        for name, gradient in own_gradients.items():
            if str(name).startswith("router.head."):
                assert gradient is not None, name  # every parameter takes part: engines wait for each
                assert (gradient == 0).all()
                continue
            other = plain_gradients[name.replace("router.base.", "router.", 1) if isinstance(name, str) else name]
            assert (gradient is None and other is None) or torch.equal(gradient, other), name


@pytest.mark.parametrize("base", BASES)
def test_a_coefficient_of_zero_is_the_base(base):
    """S8: a model with coefficient 0 has the base's initial values, loss and gradients, and no head to train."""
    options = SimSmoeConfig(base=router_config({"type": base}), similarity_coefficient=0.0, threshold=0.0, min_tokens=4)
    results = []
    for router in (options.base, options):
        model = small_model(router=router.model_dump(mode="json")).train()
        for one in model.routers().values():
            if router is options:
                set_due(one, PAIRS)
        output = model(text(4, 16), labels=text(4, 16), knobs=Knobs(0, 2))
        output.loss.backward()
        results.append((output.loss, {name: p.grad for name, p in model.named_parameters()}))
    (plain_loss, plain), (loss, own) = results
    assert torch.equal(plain_loss, loss)
    assert not any(".head." in name and gradient is not None for name, gradient in own.items())
    for name, gradient in plain.items():
        other = own[name.replace(".router.", ".router.base.", 1)]
        assert (gradient is None and other is None) or torch.equal(gradient, other), name


def test_evaluation_measures_nothing():
    layer = layer_of()
    merged = run(layer, tokens(40, scale=1.0).double(), context(training=False))
    plain = run(base_layer(layer), tokens(40, scale=1.0).double(), context(training=False))
    assert merged.losses.keys() == plain.losses.keys()
    assert merged.stats.keys() == plain.stats.keys()


def ids_of(rows):
    return torch.tensor(rows, dtype=torch.int64)


def test_counting_by_hand():
    """S6: all pairs of a token's experts, whatever their order; empty slots and the diagonal stay out."""
    counts = co_routed_tokens(ids_of([[2, 0, 1], [1, 2, EMPTY_SLOT], [3, EMPTY_SLOT, EMPTY_SLOT], [-1, -1, -1]]), 4)
    assert counts.tolist() == [[0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_a_forward_pass_counts_every_pair_of_slots(top_k):
    """S6: the increments sum to C(k, 2) times the real tokens; none on or below the diagonal."""
    layer = layer_of()
    mask = torch.arange(40) % 5 != 0
    counts = run(layer, tokens(40).double(), context(top_k, token_mask_T=mask)).stats["co_routed_EE"]
    assert float(counts.sum()) == 32 * top_k * (top_k - 1) / 2
    assert (counts.tril() == 0).all()


def step(router, shared, num_tokens):
    router.after_step({"co_routed_EE": torch.tensor(shared, dtype=torch.float32), "tokens": torch.tensor(num_tokens)})


def due_of(router):
    return [tuple(pair) for pair in router.due_P2.tolist() if pair[0] >= 0]


@pytest.mark.parametrize(("unit", "frequency"), [("batch_fraction", 0.5), ("tokens", 37.0)])
@pytest.mark.parametrize("max_pairs", [1, 2, 100])
def test_counters_and_due_pairs_follow_the_loops(unit, frequency, max_pairs):
    """S7: over 60 steps counters and due pairs are those of plain loops; a checked pair's counter is 0, others grow."""
    options = {"frequency": frequency, "frequency_unit": unit, "max_pairs": max_pairs}
    router = case_of(**options).routers(num_experts=4)[0]
    counts, due, checks = [[0] * 4 for _ in range(4)], [], 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = [torch.randperm(4, generator=generator)[:2].tolist() for _ in range(20)]
        shared = naive.shared_counts(ids, 4)
        before = copy.deepcopy(counts)
        counts, following = naive.next_state(
            counts, due, shared, frequency * (20.0 if unit == "batch_fraction" else 1.0), max_pairs
        )
        step(router, shared, 20.0)
        assert router.co_routed_EE.tolist() == counts
        assert due_of(router) == following
        for i, j in itertools.combinations(range(4), 2):
            assert counts[i][j] == (0 if (i, j) in due else before[i][j] + shared[i][j])
        checks += len(due)
        due = following
    limit = frequency if unit == "batch_fraction" else frequency / 20
    assert 0 < checks < 60 / limit  # S7: at most M * C(k, 2) / frequency


def test_ties_go_to_the_lower_pair():
    router = case_of(frequency=1.0, frequency_unit="tokens", max_pairs=3).routers(num_experts=4)[0]
    shared = [[0, 5, 9, 5], [0, 0, 5, 5], [0, 0, 0, 1], [0, 0, 0, 0]]
    step(router, shared, 30.0)
    assert due_of(router) == [(0, 2), (0, 1), (0, 3)]
    step(router, shared, 30.0)
    assert due_of(router) == [(1, 2), (1, 3), (2, 3)]  # the checked ones are back at 0; 2 tokens exceed 1
    assert router.co_routed_EE.tolist() == [[0, 0, 0, 0], [0, 0, 10, 10], [0, 0, 0, 2], [0, 0, 0, 0]]


def test_the_counters_are_saved_and_loaded(tmp_path):
    """The state of the checks is in checkpoints: exact integers, in bf16 models too."""
    model = small_model(router={"type": "sim_smoe"}).bfloat16()
    router = model.routers()[0]
    shared = [[0, 2**20 + 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    step(router, shared, 4.0)
    assert router.co_routed_EE.tolist() == shared
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).routers()[0]
    assert torch.equal(loaded.co_routed_EE, router.co_routed_EE)
    assert due_of(loaded) == due_of(router) == [(0, 1)]


@pytest.mark.parametrize("base", ["top_k", "hyper_router"])
def test_the_bases_buffers_are_adapted_too(base):
    """What a base does after a step is still done."""
    router = case_of(base).routers()[0]
    seen = []
    router.base.after_step = seen.append
    stats = {"co_routed_EE": torch.zeros(NUM_EXPERTS, NUM_EXPERTS), "tokens": torch.tensor(1.0)}
    router.after_step(stats)
    assert seen == [stats]


def test_the_coefficient_is_its_own():
    """S9: without the load-balance loss the similarity loss still counts, with the same weight."""
    gradients_of = []
    for balance in (0.0, 0.5):
        router = {"type": "sim_smoe", "threshold": 0.0, "min_tokens": 4, "similarity_coefficient": 0.3}
        model = small_model(router=router, load_balance_coefficient=balance).train()
        assert model.config.loss_coefficients()[LOSS] == 0.3
        for one in model.routers().values():
            set_due(one, PAIRS)
        output = model(text(8, 16), labels=text(8, 16))
        assert float(output.router_losses[LOSS]) > 0.1
        output.loss.backward()
        gradients_of.append(model.routers()[1].head.weight.grad)
    assert gradients_of[0].abs().max() > 0
    torch.testing.assert_close(gradients_of[0], gradients_of[1], atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("similarity", ["cka_linear", "cka_rbf"])
def test_a_firing_pair_trains_its_two_experts_and_the_head(base, similarity):
    """S10: no other expert, and no parameter of the router that chose; the layers below get gradient too."""
    layer = layer_of(base, due=[(1, 3)], similarity=similarity)
    x = tokens(60, scale=1.0).double().requires_grad_()
    ctx = context(token_index_T=torch.arange(60))
    merged = run(layer, x, ctx)
    if float(merged.losses[LOSS]) == 0.0:
        layer = layer_of(base, due=list(itertools.combinations(range(4), 2))[:4], similarity=similarity)
        merged = run(layer, x, ctx)
    assert float(merged.losses[LOSS]) > 0
    fired = {expert for pair in due_of(layer.router) for expert in pair}
    found = gradients(layer, merged.losses[LOSS], [x])
    assert found.pop(0).abs().max() > 0
    assert layer.router.losses_reaching_experts(ctx) >= {LOSS}
    declared = layer.router.trained_by(ctx)
    assert declared.keys() == {"task", *type(layer.router).losses_of(layer.router.config)}
    for name, gradient in found.items():
        if name.startswith("bank."):
            touched = {expert for expert in range(4) if gradient is not None and gradient[expert].abs().max() > 0}
            assert touched <= fired, name
            # A bias of the output moves all outputs alike, which a linear head's CKA does not see.
            assert touched or name.endswith("b_out"), name
        else:
            reached = gradient is not None and bool((gradient != 0).any())
            assert reached == (name.removeprefix("router.") in declared[LOSS]), name


def test_the_task_trains_the_base_and_no_head():
    """In place of the suite's "trains": the task reaches every parameter of the base, and none of the head."""
    layer = layer_of("hyper_router")
    found = gradients(layer, run(layer, tokens(40, scale=1.0).double(), context()).out_TD.square().sum())
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.abs().max() > 0}
    assert {name for name in reached if name.startswith("router.")} == {"router.base.embedding"}


def test_what_is_declared_for_the_task_is_the_bases():
    layer = layer_of("hyper_router")
    own, base = layer.router.trained_by(context()), layer.router.base.trained_by(context())
    for loss, names in base.items():
        assert own[loss] == {f"base.{name}" for name in names}
        assert all(layer.router.get_parameter(name).requires_grad for name in own[loss])
    assert own[LOSS] == {"head.weight"}


@pytest.mark.parametrize("top_k", [2, 3])
def test_no_expert_runs_more_often(top_k):
    """S11: T * k rows for k >= 2, whether pairs are checked or not."""
    layer, rows = layer_of(), []
    layer.bank.experts.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[1].num_rows))
    run(layer, tokens(40).double(), context(top_k))
    assert rows == [40 * top_k]


@pytest.mark.parametrize("similarity", ["cka_linear", "cka_rbf"])
def test_a_step_on_the_loss_lowers_the_similarity(similarity):
    """S12: experts that are nearly alike move apart by SGD on this loss alone; the head stays as it is."""
    layer = layer_of(due=[(0, 1)], similarity=similarity)
    with torch.no_grad():
        for parameter in layer.bank.experts.parameters():
            noise = torch.randn(parameter[1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            parameter[1] = parameter[0] + 0.2 * noise
    x = tokens(80, scale=1.0).double()
    before = run(layer, x, context()).losses[LOSS]
    assert 0.5 < float(before) < 1.0
    before.backward()
    with torch.no_grad():
        for parameter in layer.bank.experts.parameters():
            parameter -= 0.05 * parameter.grad
    assert float(run(layer, x, context()).losses[LOSS]) < float(before) - 1e-3


def test_copied_experts_do_not_move():
    """S12: exact copies are a stationary point; upcycled experts need noise."""
    layer = layer_of(due=[(0, 1)])
    with torch.no_grad():
        for parameter in layer.bank.experts.parameters():
            parameter[1] = parameter[0]
    merged = run(layer, tokens(80, scale=1.0).double(), context())
    assert float(merged.losses[LOSS]) == pytest.approx(1.0, abs=1e-9)
    found = gradients(layer, merged.losses[LOSS])
    assert all(float(found[name].abs().max()) < 1e-9 for name in found if name.startswith("bank."))


@pytest.mark.parametrize("options", [{}, {"similarity": "cka_rbf"}, {"similarity": "cka_rbf", "candidate_tokens": 48}])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 1), (4, 1), (2, 2)])
def test_parts_give_the_loss_of_the_whole(options, ranks, micro_batches):
    """Mean of value and gradient over ranks and micro-batches: the whole batch's, though its pairs are spread."""
    layer = layer_of(**options)
    x = tokens(96, scale=1.0).double()
    mask = torch.arange(96) % 11 != 5
    whole = run(layer, x, context(token_index_T=torch.arange(96), token_mask_T=mask))
    expected = gradients(layer, whole.losses[LOSS])
    assert float(whole.losses[LOSS]) > 0.1
    parts = ranks * micro_batches
    # Interleaved, as samples are dealt to ranks.
    index = torch.arange(96).view(-1, 2 * parts).unflatten(1, (parts, 2)).transpose(0, 1).reshape(parts, -1)
    pieces = [(x[i], i, mask[i]) for i in index]
    recorded = [Recorder() for _ in range(parts)]

    def run_part(part, sum_over_ranks, totals):
        values, place, real = pieces[part]
        ctx = Context(3, 0, 2, True, 5, token_index_T=place, token_mask_T=real, num_ranks=ranks)
        ctx = dataclasses.replace(ctx, sum_over_ranks=sum_over_ranks, step_totals=totals)
        return run(layer, values, ctx)

    # What each part would send is recorded; then each part is told the sums that all would have received.
    for part in range(parts):
        totals = StepTotals(micro_batches)
        run_part(part, recorded[part], totals)
    sums = [sum(sent) for sent in zip(*(one.sent for one in recorded), strict=True)]
    losses, found = [], []
    for part in range(parts):
        merged = run_part(part, same, Known(sums, micro_batches))
        losses.append(merged.losses[LOSS].detach())
        found.append(gradients(layer, merged.losses[LOSS]))
    torch.testing.assert_close(torch.stack(losses), whole.losses[LOSS].detach().expand(parts), atol=1e-9, rtol=1e-9)
    for name, gradient in expected.items():
        if gradient is not None and gradient.abs().max() > 0:
            mean = torch.stack([one[name] for one in found]).mean(0)
            torch.testing.assert_close(mean, gradient, atol=1e-9, rtol=1e-7, msg=name)


class Recorder:
    """Notes what is summed over ranks."""

    def __init__(self):
        self.sent = []

    def __call__(self, values):
        self.sent.append(values.clone())
        return values


class Known(StepTotals):
    """Totals that are known from elsewhere, in the order in which they are asked for."""

    def __init__(self, sums, micro_batches):
        super().__init__(micro_batches)
        self.left = list(sums)

    def total(self, key, local, sum_over_ranks):
        return self.left.pop(0)


def same(values):
    return values


def test_a_second_choice_is_probed_at_k_1():
    """With k = 1 pairs are first and second choices: only tokens of due pairs run a second expert, without weight."""
    base = TopKConfig(softmax="before_top_k")
    layer = layer_of(base=base.type, due=[(1, 3)], probe_second_expert=True)
    layer.router.base.config = base
    rows = []
    layer.bank.experts.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[1].num_rows))
    x = tokens(60, scale=1.0).double()
    mask = torch.arange(60) % 6 != 0
    merged = run(layer, x, context(1, token_mask_T=mask))
    two = naive_moe(
        x,
        (layer.router.base.weight.detach(), None),
        dict(layer.bank.experts.named_parameters()),
        "gelu",
        2,
        "before_top_k",
        mask.tolist(),
    )
    shared = naive.shared_counts(two.ids, 4)
    assert merged.stats["co_routed_EE"].tolist() == shared
    assert shared[1][3] >= 4
    assert rows == [50 + shared[1][3]]
    experts = dict(layer.bank.experts.named_parameters())
    outputs = [
        {expert: feed_forward(x_D, expert, experts, "gelu") for expert in ids}
        for x_D, ids in zip(x, two.ids, strict=True)
    ]
    expected, fired = naive.similarity_loss(
        two.ids,
        outputs,
        [(1, 3)],
        {"weight": layer.router.head.weight},
        kernel="cka_linear",
        estimator="biased",
        threshold=0.0,
    )
    assert fired == [(1, 3)]
    torch.testing.assert_close(merged.losses[LOSS], expected, atol=1e-9, rtol=1e-9)
    plain = run(base_layer(layer), x, context(1, token_mask_T=mask))
    torch.testing.assert_close(merged.out_TD, plain.out_TD, atol=1e-12, rtol=1e-12)
    for name, value in plain.losses.items():
        assert torch.equal(merged.losses[name], value)
    assert torch.equal(merged.stats["slots_E"], plain.stats["slots_E"])
    assert (merged.experts_of_token_T == plain.experts_of_token_T).all()


COMPETING = [base for base in BASES if router_config({"type": base}).competes()]


@pytest.mark.parametrize("base", COMPETING)
def test_winners_of_a_contest_are_counted_and_compared(base):
    """On a competing step pairs are those of winners, and their outputs are those of the contest."""
    layer = layer_of(base)
    x = tokens(60, scale=1.0).double()
    ctx = context(competing=True, token_index_T=torch.arange(60))
    merged, plain = run(layer, x, ctx), run(base_layer(layer), x, ctx)
    assert torch.equal(merged.out_TD, plain.out_TD)
    assert all(torch.equal(merged.losses[name], value) for name, value in plain.losses.items())
    counts_EE = merged.stats["co_routed_EE"]
    assert float(counts_EE.sum()) == 60
    assert torch.equal(counts_EE.sum(0) + counts_EE.sum(1), plain.stats["slots_E"])
    found = gradients(layer, merged.losses[LOSS])
    assert float(merged.losses[LOSS]) > 0
    assert found["bank.experts.w_in"].abs().max() > 0
    assert all(g is None or (g == 0).all() for name, g in found.items() if name.startswith("router.base."))


def plan(*top_k_values, num_experts=8, max_steps=100):
    return RouterPlan(frozenset(top_k_values), num_experts, max_steps)


def test_impossible_and_idle_settings_are_named():
    assert SimSmoeConfig().problems(plan(2)) == []
    switch = TopKConfig(softmax="before_top_k")
    assert "no two experts" in SimSmoeConfig(base=switch).problems(plan(1))[0]
    assert SimSmoeConfig(base=switch, probe_second_expert=True).problems(plan(1)) == []
    assert SimSmoeConfig(base=switch).problems(plan(1, 2)) == []
    assert "base: " in SimSmoeConfig(probe_second_expert=True).problems(plan(1))[0]
    assert "k is never 1" in SimSmoeConfig(probe_second_expert=True).problems(plan(2))[0]
    choice = {"type": "expert_choice", "allow_future_leak": True}
    sigmoid = {"type": "sigmoid", "normalise": False}
    for base in (choice, sigmoid):
        assert "second choice" in SimSmoeConfig(base=base, probe_second_expert=True).problems(plan(1))[0]
    assert SimSmoeConfig(base=choice).problems(plan(1)) == []
    for base, top_k in ((sigmoid, 1), ({"type": "adaptive", "threshold": -0.5}, 2)):
        assert "these options of base" in SimSmoeConfig(base=base).problems(plan(top_k))[0]
    for option in ("max_tokens", "candidate_tokens"):
        few = SimSmoeConfig(similarity="cka_rbf", **{option: 15}).problems(plan(2))
        assert "nothing is measured" in few[0]
    assert SimSmoeConfig(similarity="cka_rbf", max_tokens=16).problems(plan(2)) == []
    assert "no pair is ever checked" in SimSmoeConfig().problems(plan(2, max_steps=17))[0]
    assert SimSmoeConfig().problems(plan(2, max_steps=18)) == []
    assert "num_experts 1" in SimSmoeConfig().problems(plan(2, num_experts=1))[0]
    assert "threshold" in SimSmoeConfig(threshold=1.1).problems(plan(2))[0]
    assert "projection_dim" in SimSmoeConfig(projection="none", projection_dim=3).problems(plan(2))[0]
    assert "sigma has no effect" in SimSmoeConfig(sigma=0.5).problems(plan(2))[0]
    assert SimSmoeConfig(sigma=0.5, similarity="cka_rbf").problems(plan(2)) == []


def test_options_of_every_base_survive_a_round_trip():
    """The nested base keeps all its options through JSON, as recipes and exported models store it."""
    for base in BASES:
        config = SimSmoeConfig(base=router_config({"type": base}))
        assert router_config(config.model_dump(mode="json")) == config
        assert type(config.base) is ROUTERS.get(base).config
        entry = ROUTERS.get("sim_smoe").router
        assert entry.losses_of(config) == {LOSS} | ROUTERS.get(base).router.losses_of(config.base)
        assert LOSS in entry.batch_losses_of(config)
    with pytest.raises(ValueError, match="base"):
        router_config({"type": "sim_smoe", "base": {"type": "sim_smoe"}})


def test_frozen_and_late_frozen_are_the_bases():
    router = case_of().routers()[0]
    router.base.frozen = lambda step: step > 3
    router.base.late_frozen = lambda: [router.base.weight]
    assert [router.frozen(step) for step in (3, 4)] == [False, True]
    assert router.late_frozen() == [router.base.weight]


def test_an_assignment_of_wrong_pairs_is_noticed():
    """The oracle's comparison can fail: another slot order of the outputs is another loss."""
    layer = layer_of()
    x = tokens(60, scale=1.0).double()
    assignment = layer.router.assign(x, torch.arange(60) % 7, context(3))
    y_TKD = layer.bank(x, assignment.expert_ids_TK)
    right = layer.router.merge(assignment, y_TKD, context(3)).losses[LOSS]
    turned = Assignment(assignment.expert_ids_TK.roll(1, 1), assignment.weights_TK, assignment.logits_TE)
    assert abs(float(layer.router.merge(turned, y_TKD, context(3)).losses[LOSS] - right)) > 1e-3
