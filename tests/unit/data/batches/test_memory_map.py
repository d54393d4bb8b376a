import pickle

import numpy as np

from smoe_train.data.batches.memory_map import ReopensMaps


class Holder(ReopensMaps):
    def __init__(self, **values):
        self.__dict__.update(values)


def test_a_map_is_pickled_as_its_address_and_opened_read_only(tmp_path):
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    whole = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")
    later = np.memmap(tmp_path / "train.bin", dtype=np.uint8, mode="r", offset=6, shape=(2, 3))
    data = pickle.dumps(Holder(whole=whole, later=later, name="x"))
    assert len(data) < 1000
    loaded = pickle.loads(data)
    assert isinstance(loaded.whole, np.memmap)
    assert not loaded.whole.flags.writeable
    assert loaded.whole.tolist() == list(range(5000))
    assert loaded.later.tolist() == [[3, 0, 4], [0, 5, 0]]  # little-endian 3, 4, 5
    assert loaded.name == "x"


def test_a_slice_of_a_map_and_a_plain_array_are_pickled_whole(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "train.bin")
    part = np.memmap(tmp_path / "train.bin", dtype=np.uint16, mode="r")[10:20]
    loaded = pickle.loads(pickle.dumps(Holder(part=part, plain=np.arange(3))))
    assert loaded.part.tolist() == list(range(10, 20))
    assert loaded.plain.tolist() == [0, 1, 2]
