"""A fine-tuned run is evaluated alike by one process and by ranks that share its experts out."""

import pytest
from support.fine_tuned import fine_tune
from support.ranks import run_ranks

from smoe_train.cli.evaluate_tasks import TaskOptions, evaluate_here


def test_ranks_with_experts_of_their_own(tmp_path):
    run = fine_tune(tmp_path)
    options = TaskOptions(str(run), top_k="1,2")
    (alone,) = run_ranks(1, evaluate_here, options)
    recipe = run / "recipe.yaml"
    written = recipe.read_text()
    assert "engine: local" in written
    assert "expert_parallel_size: 1" in written
    written = written.replace("engine: local", "engine: deepspeed")
    recipe.write_text(written.replace("expert_parallel_size: 1", "expert_parallel_size: 2"))
    first, second = run_ranks(2, evaluate_here, options)
    assert first == second, "every rank has the whole result"
    assert len(first) == 4
    for one, expected in zip(first, alone, strict=True):
        assert one.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        assert one == expected
