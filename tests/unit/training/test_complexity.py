"""What is recorded of each sample, and the orders that the trainer makes of it, in one process."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import tiny_recipe

from smoe_train.assembly import build_batches, build_trainer, check_identity, open_journal
from smoe_train.checkpoint import Checkpoint, read_extra
from smoe_train.config import merge
from smoe_train.data import prepare
from smoe_train.data.batches.curriculum_order import easy_first
from smoe_train.data.batches.loader import FixedBlocks, MicroBatch, TrainBatches, block_order
from smoe_train.errors import CheckpointError, DataError
from smoe_train.parallel.process import Process
from smoe_train.schedules import SampleOrderConfig
from smoe_train.training.complexity import ComplexityRecorder, SampleOrder

CPU = torch.device("cpu")
LAYERS = (1, 3)


def alone(values):
    return values.clone()


def micro_batch(blocks, mask):
    blocks = torch.tensor(blocks)
    return MicroBatch(
        torch.zeros(mask.shape), torch.zeros(mask.shape), mask, torch.arange(len(blocks)), blocks, 1.0, 1.0
    )


def recount(passes, num_samples):
    """A8, token by token: what each sample's last column and shares must be."""
    hard = np.zeros((num_samples, len(LAYERS)), dtype=np.int64)
    real = np.zeros((num_samples, 1), dtype=np.int64)
    for batch, experts in passes:
        for row, block in enumerate(batch.block_B.tolist()):
            for s in range(batch.token_mask_BS.shape[1]):
                if batch.token_mask_BS[row, s]:
                    real[block] += 1
                    for column, layer in enumerate(LAYERS):
                        flat = experts[layer].reshape(batch.token_mask_BS.shape)
                        hard[block, column] += int(flat[row, s]) > 1
    return np.concatenate([hard, real], axis=1)


@st.composite
def passes(draw, num_samples=6, length=4):
    """Micro-batches with padding, in sequences of full or half length, samples perhaps twice."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        blocks = draw(st.lists(st.integers(0, num_samples - 1), min_size=2, max_size=2))
        mask = torch.rand(2, length, generator=generator) < 0.8
        parts = draw(st.sampled_from([1, 2]))
        experts = {
            layer: (torch.randint(1, 4, (2, length), generator=generator) * mask).view(2 * parts, length // parts)
            for layer in LAYERS
        }
        found.append((micro_batch(blocks, mask), experts))
    return found


@settings(deadline=None, max_examples=80)
@given(passes(), st.integers(1, 3))
def test_counts_equal_a_recount_and_do_not_depend_on_the_ranks(steps, world_size):
    """A8: entries in [0, 1], equal to a recount; the sum over ranks is one rank's value. A7: padding is nothing."""
    expected = recount(steps, 6)
    one = ComplexityRecorder(6, LAYERS, CPU, alone)
    ranks = [ComplexityRecorder(6, LAYERS, CPU, lambda _: sum(r.counts for r in ranks)) for _ in range(world_size)]
    for number, (batch, experts) in enumerate(steps):
        one.add(batch, experts)
        ranks[number % world_size].add(batch, experts)
    assert one.counted().tolist() == expected.tolist()
    assert all(rank.counted().tolist() == expected.tolist() for rank in ranks)
    one.close()
    shares = one.complexity()
    assert shares.shape == (6, len(LAYERS))
    seen = expected[:, -1] > 0
    np.testing.assert_array_equal(shares[seen], expected[seen, :-1] / expected[seen, -1:])
    assert np.isnan(shares[~seen]).all()
    assert ((shares[seen] >= 0.0) & (shares[seen] <= 1.0)).all()


def test_a_sample_that_was_not_seen_again_keeps_its_record():
    recorder = ComplexityRecorder(3, LAYERS, CPU, alone)
    mask = torch.ones(2, 2, dtype=torch.bool)
    one_hard, all_hard = torch.tensor([[1, 2], [1, 1]]), torch.tensor([[2, 2], [3, 2]])
    recorder.add(micro_batch([0, 1], mask), {1: one_hard, 3: all_hard})
    recorder.close()
    nothing = float("nan")
    np.testing.assert_array_equal(recorder.complexity(), [[0.5, 1.0], [0.0, 1.0], [nothing, nothing]])
    recorder.add(micro_batch([2, 1], mask), {1: all_hard, 3: one_hard})
    np.testing.assert_array_equal(recorder.complexity()[2], [nothing, nothing])
    recorder.close()
    np.testing.assert_array_equal(recorder.complexity(), [[0.5, 1.0], [1.0, 0.0], [1.0, 0.5]])


def sample_order(batches, recorder, by="mean_ratio", **options):
    config = SampleOrderConfig(by=by, **options)
    return SampleOrder(config, batches, recorder, True, lambda order: order)


