import socket

import pyarrow
import pyarrow.parquet
import pytest

from smoe_train.data.sources import hub
from smoe_train.data.sources.hub import read_hub
from smoe_train.errors import DataError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in the layout of the hub; the library keeps its own cache beside it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "made-up"
    folder.mkdir()
    for split, shard, texts in (
        ("train", "00000-of-00002", "ab"),
        ("train", "00001-of-00002", "c"),
        ("test", "0", "d"),
    ):
        table = pyarrow.table({"text": [f" {text} \n" for text in texts], "label": [0] * len(texts)})
        pyarrow.parquet.write_table(table, folder / f"{split}-{shard}.parquet")
    return folder


def test_the_library_reads_a_folder_in_the_layout_of_the_hub(folder, monkeypatch):
    monkeypatch.setattr(hub, "BATCH_ROWS", 2)
    rows = list(read_hub(str(folder), None, "train"))
    assert rows == [(number, {"text": f" {text} \n", "label": 0}) for number, text in enumerate("abc", 1)]
    assert [row["text"] for _, row in read_hub(str(folder), None, "test")] == [" d \n"]


@pytest.mark.parametrize(
    ("config", "split", "message"), [("other", "train", "other"), (None, "validation", "validation")]
)
def test_what_the_library_cannot_find_is_an_error(folder, config, split, message):
    with pytest.raises(DataError, match=rf"made-up.*split {split}: cannot be loaded.*{message}.*data\.path to local"):
        list(read_hub(str(folder), config, split))


def test_damaged_files_are_an_error(folder):
    (folder / "test-0.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be loaded from the hub"):
        list(read_hub(str(folder), None, "test"))


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"a/b \(c\) at main, split train: cannot be loaded from the hub: ConnectionError: Couldn't reach the Hub; w"
    )
    with pytest.raises(DataError, match=message):
        list(read_hub("a/b", "c", "train", "main"))


def test_errors_in_the_middle_are_reported_too(monkeypatch):
    class Rows:
        def iter(self, batch_size):
            yield {"text": ["a"]}
            raise OSError("disk failed")

    monkeypatch.setattr(hub, "load_hub", lambda *_: Rows())
    rows = read_hub("a/b", None, "train")
    assert next(rows) == (1, {"text": "a"})
    with pytest.raises(DataError, match="OSError: disk failed"):
        next(rows)


@pytest.mark.parametrize(("proxies", "offline"), [({}, True), ({"https": "http://proxy:3128"}, False)])
def test_an_unknown_name_of_the_hub_is_not_tried_for_half_a_minute(monkeypatch, proxies, offline):
    import datasets
    from huggingface_hub import constants

    def unknown(*_):
        raise socket.gaierror("Name or service not known")

    seen = []
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(hub, "getproxies", lambda: proxies)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: seen.append((datasets.config.HF_HUB_OFFLINE, constants.is_offline_mode())),
    )
    hub.load_hub("a/b", None, "train", None)
    assert seen == [(offline, offline)]
    assert not datasets.config.HF_HUB_OFFLINE
    assert not constants.is_offline_mode()
