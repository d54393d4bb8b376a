import math
import re
import struct

import numpy as np
import pytest

from smoe_train.errors import RunFailedError, SmoeError
from smoe_train.reporting import METRICS, ROUTING, write_environment, write_report
from smoe_train.reporting.charts import _curves, binned_load, smoothed
from smoe_train.reporting.records import encode
from smoe_train.reporting.report import headline, results, speed


def train(step, **more):
    return {
        "step": step,
        "split": "train",
        "loss": 2.0 + 3.0 / step,
        "bits_per_byte": (2.0 + 3.0 / step) / math.log(2),
        "tokens": 1000 * step,
        "step_seconds": 5.0 if step == 1 else 0.5,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "top_k": 2,
        "load_balance_loss": 1.1,
        "load_balance_loss_weighted": 0.011,
        **more,
    }


def valid(step, loss):
    return {
        "step": step,
        "split": "valid",
        "loss": loss,
        "bits_per_byte": loss / math.log(2),
        "perplexity": math.exp(loss),
    }


def routed(step, layer):
    return {
        "step": step,
        "split": "train",
        "layer": layer,
        "load": [0.7, 0.3, 0.0, 0.0],
        "load_max_over_mean": 2.8,
        "entropy": 1.0,
        "entropy_normalised": 1.0 / math.log(4),
        "dead_experts": 2,
        "top1_margin": 0.2,
        "dropped_share": 0.0,
    }


def make_run(folder, metrics, routing=None):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("name: <script>alert(1)</script>\nseed: 1\n")
    (folder / METRICS).write_bytes(b"".join(map(encode, metrics)))
    if routing is not None:
        (folder / ROUTING).write_bytes(b"".join(map(encode, routing)))
    return folder


def test_a_whole_run_becomes_one_self_contained_page(tmp_path):
    metrics = [*(train(step) for step in range(1, 41)), valid(20, 2.5), valid(40, 2.25)]
    routing = [routed(step, layer) for step in range(1, 41) for layer in (1, 3)]
    run = make_run(tmp_path / "run", metrics, routing)
    write_environment(run, {"python": "3.x", "baselines": {"gzip -9": 2.51}, "data_checksums": {"a": "00"}})
    page = write_report(run)
    html = page.read_text()
    assert page == run / "report" / "report.html"
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    names = {"loss", "optimisation", "auxiliary_losses", "routing_health", "expert_load"}
    assert {path.stem for path in page.parent.glob("*.png")} == names
    assert html.count("data:image/png;base64,") == len(names)
    for path in page.parent.glob("*.png"):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width > 800
        assert height > 200
    assert "gzip -9 (compressor)" in html
    assert "data_checksums.a" in html


@pytest.mark.parametrize(
    "metrics",
    [
        [train(1)],
        [valid(1, 3.0)],
        [train(1, loss=math.nan, bits_per_byte=math.inf), train(2, gradient_norm=math.nan)],
        [{"step": 1, "split": "train"}],
        [{"step": 1, "split": "train", "loss": 0.5}, {"step": 1, "split": "valid", "loss": 0.5, "accuracy": 0.9}],
    ],
    ids=["one step", "validation only", "not finite", "nothing measured", "classification"],
)
def test_little_or_odd_records_are_enough(tmp_path, metrics):
    assert write_report(make_run(tmp_path / "run", metrics)).exists()


def test_more_layers_than_fit_and_a_single_routing_record(tmp_path):
    run = make_run(tmp_path / "run", [train(7)], [routed(7, layer) for layer in range(15)])
    write_report(run)
    assert (run / "report" / "expert_load.png").exists()


def test_a_torn_last_line_is_tolerated_and_earlier_damage_is_not(tmp_path):
    run = make_run(tmp_path / "run", [train(1), train(2)])
    with (run / METRICS).open("ab") as file:
        file.write(b'{"step": 3')
    write_report(run)
    with (run / METRICS).open("ab") as file:
        file.write(b"\n" + encode(train(4)))
    with pytest.raises(RunFailedError, match=r"metrics\.jsonl:3"):
        write_report(run)


@pytest.mark.parametrize("record", [{"split": ["train"]}, {"step": "1"}, {"loss": 10**400}, {"tokens": None}])
def test_records_that_no_run_writes_are_refused(tmp_path, record):
    run_folder = make_run(tmp_path / "run", [train(1), {**train(2), **record}])
    with pytest.raises(RunFailedError, match=rf"record 2: '{next(iter(record))}' is not what a run writes"):
        write_report(run_folder)


def test_a_report_that_would_lie_elsewhere_is_not_written(tmp_path):
    run_folder = make_run(tmp_path / "run", [train(1)])
    (tmp_path / "elsewhere").mkdir()
    (run_folder / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SmoeError, match="leads out of the run folder"):
        write_report(run_folder)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(SmoeError, match=r"is not the folder of a run.*recipe\.yaml"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(SmoeError, match="records no step yet"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_headline_figures():
    figures = dict(headline([train(1), train(2), train(3), valid(2, 2.0), valid(3, 2.5)]))
    assert figures["step"] == "3"
    assert figures["last training loss (nats/token)"] == "3"
    assert figures["last validation loss (nats/token)"] == "2.5"
    assert figures["best validation loss, at step 2"] == "2"
    assert figures["best validation bits per byte"] == "2.885"
    assert figures["best validation perplexity"] == "7.389"
    assert figures["tokens per second"] == "2,000"
    assert figures["time in training steps"] == "00:06"


def test_only_the_runs_own_top_k_is_a_result():
    metrics = [{**valid(step, loss), "top_k": k} for step in (1, 2) for k, loss in [(2, 3.0 / step), (4, 1.0)]]
    assert dict(headline(metrics))["best validation loss, at step 2"] == "1.5"
    assert [name for name, _ in _curves(metrics)] == ["validation, top k 2", "validation, top k 4"]
    assert [name for name, _ in _curves([valid(1, 2.0), valid(2, 2.0)])] == ["validation"]


def test_speed_leaves_out_the_first_step_and_counts_steps_between_records():
    assert speed([train(1), train(2)]) == (2000.0, 5.5)
    assert speed([train(10, step_seconds=5.0), train(20)]) == (2000.0, 10.0)
    assert speed([train(1)]) == (None, 5.0)
    assert speed([]) == (None, 0.0)


def test_compressors_are_ranked_beside_the_run():
    rows = results([valid(1, 2.0), valid(2, math.nan)], {"gzip -9": 3.0, "xz -9": 2.5})
    names = ["xz -9 (compressor)", "this run, best validation", "gzip -9 (compressor)"]
    assert [name for name, _ in rows] == names
    assert results([train(1)], {"xz -9": 2.5}) == []


def test_smoothing_is_the_two_sided_weighted_mean_without_gaps():
    values = np.array([1.0, np.nan, 4.0, 2.0])
    weights = 0.5 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))[:, [0, 2, 3]]
    expected = weights @ values[[0, 2, 3]] / weights.sum(axis=1)
    np.testing.assert_allclose(smoothed(values, 1.0), expected, rtol=1e-12)
    assert np.isnan(smoothed(np.array([np.nan]), 1.0)).all()


def test_binned_load_averages_steps_and_shows_gaps():
    records = [{"step": step, "load": load} for step, load in [(1, [1.0, 0.0]), (2, [0.5, 0.5]), (9, [0.0, 1.0])]]
    edges, load_EC = binned_load(records)
    assert edges[0] == 0.5
    assert edges[-1] == 9.5
    np.testing.assert_allclose(load_EC, [[1.5, np.nan, 0.0], [0.5, np.nan, 2.0]])
