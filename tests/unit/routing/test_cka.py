"""CKA: golden values, invariances, estimators, and that nothing undefined is ever more than a zero."""

import pytest
import torch
from support import naive_sim_smoe as naive

from smoe_train.routing.cka import cka_linear, cka_rbf, linear_sums

ESTIMATORS = ("biased", "debiased")
KINDS = ("linear", "rbf", "rbf absolute")
# The notes' golden pair, worked out by hand: centred Frobenius products 1/4 and 1/2, unbiased -1/6 and 1/3.
X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.float64)
Y = torch.tensor([[1.0, 0], [0, 0], [0, 1], [1, 1]], dtype=torch.float64)


def similarity(x, y, kind="linear", estimator="biased", shared=None, min_tokens=4, sigma=0.8):
    """One pair's CKA and whether it is defined."""
    shared = torch.ones(1, len(x), dtype=torch.bool) if shared is None else shared.unsqueeze(0)
    if kind == "linear":
        return cka_linear(linear_sums(x[None], y[None], shared), x.shape[1], estimator, min_tokens)
    mode = "absolute" if "absolute" in kind else "median_fraction"
    return cka_rbf(x[None], y[None], shared, estimator, sigma, mode, min_tokens)


def value(*arguments, **options):
    return float(similarity(*arguments, **options).value_P)


def normal(n, width=6, seed=0, scale=1.0):
    return scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n=30):
    """Two representations that share a part: CKA well inside (0, 1)."""
    return normal(n), normal(n) @ normal(6, 6, 1) + 1.5 * normal(n, 6, 2)


def orthogonal(width, seed=5):
    return torch.linalg.qr(normal(width, width, seed)).Q


every_kind = pytest.mark.parametrize("kind", KINDS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def test_golden_values():
    """S3: linear, biased 0.5 and debiased -0.5; a representation and its double are the same."""
    assert value(X, Y) == pytest.approx(0.5, abs=1e-12)
    assert value(X, Y, estimator="debiased") == pytest.approx(-0.5, abs=1e-12)
    assert value(X, 2 * X) == pytest.approx(1.0, abs=1e-12)
    assert naive.cka(X, Y, "cka_linear", "biased").item() == pytest.approx(0.5, abs=1e-12)
    assert naive.cka(X, Y, "cka_linear", "debiased").item() == pytest.approx(-0.5, abs=1e-12)


@every_kind
@every_estimator
@pytest.mark.parametrize("n", [4, 5, 19])
def test_feature_form_equals_gram_form(kind, estimator, n):
    """S3: sums over tokens give what Gram matrices with H do, in value and gradient; hidden rows count nowhere."""
    x, y = normal(n + 3, scale=0.4), 0.2 * (normal(n + 3) @ normal(6, 6, 1) + normal(n + 3, 6, 2))
    x, y = x.requires_grad_(), y.requires_grad_()
    shared = torch.ones(n + 3, dtype=torch.bool)
    shared[[0, 2, n]] = False
    rows = shared.nonzero().flatten().tolist()
    mode = "absolute" if "absolute" in kind else "median_fraction"
    kernel = "cka_linear" if kind == "linear" else "cka_rbf"
    expected = naive.cka([x[i] for i in rows], [y[i] for i in rows], kernel, estimator, 0.8, mode)
    got = similarity(x, y, kind, estimator, shared)
    assert got.defined_P.all()
    torch.testing.assert_close(got.value_P[0], expected, atol=1e-9, rtol=1e-9)
    for one, other in zip(
        torch.autograd.grad(got.value_P[0], [x, y]), torch.autograd.grad(expected, [x, y]), strict=True
    ):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@every_kind
def test_range_identity_and_symmetry(kind):
    """S1: biased CKA lies in [0, 1], is 1 for a representation and itself, and symmetric."""
    for seed in range(20):
        x, y = normal(9, 3, seed), normal(9, 3, seed + 100)
        assert 0.0 <= value(x, y, kind) <= 1.0
        assert value(x, x, kind) == pytest.approx(1.0, abs=1e-9)
        assert value(x, x, kind, "debiased") == pytest.approx(1.0, abs=1e-9)
        for estimator in ESTIMATORS:
            assert value(x, y, kind, estimator) == pytest.approx(value(y, x, kind, estimator), abs=1e-9)


@every_kind
@every_estimator
def test_invariances(kind, estimator):
    """S2: rotation and translation change nothing; scale neither, but for a Gaussian kernel of absolute width."""
    x, y = (0.2 * one for one in correlated())
    expected = value(x, y, kind, estimator)
    assert 0.05 < expected < 0.95
    assert value(x @ orthogonal(6), y + 3.0, kind, estimator) == pytest.approx(expected, abs=1e-9)
    scaled = value(7.0 * x, 0.2 * y, kind, estimator)
    if kind == "rbf absolute":
        assert abs(scaled - expected) > 0.01
    else:
        assert scaled == pytest.approx(expected, abs=1e-9)


def test_an_absolute_width_depends_on_the_scale():
    """S2: independent outputs look different when small and equal when large, without a gradient to learn from."""
    small, middle, large = (
        value(normal(256, 16, 0, scale), normal(256, 16, 1, scale), "rbf absolute") for scale in (0.05, 0.3, 1.0)
    )
    assert small < 0.1 < middle < 0.5
    assert large > 0.99
    assert value(normal(256, 16), normal(256, 16, 1), "rbf absolute", "debiased") < 0.5


@every_kind
def test_a_large_common_part_does_not_hide_the_spread(kind):
    """Outputs of mean 100 and deviation 1, as fp32 outputs may have: sums of fourth powers cancel nine digits."""
    x, y = correlated()
    for estimator in ESTIMATORS:
        far = value((x + 100).float(), (y - 100).float(), kind, estimator)
        assert far == pytest.approx(value(x, y, kind, estimator), abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "rbf"])
