"""From an engine to tensors and back: training goes on bit by bit as if it had never stopped."""

import random
import re
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_recipe

import smoe_train
from smoe_train.assembly import build_engine, build_model
from smoe_train.checkpoint import CheckpointStore, collect, load_weights, read_extra, restore, seed_everything
from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.cli.run_folder import OneRank
from smoe_train.data.batches.loader import MicroBatch
from smoe_train.errors import CheckpointError
from smoe_train.parallel.process import Process
from smoe_train.schedules import learning_rate
from smoe_train.training.objectives import language_modelling

CPU = torch.device("cpu")
VOCABULARY = 32
PICKLE = re.compile(
    r"torch\.(load|save)\b|\bpickle\b|\bdill\b|\bjoblib\b|\bmarshal\b|allow_pickle\s*=\s*True|\byaml\.load\b"
)

ROUTERS = {
    "hyper_router": {"type": "hyper_router", "hyper_hidden": 8},
    "hyper_router, shared": {"type": "hyper_router", "hyper_hidden": 8, "hypernet_scope": "model"},
    "top_k": {"type": "top_k", "bias": True},
}


def recipe(router="hyper_router", **model):
    moe = {"router": ROUTERS[router], "layers": [1], **model.pop("moe", {})}
    return tiny_recipe(
        Path("unused"),
        parallel={"engine": "local"},
        model={"dropout": 0.2, "d_ff": 24, "moe": moe, **model},
        curriculum={"top_k": {"low": 2, "high": 5}},
    )


class Run:
    """A model with its engine and batches that are a function of the step."""

    def __init__(self, settings):
        self.settings = settings
        seed_everything(settings.seed, 0)
        self.model = build_model(settings, VOCABULARY)
        self.model.train()
        self.engine = build_engine(settings, self.model, Process.alone())
        self.step = 0

    def train(self, steps):
        """Returns the losses of the steps in hexadecimal."""
        losses = []
        for _ in range(steps):
            knobs = self.settings.schedule().knobs(self.step)
            for micro in range(4):
                generator = torch.Generator().manual_seed(100 * self.step + micro)
                ids = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
                batch = MicroBatch.full(ids[:, :-1], ids[:, 1:], torch.arange(2) + 2 * micro, torch.arange(2))
                objective = language_modelling(self.engine.forward, batch, knobs, self.model.config)
                self.engine.backward(objective.total)
                losses.append(float(objective.total.detach()).hex())
            self.engine.step(learning_rate(self.settings.learning_rate, self.step, 8))
            self.step += 1
        return losses

    def save(self, folder):
        state = {"optimizer_steps": self.engine.optimizer_steps()}
        return CheckpointStore(folder, OneRank(), 9).save(self.step, collect(self.engine, 0, 1, CPU), state)

    def load(self, path):
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        restore(self.engine, checkpoint, 0, self.settings.seed, CPU)
        self.step = checkpoint.step


def resumed(settings, path):
    run = Run(settings)
    random.seed(1)
    torch.manual_seed(1)  # nothing but the checkpoint may decide what is drawn
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    run.load(path)
    return run


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_training_goes_on_bit_by_bit(tmp_path, router, at):
    settings = recipe(router)
    whole = Run(settings)
    whole.train(at)
    path = whole.save(tmp_path)
    expected = whole.train(5 - at)
    again = resumed(settings, path)
    assert again.train(5 - at) == expected
    for (name, one), (_, other) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_a_save_that_is_waited_for_reads_what_training_holds_and_another_copies_of_it():
    run = Run(recipe())
    run.train(1)
    held = {parameter.untyped_storage().data_ptr() for parameter in run.model.parameters()}
    copies, own = (collect(run.engine, 0, 1, CPU, copy=copy) for copy in (True, False))
    for name, tensors in own.items():
        for key, value in tensors.items():
            torch.testing.assert_close(copies[name][key], value, rtol=0, atol=0, equal_nan=True)
            weight = key.startswith("weight/")
            assert (value.untyped_storage().data_ptr() in held) is weight, key
            assert copies[name][key].untyped_storage().data_ptr() not in held, key
            moment = key.startswith(("exp_avg/", "exp_avg_sq/"))
            shared = value.untyped_storage().data_ptr() == copies[name][key].untyped_storage().data_ptr()
            assert not (moment and shared), key


def test_what_else_a_run_keeps_is_written_once_and_found_by_its_prefix(tmp_path):
    run = Run(recipe())
    extra = {"a/one": torch.arange(3, dtype=torch.int32), "a/two": torch.tensor(5), "b/one": torch.zeros(2)}
    plain = collect(run.engine, 0, 1, CPU)
    files = collect(run.engine, 0, 1, CPU, extra)
    assert {name: set(tensors) - set(plain[name]) for name, tensors in files.items()} == {
        name: {f"extra/{one}" for one in extra} if name == "shared.safetensors" else set() for name in plain
    }
    assert not any(
        name.startswith("extra/") for tensors in collect(run.engine, 1, 1, CPU, extra).values() for name in tensors
    )
    path = CheckpointStore(tmp_path, OneRank(), 9).save(0, files, {"optimizer_steps": 0})
    found = read_extra(Checkpoint.open(path), "a/")
    assert set(found) == {"one", "two"}
    assert found["one"].dtype == torch.int32
    assert found["one"].tolist() == [0, 1, 2]
    assert int(found["two"]) == 5
    assert read_extra(Checkpoint.open(path), "c/") == {}
    run.load(path)  # and is in nobody's way