def test_the_note_says_what_came_of_it():
    batches = TrainBatches(FixedBlocks(np.arange(9, dtype=np.uint16), 2), 2, 2, seed=0)
    recorder = ComplexityRecorder(4, (0,), CPU, alone)
    experts = torch.tensor([[1, 1], [2, 2], [2, 2], [1, 2]])
    recorder.add(micro_batch([0, 1, 2, 3], torch.ones(4, 2, dtype=torch.bool)), {0: experts})
    order = sample_order(batches, recorder)
    found = order.of_epoch(1)
    assert found.tolist()[:2] == [0, 3]
    assert sorted(found.tolist()[2:]) == [1, 2]
    shares = np.array([0.0, 1.0, 1.0, 0.5])
    shuffled = shares[block_order(4, 0, 1)].reshape(2, 2).std(axis=1).mean()
    assert order.note == (
        "epoch 2: samples ordered by mean_ratio; share of tokens with several experts by sample: min 0.0000, median "
        f"0.7500, max 1.0000; deviation within a batch 0.1250 ({shuffled:.4f} if shuffled)"
    )


def test_only_the_first_rank_makes_the_order():
    batches = TrainBatches(FixedBlocks(np.arange(9, dtype=np.uint16), 2), 2, 2, seed=0)
    sent = []

    def from_first(order):
        sent.append(order)
        return np.array([3, 1, 2, 0])

    recorder = ComplexityRecorder(4, (0,), CPU, alone)
    other = SampleOrder(SampleOrderConfig(), batches, recorder, False, from_first)
    assert other.of_epoch(1).tolist() == [3, 1, 2, 0]
    assert sent == [None]


# The trainer

BLOCKS = 22  # of 16 tokens; 8 a step: epochs begin in the middle of steps 2, 5 and 8