@pytest.mark.parametrize("n", [32, 128])
def test_the_debiased_estimate_of_independence_is_zero(kind, n):
    """S4: |mean| < 0.05 at n >= 32 for the debiased estimate; the biased one falls with n and exceeds it."""
    pairs = [(normal(n, 16, seed), normal(n, 16, seed + 1000)) for seed in range(40)]
    debiased, biased, more = (
        sum(value(x, y, kind, estimator) for x, y in used) / 40
        for estimator, used in (
            ("debiased", pairs),
            ("biased", pairs),
            ("biased", [(normal(2 * n, 16, seed), normal(2 * n, 16, seed + 1000)) for seed in range(40)]),
        )
    )
    assert abs(debiased) < 0.05
    assert debiased + 0.05 < more < biased


@pytest.mark.parametrize(("n", "biased"), [(8, 0.66), (16, 0.52), (32, 0.34), (64, 0.21)])
def test_independent_outputs_by_their_number_of_tokens(n, biased):
    """S4: the notes' figures for a linear kernel and width 16, means over 60 draws."""
    pairs = [(normal(n, 16, seed), normal(n, 16, seed + 1000)) for seed in range(60)]
    assert sum(value(x, y) for x, y in pairs) / 60 == pytest.approx(biased, abs=0.04)
    debiased = sum(value(x, y, estimator="debiased") for x, y in pairs) / 60
    assert abs(debiased) <= (0.1 if n < 16 else 0.04)


ABSOLUTE = [(0.05, 0.03, 0.006), (0.2, 0.08, 0.006), (0.3, 0.21, 0.01), (0.5, 0.84, 0.02), (1.0, 0.9999, 1e-4)]


def test_an_absolute_width_of_0_8_by_the_scale_of_the_outputs():
    """S2: the notes' figures for independent outputs, n = 512, width 16; at deviation 1 there is no gradient left."""
    norms = {}
    for std, expected, tolerance in (*ABSOLUTE, (2.0, 1.0, 1e-9)):
        x, y = normal(512, 16, 0, std), normal(512, 16, 50, std).requires_grad_()
        cka = similarity(x, y, "rbf absolute").value_P.sum()
        assert cka.item() == pytest.approx(expected, abs=tolerance), std
        norms[std] = float(torch.autograd.grad(cka, [y])[0].norm())
    assert 1e-5 < norms[1.0] < 1e-3  # the notes: 3e-5
    assert norms[0.05] > 100 * norms[1.0]
    assert norms[2.0] < 1e-8  # 5e-14 there


