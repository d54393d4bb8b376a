import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.data.batches.block_order import block_order, by_length_in_windows, splitmix64

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


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(2, 5), st.integers(0, 7), st.integers(0, 2**32))
def test_windows_hold_the_same_samples_sorted_by_length_in_shuffled_batches(batch, more, window, epoch, seed):
    count = batch + more
    lengths = np.random.default_rng(seed).integers(1, 20, count)
    shuffled = block_order(count, seed, epoch)
    order = by_length_in_windows(shuffled, lengths, batch, window, seed, epoch)
    # Samples of earlier epochs fill the first batches; this epoch has whole batches from the next multiple on.
    first = next(place for place in range(batch) if (epoch * count + place) % batch == 0)
    whole = max(count - first, 0) // batch
    last = first + whole * batch
    if first < count:
        assert order[:first].tolist() == shuffled[:first].tolist()
        assert order[last:].tolist() == shuffled[last:].tolist()
    for start in range(first, last, window * batch):
        stop = min(start + window * batch, last)
        by_length = sorted(shuffled[start:stop].tolist(), key=lambda sample: lengths[sample])
        batches = [by_length[place : place + batch] for place in range(0, len(by_length), batch)]
        found = [order[place : place + batch].tolist() for place in range(start, stop, batch)]
        assert sorted(found) == sorted(batches)
    assert sorted(order.tolist()) == list(range(count))


def test_a_window_of_one_batch_is_the_shuffled_order():
    shuffled = block_order(30, 1, 2)
    assert by_length_in_windows(shuffled, np.arange(30), 4, 1, 1, 2).tolist() == shuffled.tolist()


def test_batches_of_a_window_come_in_another_order_in_each_epoch_and_with_each_seed():
    """Twelve batches of one sample: only the shuffling of batches is left, and it follows no length."""
    lengths = np.arange(12)
    orders = {
        tuple(by_length_in_windows(np.arange(12), lengths, 1, 12, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(range(12)) not in orders
