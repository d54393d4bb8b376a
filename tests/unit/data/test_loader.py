import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.data.loader import (
    IGNORED_LABEL,
    EvaluationBatches,
    MicroBatch,
    TrainBatches,
    block_order,
    splitmix64,
)
from smoe_train.errors import DataError

MASK = (1 << 64) - 1


def slow_splitmix64(key, count):
    """Vigna's C code, word for word, in unbounded integers."""
    state, values = key & MASK, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        values.append(z ^ (z >> 31))
    return values


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in ("input_ids_BS", "labels_BS", "token_mask_BS", "sample_index_B", "block_B")
    )


def numbered(count):
    """A split in which each token is its own position."""
    return np.arange(count, dtype=np.uint16)


def test_splitmix64_gives_the_published_sequence():
    # The test vector that implementations in many languages share.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, 4).tolist() == published
    assert int(splitmix64(0, 1)[0]) == 0xE220A8397B1DCDAF


@given(st.integers(1, 300), st.integers(-(2**63), 2**64), st.integers(0, 10**6))
def test_block_order_is_the_stable_order_of_hashes(num_blocks, seed, epoch):
    key = slow_splitmix64(slow_splitmix64(seed, 1)[0] ^ epoch, 1)[0]
    hashes = slow_splitmix64(key, num_blocks)
    order = block_order(num_blocks, seed, epoch)
    assert order.tolist() == sorted(range(num_blocks), key=lambda i: (hashes[i], i))
    assert order.dtype == np.int64
    assert not order.flags.writeable