@pytest.fixture(scope="module")
def short_text(text, tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "corpus.txt"
    path.write_text(text.read_text()[:450])
    return path


def recipe_of(path, **sections):
    base = {
        "parallel": {"engine": "local"},
        "data": {"valid_fraction": 0.2, "test_fraction": 0.0},
        "training": {"max_steps": 9, "self_test": False},
        "model": {"moe": {"router": {"type": "adaptive", "base": {"type": "top_k", "init_std": 1.0}}}},
        "checkpoint": {"every_steps": 1, "keep_last": 20},
        "curriculum": {"order": {"by": "mean_ratio"}},
    }
    return tiny_recipe(path, 1, **merge(base, sections))


def run(recipe, folder, checkpoint=None):
    """Trains; returns the trainer, the blocks of each step in order, and the experts of each token by pass."""
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(recipe, Process.alone(), folder)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    notes, steps, seen = [], [], []
    trainer.journal = SimpleNamespace(metrics=lambda _: None, routing=lambda _: None, note=notes.append)
    real = trainer.task.objective

    def objective(forward, batch, knobs, totals):
        found = real(forward, batch, knobs, totals)
        if totals is None or not totals._collecting:
            if not steps or steps[-1][0] != knobs.step:
                steps.append((knobs.step, {}))
            pairs = zip(batch.sample_index_B.tolist(), batch.block_B.tolist(), strict=True)
            steps[-1][1].update(pairs)
            seen.append((knobs.step, batch, found.output.experts_of_token))
        return found

    trainer.task.objective = objective
    trainer.train()
    return trainer, {step: [blocks[j] for j in sorted(blocks)] for step, blocks in steps}, seen, notes


@pytest.fixture(scope="module")
def whole(short_text, tmp_path_factory):
    return run(recipe_of(short_text), tmp_path_factory.mktemp("whole") / "run")


def test_each_epoch_is_a_permutation_in_the_order_of_what_was_recorded_before(whole):
    """A9 and A8 through the real trainer: the order follows from a recount of the steps before, token by token."""
    trainer, steps, seen, _ = whole
    assert trainer.batches.num_blocks == BLOCKS
    stream = [block for step in sorted(steps) for block in steps[step]]
    assert stream[:BLOCKS] == block_order(BLOCKS, 7, 0).tolist()
    record, last = np.full((BLOCKS, 2), np.nan), 0
    for epoch in (1, 2, 3):
        first = epoch * BLOCKS // 8
        hard, real = np.zeros((BLOCKS, 2)), np.zeros((BLOCKS, 1))
        for step, batch, experts in seen:
            if last <= step < first:
                for row, block in enumerate(batch.block_B.tolist()):
                    real[block] += 16
                    for layer in (0, 1):
                        hard[block, layer] += sum(count >= 2 for count in experts[layer][row].tolist())
        last = first
        record = np.where(real > 0, hard / np.maximum(real, 1), record)
        expected = easy_first(record, block_order(BLOCKS, 7, epoch), "mean_ratio")
        found = stream[epoch * BLOCKS : (epoch + 1) * BLOCKS]
        assert found == expected.tolist()[: len(found)]
        assert found != block_order(BLOCKS, 7, epoch).tolist()[: len(found)]
        if epoch < 3:
            assert sorted(found) == list(range(BLOCKS))


def test_each_new_order_is_noted(whole):
    _, _, _, notes = whole
    found = [note for note in notes if "ordered" in note]
    assert [note.partition(":")[0] for note in found] == ["epoch 2", "epoch 3", "epoch 4"]
    assert all("ordered by mean_ratio" in note for note in found)


@pytest.mark.parametrize(("step", "num_workers"), [*((step, 0) for step in range(1, 9)), (4, 2), (5, 2)])
def test_a_run_resumed_anywhere_goes_on_bit_by_bit(whole, short_text, tmp_path, step, num_workers):
    """A9: resumable in the middle of an epoch, at its first step and where one ends within a step."""
    trainer, steps, _, _ = whole
    checkpoint = Checkpoint.open(trainer.store.folder / f"step-{step:08d}")
    again, after, _, _ = run(recipe_of(short_text, loader={"num_workers": num_workers}), tmp_path / "run", checkpoint)
    assert after == {number: blocks for number, blocks in steps.items() if number >= step}
    last = Checkpoint.open(again.store.find("latest"))
    assert last.files == Checkpoint.open(trainer.store.find("latest")).files, "the same bytes at the end"


def test_an_accumulated_batch_and_shorter_sequences_are_counted_once(short_text, tmp_path):
    """The pass ahead of the step is no training; parts of a sample add up."""
    sections = {"curriculum": {"sequence_length": {"low": 4, "steps": 6}}, "training": {"max_steps": 3}}
    trainer, _, seen, _ = run(recipe_of(short_text, **sections), tmp_path / "run")
    assert trainer.batches.accumulation_steps > 1
    assert seen[0][2][0].shape == (2 * 4, 4), "the first steps are cut into four"
    saved = read_extra(Checkpoint.open(trainer.store.find("latest")), "sample_order/")
    total = saved["record"] + saved["counted"]
    assert saved["record"][:, -1].unique().tolist() == [0, 16]
    assert int(total[:, -1].sum()) == 3 * 8 * 16
    hard = sum(int((experts[layer] >= 2).sum()) for _, _, experts in seen for layer in (0, 1))
    assert int(total[:, :-1].sum()) == hard > 0


def test_without_the_section_nothing_is_saved_and_the_order_is_shuffled(short_text, tmp_path):
    recipe = recipe_of(short_text, curriculum={"order": None})
    trainer, steps, _, notes = run(recipe, tmp_path / "run")
    stream = [block for step in sorted(steps) for block in steps[step]]
    assert stream == [int(b) for epoch in range(4) for b in block_order(BLOCKS, 7, epoch)][: len(stream)]
    checkpoint = Checkpoint.open(trainer.store.find("latest"))
    assert not [name for name in checkpoint.tensors if name.startswith("extra/")]
    assert not [key for key in trainer.identity if "order" in key]
    assert not [note for note in notes if "ordered" in note]


def test_the_section_cannot_come_or_go_in_the_middle_of_a_run(whole, short_text):
    trainer, _, _, _ = whole
    checkpoint = Checkpoint.open(trainer.store.find("latest"))
    tokens = prepare(recipe_of(short_text).data, recipe_of(short_text).tokenizer)
    check_identity(recipe_of(short_text, curriculum={"order": {"by": "l2"}}), tokens, checkpoint)
    with pytest.raises(CheckpointError, match=r"curriculum\.order"):
        check_identity(recipe_of(short_text, curriculum={"order": None}), tokens, checkpoint)


def test_a_checkpoint_of_something_else_is_refused(whole, short_text, tmp_path):
    trainer, _, _, _ = whole
    checkpoint = Checkpoint.open(trainer.store.find("latest"))
    batches = trainer.batches
    for samples, layers in ((BLOCKS + 1, (0, 1)), (BLOCKS, (0,))):
        order = sample_order(batches, ComplexityRecorder(samples, layers, CPU, alone))
        with pytest.raises(CheckpointError, match="of other data or of another model"):
            order.restore(checkpoint)
    plain, _, _, _ = run(recipe_of(short_text, curriculum={"order": None}, training={"max_steps": 1}), tmp_path / "run")
    order = sample_order(batches, ComplexityRecorder(BLOCKS, (0, 1), CPU, alone))
    with pytest.raises(CheckpointError, match=r"written without curriculum\.order"):
        order.restore(Checkpoint.open(plain.store.find("latest")))


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_training_that_ends_in_the_first_epoch_is_refused(short_text, max_steps):
    recipe = recipe_of(short_text, training={"max_steps": max_steps})
    tokens = prepare(recipe.data, recipe.tokenizer)
    if max_steps == 3:  # its third step ends the first epoch and begins the second
        assert build_batches(recipe, tokens, 0, 1).train.epochs_of(2) == range(2)
        return
    with pytest.raises(DataError, match=rf"max_steps {max_steps} ends in the first epoch.*22 samples.*2 steps"):
        build_batches(recipe, tokens, 0, 1)


def test_the_journal_takes_the_note(short_text, tmp_path, capfd):
    recipe = recipe_of(short_text, training={"max_steps": 3})
    trainer = build_trainer(recipe, Process.alone(), tmp_path)
    trainer.journal = open_journal(recipe, tmp_path, None)
    trainer.train()
    trainer.journal.close()
    assert "epoch 2: samples ordered by mean_ratio" in capfd.readouterr().err.replace("\n", " ")
