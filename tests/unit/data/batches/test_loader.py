import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.example_stand_in import examples

from smoe_train.data.batches.loader import (
    IGNORED_LABEL,
    FixedBlocks,
    PackedDocuments,
    TrainBatches,
    block_order,
)
from smoe_train.errors import DataError


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in ("input_ids_BS", "labels", "token_mask_BS", "sample_index_B", "block_B")
    )


def numbered(count):
    """A split in which each token is its own position."""
    return np.arange(count, dtype=np.uint16)


@st.composite
def layouts(draw):
    world, micro, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    global_batch, length = world * micro * accumulation, draw(st.integers(1, 9))
    blocks = draw(st.integers(global_batch, 3 * global_batch + 5))
    tail = draw(st.integers(1, length))
    return world, micro, global_batch, length, blocks, blocks * length + tail


def samples(tokens, length, global_batch, micro, seed, world, first, last):
    """Inputs and labels of each step, in the order of the global batch, gathered from all ranks."""
    ranks = [TrainBatches(FixedBlocks(tokens, length), global_batch, micro, seed, rank, world) for rank in range(world)]
    for step in range(first, last):
        rows = {}
        for batches in ranks:
            assert len(batches[step]) == batches.accumulation_steps == global_batch // (world * micro)
            for micro_batch in batches[step]:
                assert micro_batch.input_ids_BS.shape == (micro, length)
                assert micro_batch.input_ids_BS.dtype == micro_batch.labels.dtype == torch.int64
                assert micro_batch.token_mask_BS.dtype == torch.bool
                assert micro_batch.token_mask_BS.all()
                for b, j in enumerate(micro_batch.sample_index_B.tolist()):
                    assert j not in rows
                    rows[j] = micro_batch.input_ids_BS[b].tolist(), micro_batch.labels[b].tolist()
        assert sorted(rows) == list(range(global_batch))
        yield [rows[j] for j in range(global_batch)]


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 2**32))
def test_every_epoch_has_every_block_exactly_once(layout, seed):
    world, micro, global_batch, length, blocks, count = layout
    steps = -(-2 * blocks // global_batch)
    stream = [
        row for step in samples(numbered(count), length, global_batch, micro, seed, world, 0, steps) for row in step
    ]
    for epoch in range(2):
        rows = stream[epoch * blocks : (epoch + 1) * blocks]
        inputs = [row[0] for row in rows]
        assert inputs == [list(range(i * length, (i + 1) * length)) for i in block_order(blocks, seed, epoch)]
        # Nothing repeated, nothing skipped: inputs cover [0, blocks * S) and labels [1, blocks * S].
        assert sorted(token for row in inputs for token in row) == list(range(blocks * length))
        assert sorted(token for row in rows for token in row[1]) == list(range(1, blocks * length + 1))
        assert all([token + 1 for token in row[0]] == row[1] for row in rows)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 50))
