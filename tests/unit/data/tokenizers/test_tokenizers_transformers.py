import json
from pathlib import Path

import pytest
from support.real_data import DATA, needs_real_data
from support.small_tokenizers import write_gpt2

from smoe_train.data import build_tokenizer, load_tokenizer, save_tokenizer
from smoe_train.data.tokenizers import transformers as module
from smoe_train.data.tokenizers.transformers import TransformersConfig
from smoe_train.errors import DataError

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "[", "]", "sep", ","]


def write_bert(folder, words):
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return folder


def test_gpt2_files_without_a_configuration(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    tokenizer = build_tokenizer(TransformersConfig(path=tmp_path / "gpt2"))
    vocabulary = json.loads((tmp_path / "gpt2" / "vocab.json").read_text())
    ids = tokenizer.encode_texts(["the cat"])[0]
    assert ids == [vocabulary[piece] for piece in ("the", "Ġc", "a", "t")]
    end = vocabulary["<|endoftext|>"]
    assert (tokenizer.vocab_size, tokenizer.separator_ids, tokenizer.end_of_document_id) == (260, (end,), end)
    assert tokenizer.unknown_id is None, "nothing is unknown to bytes"


def test_a_text_that_spells_special_tokens_gets_the_ids_of_its_characters(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    tokenizer = build_tokenizer(TransformersConfig(path=tmp_path / "gpt2"))
    ids = tokenizer.encode_texts(["a<|endoftext|>"])[0]
    assert len(ids) == 14
    assert tokenizer.decode(ids) == "a<|endoftext|>"


def test_bert_vocabulary_without_a_configuration(tmp_path):
    tokenizer = build_tokenizer(TransformersConfig(path=write_bert(tmp_path / "bert", BERT_WORDS)))
    assert tokenizer.encode_texts(["The CATS, dog [SEP]"]) == [[5, 6, 7, 11, 1, 8, 10, 9]]
    assert (tokenizer.separator_ids, tokenizer.end_of_document_id, tokenizer.unknown_id) == ((3,), 3, 1)
    cased = build_tokenizer(TransformersConfig(path=write_bert(tmp_path / "cased", [*BERT_WORDS, "The"])))
    assert cased.encode_texts(["The the THE"]) == [[12, 5, 1]]


def test_a_tokenizer_file_with_and_without_a_configuration(tmp_path):
    write_gpt2(tmp_path / "gpt2")
    original = build_tokenizer(TransformersConfig(path=tmp_path / "gpt2"))
    original._tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tmp_path / "whole" / "tokenizer.json").read_bytes())
    whole = build_tokenizer(TransformersConfig(path=tmp_path / "whole"))
    bare = build_tokenizer(TransformersConfig(path=tmp_path / "bare"))
    text = ["the cat sat,\n\n  naïve 🙂"]
    assert whole.encode_texts(text) == bare.encode_texts(text) == original.encode_texts(text)
    assert whole.separator_ids == original.separator_ids
    assert bare.separator_ids == tuple(bare.encode_texts(["\n"])[0]), "no special token is known"
    assert bare.end_of_document_id is None


def test_only_the_tokenizers_files_are_taken(tmp_path):
    write_gpt2(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"gigabytes")
    save_tokenizer(build_tokenizer(TransformersConfig(path=tmp_path / "model")), tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "merges.txt",
        "smoe_tokenizer.json",
        "vocab.json",
    ]


def test_another_version_that_splits_otherwise_is_noticed(tmp_path, monkeypatch):
    write_gpt2(tmp_path / "gpt2")
    save_tokenizer(build_tokenizer(TransformersConfig(path=tmp_path / "gpt2")), tmp_path / "saved")
    encode = module.TransformersTokenizer.encode_texts
    monkeypatch.setattr(
        module.TransformersTokenizer, "encode_texts", lambda self, texts: [ids[::-1] for ids in encode(self, texts)]
    )
    with pytest.raises(DataError, match="is damaged or was changed"):
        load_tokenizer(tmp_path / "saved")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer of transformers"),
        ({"config.json": "{}"}, "holds no tokenizer of transformers"),
        ({"vocab.json": "{}"}, r"vocab\.json alone make no tokenizer"),
        ({"tokenizer.json": "{"}, r"cannot make a tokenizer of tokenizer\.json"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, r"tokenizer_config\.json: is not valid JSON"),
        ({"vocab.txt": "a\nb", "tokenizer_config.json": '{"tokenizer_class": "Nonsense"}'}, "cannot make a tokenizer"),
    ],
)
def test_folders_that_make_no_tokenizer_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        build_tokenizer(TransformersConfig(path=tmp_path))


def test_options_that_contradict_each_other_are_refused(tmp_path):
    for options in ({}, {"path": tmp_path, "name": "openai-community/gpt2"}):
        with pytest.raises(ValueError, match=r"needs either path .* or name"):
            TransformersConfig(**options)
    with pytest.raises(ValueError, match="revision has no effect without name"):
        TransformersConfig(path=tmp_path, revision="main")


def test_the_hub_is_asked_for_the_tokenizers_files_alone(tmp_path, monkeypatch):
    import huggingface_hub

    write_gpt2(tmp_path / "gpt2")
    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: asked.update(name=name, **options) or tmp_path / "gpt2",
    )
    tokenizer = build_tokenizer(TransformersConfig(name="some/model", revision="abc"))
    assert tokenizer.vocab_size == 260
    assert (asked["name"], asked["revision"]) == ("some/model", "abc")
    assert {"tokenizer.json", "vocab.txt", "config.json"} <= set(asked["allow_patterns"])
    assert not any("safetensors" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"cannot fetch the tokenizer 'some/model' from the hub.*tokenizer\.path"):
        build_tokenizer(TransformersConfig(name="some/model"))


@needs_real_data
def test_gpt2_and_bert_give_the_ids_that_are_known_of_them():
    gpt2 = build_tokenizer(TransformersConfig(path=DATA / "tokenizers" / "gpt2"))
    assert (gpt2.encode_texts(["Hello world"]), gpt2.vocab_size) == ([[15496, 995]], 50257)
    assert gpt2.separator_ids == (50256,)
    raw = (DATA / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")[:100_000]
    assert gpt2.decode(gpt2.encode_texts([raw])[0]) == raw
    bert = build_tokenizer(TransformersConfig(path=Path(DATA / "tokenizers" / "bert-base-uncased")))
    assert (bert.encode_texts(["Hello world"]), bert.vocab_size) == ([[7592, 2088]], 30522)
    assert (bert.separator_ids, bert.unknown_id) == ((102,), 100)