def test_the_biased_estimate_would_fire_on_noise():
    """S4: at 12 tokens of width 16 independent outputs exceed the threshold of 0.5 when biased, never when debiased."""
    pairs = [(normal(12, 16, seed), normal(12, 16, seed + 1000)) for seed in range(40)]
    assert sum(value(x, y) > 0.5 for x, y in pairs) > 20
    assert not any(value(x, y, estimator="debiased") > 0.5 for x, y in pairs)


@every_kind
@every_estimator
@pytest.mark.parametrize(
    "case", ["no token", "one token", "three tokens", "fewer than asked", "zeros", "constant", "constant but rounding"]
)
def test_what_is_not_defined_is_zero_with_finite_gradients(kind, estimator, case):
    """S5: exactly 0, not NaN, and gradients are 0."""
    x, y, min_tokens = normal(12).float(), normal(12, 6, 1).float(), 4
    shared = torch.ones(12, dtype=torch.bool)
    if "token" in case:
        shared[{"no token": 0, "one token": 1, "three tokens": 3}[case] :] = False
    elif case == "fewer than asked":
        min_tokens = 13
    elif case == "zeros":
        x = torch.zeros_like(x)
    else:
        noise = 1e-7 * x if "rounding" in case else 0.0
        x = torch.full_like(x, 3.7) * (1 + noise)
    x.requires_grad_()
    y.requires_grad_()
    got = similarity(x, y, kind, estimator, shared, min_tokens)
    assert got.value_P.tolist() == [0.0]
    assert not got.defined_P.any()
    for gradient in torch.autograd.grad(got.value_P.sum(), [x, y]):
        assert (gradient == 0).all()


@every_kind
def test_identical_outputs_have_no_gradient(kind):
    """S12, second half: exact collapse is a stationary point; a little noise ends it."""
    x = normal(40)
    for noise, low, high in ((0.0, 0.0, 1e-7), (0.1, 1e-4, 1.0)):
        y = (x + noise * normal(40, 6, 9)).requires_grad_()
        (gradient,) = torch.autograd.grad(similarity(x, y, kind).value_P.sum(), [y])
        assert low <= float(gradient.norm()) <= high


def test_pairs_do_not_see_each_other():
    """Several pairs at once give what each gives alone, where one of them is not defined too."""
    x, y = torch.stack([normal(12, 3, s) for s in range(3)]), torch.stack([normal(12, 3, s) for s in range(3, 6)])
    shared = torch.ones(3, 12, dtype=torch.bool)
    shared[1, 3:] = False
    shared[2, 9:] = False
    for estimator in ESTIMATORS:
        linear = cka_linear(linear_sums(x, y, shared), 3, estimator)
        gauss = cka_rbf(x, y, shared, estimator, 0.8, "median_fraction")
        assert linear.defined_P.tolist() == gauss.defined_P.tolist() == [True, False, True]
        for i in range(3):
            assert float(linear.value_P[i]) == pytest.approx(
                value(x[i], y[i], "linear", estimator, shared[i]), abs=1e-12
            )
            assert float(gauss.value_P[i]) == pytest.approx(value(x[i], y[i], "rbf", estimator, shared[i]), abs=1e-12)


def test_sums_of_parts_are_those_of_the_whole():
    x, y, shared = normal(12)[None], normal(12, 6, 1)[None], torch.arange(12)[None] % 3 > 0
    parts = sum(linear_sums(x[:, part], y[:, part], shared[:, part]) for part in (slice(0, 5), slice(5, 12)))
    torch.testing.assert_close(parts, linear_sums(x, y, shared), atol=1e-12, rtol=1e-12)