def test_a_step_has_the_same_samples_for_any_world_size(seed, step):
    tokens = np.random.default_rng(0).integers(0, 256, 700, dtype=np.uint8)
    one = list(samples(tokens, 7, 12, 12, seed, 1, step, step + 2))
    for world, micro in [(1, 3), (2, 3), (2, 6), (3, 1), (4, 3), (6, 2)]:
        assert list(samples(tokens, 7, 12, micro, seed, world, step, step + 2)) == one


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_resuming_at_any_step_with_any_number_of_workers_continues_the_series(num_workers):
    batches = TrainBatches(FixedBlocks(numbered(500), 8), 6, 3, seed=5, num_workers=num_workers)
    expected = [TrainBatches(FixedBlocks(numbered(500), 8), 6, 3, seed=5)[step] for step in range(25)]
    for first in (0, 9, 24, 25):
        got = list(batches.steps(first, 25))
        assert len(got) == 25 - first
        assert all(same(one, other) for one, other in zip(got, expected[first:], strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_generators_alone(num_workers):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is checked
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(TrainBatches(FixedBlocks(numbered(100), 4), 2, 1, seed=0, num_workers=num_workers).steps(0, 3))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_a_pickled_loader_reopens_its_memory_map_instead_of_copying_it(tmp_path):
    numbered(5000).tofile(tmp_path / "train.bin")
    tokens = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    batches = TrainBatches(FixedBlocks(tokens, 8), 4, 2, seed=1)
    data = pickle.dumps(batches)
    assert len(data) < 2000
    assert same(pickle.loads(data)[3], batches[3])
    piece = TrainBatches(FixedBlocks(tokens[100:900], 8), 4, 2, seed=1)
    assert same(pickle.loads(pickle.dumps(piece))[3], piece[3])


def test_large_ids_and_moving_to_a_device():
    tokens = np.full(100, 70_000, dtype=np.uint32)
    micro_batch = TrainBatches(FixedBlocks(tokens, 8), 2, 2, seed=1)[0][0].to("cpu")
    assert micro_batch.labels.unique().tolist() == [70_000]


def test_a_split_that_is_too_short_is_an_error_that_says_how_much_is_needed():
    TrainBatches(FixedBlocks(numbered(4 * 8 + 1), 8), 4, 2, seed=0)
    with pytest.raises(DataError, match=r"32 tokens.*4 different blocks of 8 tokens \(33\)"):
        TrainBatches(FixedBlocks(numbered(4 * 8), 8), 4, 2, seed=0)


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match=r"6 is not a multiple of world_size 2 \* micro_batch_size 2"):
        TrainBatches(FixedBlocks(numbered(100), 4), 6, 2, seed=0, rank=1, world_size=2)


def test_each_sample_says_which_block_it_is():
    batches = TrainBatches(FixedBlocks(numbered(60), 5), 4, 2, seed=3)
    for step in range(8):
        for micro_batch in batches[step]:
            assert (micro_batch.input_ids_BS[:, 0] == 5 * micro_batch.block_B).all()


# Orders that are made on the way


def backwards(num_blocks, seed, epoch):
    """A stand-in for an order by difficulty: not the shuffled one, different in each epoch."""
    return block_order(num_blocks, seed, epoch)[::-1].copy()


def blocks_of(micro_batches):
    """The blocks of a step of one rank, in the order of the global batch."""
    pairs = [
        pair
        for batch in micro_batches
        for pair in zip(batch.sample_index_B.tolist(), batch.block_B.tolist(), strict=True)
    ]
    return [block for _, block in sorted(pairs)]


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 12), st.integers(0, 30), st.integers(1, 40), st.integers(0, 40))
def test_epochs_and_first_steps(global_batch, more_blocks, epoch, step):
    blocks = global_batch + more_blocks
    batches = TrainBatches(FixedBlocks(numbered(blocks + 1), 1), global_batch, 1, seed=0)
    samples = range(step * global_batch, (step + 1) * global_batch)
    assert list(batches.epochs_of(step)) == sorted({g // blocks for g in samples})
    first = batches.first_step_of(epoch)
    assert epoch in batches.epochs_of(first)
    assert epoch not in batches.epochs_of(first - 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("blocks", [12, 13, 16, 6], ids="{} blocks".format)
def test_orders_are_asked_for_one_by_one_when_the_steps_before_are_done(blocks, num_workers):
    """Epoch 1 begins in the step that has its first sample, also where that step ends epoch 0; no block is lost."""
    batches = TrainBatches(FixedBlocks(numbered(4 * blocks + 1), 4), 6, 3, seed=5, num_workers=num_workers)
    done, asked = [], []

    def next_order(epoch):
        asked.append((epoch, len(done)))
        return backwards(blocks, 5, epoch)

    steps = 5 * blocks // 6
    for micro_batches in batches.steps(0, steps, next_order):
        done.append(blocks_of(micro_batches))
        assert len(batches.orders) <= 2, "orders of epochs that are over are not kept"
    assert len(done) == steps
    assert asked == [(epoch, epoch * blocks // 6) for epoch in range(1, 6) if epoch * blocks // 6 < steps]
    stream = [block for step in done for block in step]
    expected = list(block_order(blocks, 5, 0))
    for epoch in range(1, 6):
        expected += list(backwards(blocks, 5, epoch))
    assert stream == expected[: len(stream)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_going_on_in_the_middle_of_an_epoch_asks_only_for_what_is_not_there(num_workers):
    blocks, steps = 13, 12
    whole = [
        *TrainBatches(FixedBlocks(numbered(53), 4), 6, 3, 5).steps(0, steps, lambda epoch: backwards(blocks, 5, epoch))
    ]
    for first in range(1, steps):
        batches = TrainBatches(FixedBlocks(numbered(53), 4), 6, 3, 5, num_workers=num_workers)
        newest = batches.epochs_of(first - 1)[-1]  # what a checkpoint after step ``first`` holds
        batches.orders = {newest: backwards(blocks, 5, newest)} if newest else {}
        asked = []

        def next_order(epoch, asked=asked):
            asked.append(epoch)
            return backwards(blocks, 5, epoch)

        got = list(batches.steps(first, steps, next_order))
        assert all(same(one, other) for one, other in zip(got, whole[first:], strict=True))
        assert asked == list(range(newest + 1, batches.epochs_of(steps - 1)[-1] + 1))


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 3), (3, 1), (6, 1)])
def test_samples_next_to_each_other_in_a_given_order_go_to_different_ranks(world, micro):
    blocks = 13
    ranks = [TrainBatches(FixedBlocks(numbered(53), 4), 6, micro, 5, rank, world) for rank in range(world)]
    iterators = [one.steps(0, 6, lambda epoch: backwards(blocks, 5, epoch)) for one in ranks]
    stream = [*block_order(blocks, 5, 0), *backwards(blocks, 5, 1), *backwards(blocks, 5, 2)]
    for step, of_ranks in enumerate(zip(*iterators, strict=True)):
        rank_of = {
            j: rank
            for rank, micro_batches in enumerate(of_ranks)
            for micro_batch in micro_batches
            for j in micro_batch.sample_index_B.tolist()
        }
        assert [rank_of[j] for j in range(6)] == [j % world for j in range(6)]
        found = {
            j: block
            for micro_batches in of_ranks
            for batch in micro_batches
            for j, block in zip(batch.sample_index_B.tolist(), batch.block_B.tolist(), strict=True)
        }
        assert [found[j] for j in range(6)] == stream[6 * step : 6 * step + 6]


# Samples of other kinds


def documents(seed=0):
    """Tokens that are their own positions, and where documents of 1 to 20 of them end."""
    ends = np.cumsum(np.random.default_rng(seed).integers(1, 20, 40))
    return numbered(int(ends[-1])), ends


KINDS = {
    "cut": lambda: PackedDocuments(*documents(), 8, "cut"),
    "best_fit": lambda: PackedDocuments(*documents(), 8, "best_fit"),
    "examples": examples,
}


def step_of_all_ranks(kind, step, world, micro, **options):
    """Every row of a step by its place in the global batch, and the sums of the divisors over all micro-batches."""
    rows, tokens, targets = {}, 0.0, 0.0
    for rank in range(world):
        batches = TrainBatches(KINDS[kind](), 12, micro, 3, rank, world, **options)
        for batch in batches[step]:
            tokens += batch.tokens_per_micro_batch
            targets += batch.targets_per_micro_batch
            for b, place in enumerate(batch.sample_index_B.tolist()):
                assert place not in rows
                document = batch.document_BS
                rows[place] = (
                    batch.input_ids_BS[b].tolist(),
                    batch.labels[b].tolist(),
                    batch.token_mask_BS[b].tolist(),
                    int(batch.block_B[b]),
                    None if document is None else document[b].tolist(),
                )
    return [rows[place] for place in range(12)], tokens, targets, batches


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(step=st.integers(0, 30), data=st.data())
def test_any_kind_of_sample_gives_the_same_step_for_any_world_size(kind, step, data):
    """Rows, their width and the divisors too."""
    window = data.draw(st.sampled_from([1, 3])) if kind == "examples" else 1
    one, tokens, targets, batches = step_of_all_ranks(kind, step, 1, 12, length_window=window)
    real = sum(sum(row[2]) for row in one)
    labels = [label for row in one for label in (row[1] if isinstance(row[1], list) else [row[1]])]
    assert tokens == pytest.approx(real)
    assert batches.tokens_of(step) == real
    assert targets == pytest.approx(sum(label != IGNORED_LABEL for label in labels))
    world, micro = data.draw(st.sampled_from([(1, 3), (2, 3), (2, 6), (3, 1), (4, 3), (6, 2)]))
    other, *sums, _ = step_of_all_ranks(kind, step, world, micro, length_window=window)
    assert other == one
    assert sums == pytest.approx([tokens, targets])


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_has_each_sample_once_whatever_the_window(kind):
    for window in (1, 4) if kind == "examples" else (1,):
        batches = TrainBatches(KINDS[kind](), 5, 5, 3, length_window=window)
        stream = np.concatenate([batches.blocks_of(step) for step in range(3 * batches.num_blocks)])
        for epoch in range(15):
            blocks = stream[epoch * batches.num_blocks : (epoch + 1) * batches.num_blocks]
            assert sorted(blocks.tolist()) == list(range(batches.num_blocks))


def test_a_length_window_saves_padding():
    padded = {
        window: sum(
            batch.token_mask_BS.numel()
            for step in range(20)
            for batch in TrainBatches(examples(400), 10, 10, 0, length_window=window)[step]
        )
        for window in (1, 10)
    }
    assert padded[10] < 0.8 * padded[1]


def test_a_length_window_and_a_given_order_exclude_each_other():
    batches = TrainBatches(examples(), 4, 4, 0, length_window=3)
    with pytest.raises(AssertionError, match="would undo"):
        batches.steps(0, 3, lambda epoch: backwards(37, 0, epoch))
    with pytest.raises(AssertionError, match="no length_window"):
        TrainBatches(FixedBlocks(numbered(100), 4), 4, 4, 0, length_window=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_in_the_middle_of_an_epoch_on_other_ranks_with_other_workers(kind):
    """Steps 0-3 on one rank without workers, 4-6 on two ranks with one each: the samples of one uninterrupted run."""
    window = 2 if kind == "examples" else 1
    whole = TrainBatches(KINDS[kind](), 6, 6, 9, length_window=window)
    assert whole.first_step_of(1) > 4
    expected = [whole.blocks_of(step).tolist() for step in range(7)]
    alone = TrainBatches(KINDS[kind](), 6, 3, 9, length_window=window)
    found = [blocks_of(step) for step in alone.steps(0, 4)]
    ranks = [
        TrainBatches(KINDS[kind](), 6, 1, 9, rank, 2, num_workers=1, length_window=window).steps(4, 7)
        for rank in range(2)
    ]
    found += [blocks_of([*one, *other]) for one, other in zip(*ranks, strict=True)]
    assert found == expected


def test_workers_that_are_not_forked_reopen_the_map(tmp_path):
    """What they get is small, and gives the same batches."""
    tokens, ends = documents()
    tokens.tofile(tmp_path / "train.bin")
    ends.tofile(tmp_path / "train.documents.bin")
    tokens = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    ends = np.memmap(tmp_path / "train.documents.bin", np.int64, "r")
    packed = [PackedDocuments(tokens, ends, 8, fit) for fit in ("cut", "best_fit")]
    for samples in (FixedBlocks(tokens, 8), *packed):
        batches = TrainBatches(samples, 4, 2, seed=1)
        copy = pickle.loads(pickle.dumps(batches))
        assert isinstance(copy.samples.tokens, np.memmap)
        assert isinstance(getattr(copy.samples, "document_ends", ends), np.memmap)
        assert all(same(copy[step], batches[step]) for step in range(5))
