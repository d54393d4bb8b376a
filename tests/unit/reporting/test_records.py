import json
import math
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.errors import RunFailedError
from smoe_train.reporting import read_records
from smoe_train.reporting.records import by_rank_in_step, decode, encode, scalars_by_step


@given(st.floats(), st.lists(st.floats(), max_size=4))
def test_floats_survive_bit_for_bit(value, values):
    line = encode({"step": 1, "loss": value, "load": values})
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = decode(line)
    for before, after in [(value, back["loss"]), *zip(values, back["load"], strict=True)]:
        if math.isnan(before):
            assert math.isnan(after)
        else:
            assert struct.pack("<d", before) == struct.pack("<d", after)


def test_a_value_without_a_json_type_is_refused():
    with pytest.raises(TypeError):
        encode({"step": 1, "loss": object()})


def test_a_damaged_end_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n\0\0')
    assert [record["step"] for record in read_records(path)] == [1]


def test_damage_before_the_end_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFailedError, match=r"metrics\.jsonl:2: "):
        read_records(path)


def test_scalars_are_named_by_split_and_layer():
    records = [
        {"step": 3, "split": "train", "loss": 1.0, "note": "text"},
        {"step": 3, "split": "valid", "loss": 2.0},
        {"step": 4, "split": "train", "layer": 2, "load": [0.5, 0.5], "dead_experts": 0},
    ]
    assert scalars_by_step(records) == {
        3: {"train/loss": 1.0, "valid/loss": 2.0},
        4: {"routing_train/layer_02/dead_experts": 0},
    }


def test_validations_at_several_top_k_stay_apart():
    records = [{"step": s, "split": "valid", "top_k": k, "loss": 1.0 / k} for s in (10, 20) for k in (2, 4)]
    assert [[(r["step"], r["top_k"]) for r in series] for series in by_rank_in_step(records)] == [
        [(10, 2), (20, 2)],
        [(10, 4), (20, 4)],
    ]
    assert scalars_by_step(records)[20] == {
        "valid/top_k": 2,
        "valid/loss": 0.5,
        "valid_top_k_4/top_k": 4,
        "valid_top_k_4/loss": 0.25,
    }


def test_importing_the_room_loads_nothing_heavy():
    heavy = ["torch", "deepspeed", "wandb", "matplotlib", "jinja2", "tensorboard"]
    code = f"import sys, smoe_train.reporting; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
