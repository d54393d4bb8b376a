"""The comparison of policies: every policy has a row, every row a recipe, and the differences are worked out right."""

import pytest
from support.scripts import loaded

from smoe_train.recipe import load_recipe
from smoe_train.routing import ROUTERS


@pytest.fixture(scope="module")
def script():
    with loaded("compare_policies") as module:
        yield module


def test_every_causal_policy_has_a_row_and_every_row_a_recipe(script):
    sizes = ["data.train_bytes=2700000", "data.valid_bytes=150000", "data.test_bytes=150000", "training.max_steps=200"]
    recipes = [
        load_recipe(
            policy.recipe,
            [*script.SIZE, *sizes, *(text.format(tenth=20) if "tenth" in text else text for text in policy.overrides)],
            1,
        )
        for policy in script.POLICIES
    ]
    causal = {name for name, entry in ROUTERS.items() if entry.router.causal}
    assert {recipe.model.moe.router.type for recipe in recipes} == causal
    assert len({script.folder_of(policy, 1) for policy in script.POLICIES}) == len(script.POLICIES)


def test_differences_are_paired(script):
    """Differences .1 .2 .3: mean .2, s.d. .1, t(2) = 4.3027, so 4.3027 * .1 / sqrt(3) = .2484; and a clear one."""

    def result(label, bits):
        return script.Result(label, bits, None, None, 1.0, 0.5, 1.0, "")

    base = result(script.BASELINE, [3.0, 4.0, 5.0])
    assert script._difference(base, base) == "-"
    assert script._difference(result("a", [3.1, 4.2, 5.3]), base) == "+0.2000 ± 0.2484, within the noise"
    assert script._difference(result("b", [2.9, 3.9, 4.89]), base) == "-0.1033 ± 0.0143, better"
    assert "| b | 3.8967 ± 0.9950 |" in script.table([base, result("b", [2.9, 3.9, 4.89])])