def test_block_order_changes_with_seed_and_epoch():
    orders = {tuple(block_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@st.composite
def layouts(draw):
    world, micro, accumulation = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    global_batch, length = world * micro * accumulation, draw(st.integers(1, 9))
    blocks = draw(st.integers(global_batch, 3 * global_batch + 5))
    tail = draw(st.integers(1, length))
    return world, micro, global_batch, length, blocks, blocks * length + tail


def samples(tokens, length, global_batch, micro, seed, world, first, last):
    """Inputs and labels of each step, in the order of the global batch, gathered from all ranks."""
    ranks = [TrainBatches(tokens, length, global_batch, micro, seed, rank, world) for rank in range(world)]
    for step in range(first, last):
        rows = {}
        for batches in ranks:
            assert len(batches[step]) == batches.accumulation_steps == global_batch // (world * micro)
            for micro_batch in batches[step]:
                assert micro_batch.input_ids_BS.shape == (micro, length)
                assert micro_batch.input_ids_BS.dtype == micro_batch.labels_BS.dtype == torch.int64
                assert micro_batch.token_mask_BS.dtype == torch.bool
                assert micro_batch.token_mask_BS.all()
                for b, j in enumerate(micro_batch.sample_index_B.tolist()):
                    assert j not in rows
                    rows[j] = micro_batch.input_ids_BS[b].tolist(), micro_batch.labels_BS[b].tolist()
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
    batches = TrainBatches(numbered(500), 8, 6, 3, seed=5, num_workers=num_workers)
    expected = [TrainBatches(numbered(500), 8, 6, 3, seed=5)[step] for step in range(25)]
    for first in (0, 9, 24, 25):
        got = list(batches.steps(first, 25))
        assert len(got) == 25 - first
        assert all(same(one, other) for one, other in zip(got, expected[first:], strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_generators_alone(num_workers):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is checked
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(TrainBatches(numbered(100), 4, 2, 1, seed=0, num_workers=num_workers).steps(0, 3))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_a_pickled_loader_reopens_its_memory_map_instead_of_copying_it(tmp_path):
    numbered(5000).tofile(tmp_path / "train.bin")
    tokens = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    batches = TrainBatches(tokens, 8, 4, 2, seed=1)
    data = pickle.dumps(batches)
    assert len(data) < 2000
    assert same(pickle.loads(data)[3], batches[3])
    piece = TrainBatches(tokens[100:900], 8, 4, 2, seed=1)
    assert same(pickle.loads(pickle.dumps(piece))[3], piece[3])


def test_large_ids_and_moving_to_a_device():
    tokens = np.full(100, 70_000, dtype=np.uint32)
    micro_batch = TrainBatches(tokens, 8, 2, 2, seed=1)[0][0].to("cpu")
    assert micro_batch.labels_BS.unique().tolist() == [70_000]


def test_a_split_that_is_too_short_is_an_error_that_says_how_much_is_needed():
    TrainBatches(numbered(4 * 8 + 1), 8, 4, 2, seed=0)
    with pytest.raises(DataError, match=r"32 tokens.*4 different blocks of 8 tokens \(33\)"):
        TrainBatches(numbered(4 * 8), 8, 4, 2, seed=0)
    with pytest.raises(DataError, match="1 tokens"):
        EvaluationBatches(numbered(1), 8, 2)


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match=r"6 is not a multiple of world_size 2 \* micro_batch_size 2"):
        TrainBatches(numbered(100), 4, 6, 2, seed=0, rank=1, world_size=2)


@settings(deadline=None)
@given(
    st.integers(2, 200),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.none() | st.integers(1, 250),
)
def test_evaluation_predicts_every_token_once_and_ranks_stay_in_lockstep(count, length, micro, world, max_tokens):
    tokens = np.random.default_rng(count).permutation(count).astype(np.uint16)
    predictable = min(count - 1, max_tokens or count)
    labels, indices, lengths = [], [], set()
    for rank in range(world):
        batches = EvaluationBatches(tokens, length, micro, rank, world, max_tokens)
        micro_batches = list(batches)
        assert batches.predicted_tokens == predictable
        lengths |= {len(batches), len(micro_batches)}
        for batch in micro_batches:
            assert batch.input_ids_BS.shape == batch.labels_BS.shape == (micro, length)
            mask = batch.token_mask_BS
            assert ((batch.labels_BS == IGNORED_LABEL) == ~mask).all()
            assert (batch.input_ids_BS[~mask] == 0).all()
            indices += batch.sample_index_B.tolist()
            place = {int(token): i for i, token in enumerate(tokens)}
            for token, label in zip(batch.input_ids_BS[mask].tolist(), batch.labels_BS[mask].tolist(), strict=True):
                assert tokens[place[token] + 1] == label
                labels.append(label)
    assert sorted(labels) == sorted(tokens[1 : 1 + predictable].tolist())
    assert len(lengths) == 1
    assert sorted(indices) == list(range(len(indices)))


def test_each_sample_says_which_block_it_is():
    batches = TrainBatches(numbered(60), 5, 4, 2, seed=3)
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
    batches = TrainBatches(numbered(blocks + 1), 1, global_batch, 1, seed=0)
    samples = range(step * global_batch, (step + 1) * global_batch)
    assert list(batches.epochs_of(step)) == sorted({g // blocks for g in samples})
    first = batches.first_step_of(epoch)
    assert epoch in batches.epochs_of(first)
    assert epoch not in batches.epochs_of(first - 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("blocks", [12, 13, 16, 6], ids="{} blocks".format)
def test_orders_are_asked_for_one_by_one_when_the_steps_before_are_done(blocks, num_workers):
    """Epoch 1 begins in the step that has its first sample, also where that step ends epoch 0; no block is lost."""
    batches = TrainBatches(numbered(4 * blocks + 1), 4, 6, 3, seed=5, num_workers=num_workers)
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
    whole = [*TrainBatches(numbered(53), 4, 6, 3, 5).steps(0, steps, lambda epoch: backwards(blocks, 5, epoch))]
    for first in range(1, steps):
        batches = TrainBatches(numbered(53), 4, 6, 3, 5, num_workers=num_workers)
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
    ranks = [TrainBatches(numbered(53), 4, 6, micro, 5, rank, world) for rank in range(world)]
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


# Shorter sequences


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_cutting_sequences_keeps_every_token_and_its_place_in_the_global_batch(samples, parts, length):
    full = parts * length
    shape = (samples, full)
    ids = torch.arange(samples * full).view(shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(full)) < 0.7
    index, block = torch.arange(samples) * 3 + 1, torch.arange(samples) + 40
    cut = MicroBatch(ids, ids + 1, mask, index, block).in_sequences_of(length)
    assert cut.input_ids_BS.shape == cut.labels_BS.shape == cut.token_mask_BS.shape == (samples * parts, length)
    for row in range(samples * parts):
        sample, part = divmod(row, parts)
        piece = slice(part * length, (part + 1) * length)
        assert cut.input_ids_BS[row].tolist() == ids[sample, piece].tolist()
        assert cut.labels_BS[row].tolist() == (ids + 1)[sample, piece].tolist()
        assert cut.token_mask_BS[row].tolist() == mask[sample, piece].tolist()
        assert int(cut.block_B[row]) == 40 + sample
        # What keys routing noise: sample_index * length + position is what it was with full sequences.
        position = torch.arange(length)
        before = (3 * sample + 1) * full + torch.arange(full)[piece]
        assert (cut.sample_index_B[row] * length + position).tolist() == before.tolist()
