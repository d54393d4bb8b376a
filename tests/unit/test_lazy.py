"""Names that are imported when they are first used."""

import subprocess
import sys

import pytest

import smoe_train.checkpoint
import smoe_train.data
import smoe_train.model
import smoe_train.parallel
import smoe_train.training
from smoe_train.lazy import lazy_attributes


def test_a_name_comes_from_its_module():
    load = lazy_attributes("json", {"decoder": ("JSONDecoder",)})
    import json

    assert load("JSONDecoder") is json.JSONDecoder


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'json' has no attribute 'nothing'"):
        lazy_attributes("json", {})("nothing")


@pytest.mark.parametrize(
    "package",
    [smoe_train.checkpoint, smoe_train.data, smoe_train.model, smoe_train.parallel, smoe_train.training],
    ids=lambda package: package.__name__,
)
def test_every_exported_name_can_be_imported(package):
    assert [name for name in package.__all__ if getattr(package, name, None) is None] == []


def test_reading_a_recipe_does_not_load_transformers_or_deepspeed():
    program = (
        "import sys; from smoe_train.recipe import load_recipe; load_recipe('demo');"
        "print(sorted({'deepspeed', 'transformers', 'datasets', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_is_not_loaded_before_the_environment_of_a_run_is_set():
    program = "import sys, smoe_train.cli.app, smoe_train.cli.train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