def test_saving_disturbs_nothing(tmp_path):
    settings = recipe()
    expected = Run(settings).train(3)
    saving, found = Run(settings), []
    for _ in range(3):
        found += saving.train(1)
        saving.save(tmp_path)
    assert found == expected


def test_a_second_checkpoint_of_a_resumed_run_is_the_same_as_the_uninterrupted_runs(tmp_path):
    settings = recipe()
    whole = Run(settings)
    whole.train(2)
    middle = whole.save(tmp_path / "a")
    whole.train(2)
    end = Checkpoint.open(whole.save(tmp_path / "a"))
    again = resumed(settings, middle)
    again.train(2)
    assert Checkpoint.open(again.save(tmp_path / "b")).files == end.files, "the same bytes"


def test_experts_are_stored_one_by_one_and_the_rest_once(tmp_path):
    run = Run(recipe())
    run.train(1)
    checkpoint = Checkpoint.open(run.save(tmp_path))
    bank = run.model.model.layers[1].moe.bank.experts
    prefix = "model.layers.1.moe.bank.experts"
    for expert in range(8):
        for name in ("w_in", "b_in", "w_out", "b_out"):
            assert torch.equal(checkpoint.tensor(f"weight/{prefix}.{expert}.{name}"), getattr(bank, name)[expert])
            assert checkpoint.tensor(f"exp_avg_sq/{prefix}.{expert}.{name}").shape == getattr(bank, name)[expert].shape
    assert set(checkpoint.files) == {
        "shared.safetensors",
        "experts-00000-00007.safetensors",
        "rank-00000.safetensors",
    }
    assert not [name for name in checkpoint.tensors if name.startswith("weight/lm_head")], "tied to the embedding"


def test_frozen_parameters_have_no_moments(tmp_path):
    run = Run(recipe())
    run.train(1)
    tensors = Checkpoint.open(run.save(tmp_path)).tensors
    frozen = [name for name, parameter in run.model.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 4
    for name in frozen:
        assert f"weight/{name}" in tensors
        assert f"exp_avg/{name}" not in tensors


def test_moments_come_back(tmp_path):
    run = Run(recipe())
    run.train(2)
    again = resumed(recipe(), run.save(tmp_path))
    compared = 0
    for (name, one), (_, other) in zip(run.model.named_parameters(), again.model.named_parameters(), strict=True):
        before, after = run.engine.read_state(one), again.engine.read_state(other)
        assert before.keys() == after.keys()
        for key in before:
            assert torch.equal(before[key], after[key]), f"{key} of {name}"
            compared += bool(key != "weight" and before[key].any())
    assert compared > 20
    assert again.engine.optimizer_steps() == 2


def test_weights_alone_can_be_loaded(tmp_path):
    run = Run(recipe())
    run.train(1)
    other = build_model(recipe().model_copy(update={"seed": 8}), VOCABULARY)
    load_weights(other, Checkpoint.open(run.save(tmp_path)))
    for name, value in run.model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"d_model": 32}, "model.embed_tokens.weight"),
        ({"d_ff": 40}, "model.layers.0.feed_forward.w_in.weight"),
        ({"num_layers": 3}, "model.layers.2"),
        ({"moe": {"d_ff": 24}}, "model.layers.1.moe.bank.experts.w_in"),
        ({"moe": {"num_experts": 12}}, "model.layers.1.moe.bank.experts.8.w_in|model.layers.1.moe.router"),
        ({"positions": "learned"}, "model.embed_positions.weight"),
    ],
)
def test_another_model_is_refused_by_the_name_of_a_tensor(tmp_path, change, tensor):
    run = Run(recipe())
    run.train(1)
    path = run.save(tmp_path)
    for load in (
        lambda: Run(recipe(**change)).load(path),
        lambda: load_weights(build_model(recipe(**change), VOCABULARY), Checkpoint.open(path)),
    ):
        with pytest.raises(CheckpointError, match=f"({tensor}).*belongs to another model"):
            load()


def test_another_router_is_refused(tmp_path):
    path = Run(recipe("top_k")).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"router\..*belongs to another model"):
        Run(recipe("hyper_router")).load(path)


def test_a_rank_that_was_not_there_seeds_its_generators(tmp_path):
    run = Run(recipe())
    run.train(1)
    checkpoint = Checkpoint.open(run.save(tmp_path))
    drawn = []
    for rank in (1, 2, 1):
        restore(run.engine, checkpoint, rank, 7, CPU)
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[2] != drawn[1]


def test_nothing_is_pickled():
    package = Path(smoe_train.__file__).parent
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in package.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PICKLE.search(line.partition("#")[0])
    ]
    assert found == []


@pytest.mark.parametrize("line", ["torch.load(x)", "import pickle", "np.load(x, allow_pickle=True)", "yaml.load(x)"])
def test_the_ban_finds_what_it_should(line):
    assert PICKLE.search(line)
    assert not PICKLE.search(line.replace("load", "safe_load").replace("pickle", "tickle"))
