import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smoe_train.data.batches.micro_batch import MicroBatch


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_cutting_sequences_keeps_every_token_and_its_place_in_the_global_batch(samples, parts, length):
    full = parts * length
    shape = (samples, full)
    ids = torch.arange(samples * full).view(shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(full)) < 0.7
    index, block = torch.arange(samples) * 3 + 1, torch.arange(samples) + 40
    document = ids // 2
    cut = MicroBatch(ids, ids + 1, mask, index, block, 5.0, 4.0, document, True).in_sequences_of(length)
    assert cut.input_ids_BS.shape == cut.labels.shape == cut.token_mask_BS.shape == (samples * parts, length)
    assert (cut.tokens_per_micro_batch, cut.targets_per_micro_batch, cut.has_padding) == (5.0, 4.0, True)
    for row in range(samples * parts):
        sample, part = divmod(row, parts)
        piece = slice(part * length, (part + 1) * length)
        assert cut.input_ids_BS[row].tolist() == ids[sample, piece].tolist()
        assert cut.labels[row].tolist() == (ids + 1)[sample, piece].tolist()
        assert cut.token_mask_BS[row].tolist() == mask[sample, piece].tolist()
        assert cut.document_BS[row].tolist() == document[sample, piece].tolist()
        assert int(cut.block_B[row]) == 40 + sample
        # What keys routing noise: sample_index * length + position is what it was with full sequences.
        position = torch.arange(length)
        before = (3 * sample + 1) * full + torch.arange(full)[piece]
        assert (cut.sample_index_B[row] * length + position).tolist() == before.tolist()


def test_a_full_micro_batch_has_a_label_at_each_token():
    ids, index = torch.arange(6).view(2, 3), torch.tensor([4, 5])
    batch = MicroBatch.full(ids, ids + 1, index)
    assert batch.token_mask_BS.all()
    assert batch.tokens_per_micro_batch == batch.targets_per_micro_batch == 6.0
    assert batch.block_B is index
    assert MicroBatch.full(ids, ids + 1, index, index + 7).block_B.tolist() == [11, 12]


def test_moving_changes_every_tensor_and_nothing_else():
    ids = torch.arange(6).view(2, 3)
    index = torch.arange(2)
    batch = MicroBatch(ids, ids, ids > 0, index, index, 2.5, 1.5, document_BS=ids, has_padding=True)
    moved = batch.to("meta")
    assert {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and value.is_meta} == {
        "input_ids_BS",
        "labels",
        "token_mask_BS",
        "sample_index_B",
        "block_B",
        "document_BS",
    }
    assert (moved.tokens_per_micro_batch, moved.targets_per_micro_batch, moved.has_padding) == (2.5, 1.5, True)
    assert MicroBatch.full(ids, ids, index).to("meta").document_BS is None
