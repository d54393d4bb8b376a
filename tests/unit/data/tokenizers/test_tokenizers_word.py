import zipfile

import numpy as np
import pytest
from support.real_data import DATA, needs_real_data

from smoe_train.data import TrainingText, build_tokenizer
from smoe_train.data.source import in_memory
from smoe_train.data.tokenizers.word import WordConfig
from smoe_train.errors import DataError

LINES = b" = B = \n \n a b <unk> b \n"


def learn(data, folder, **options):
    return build_tokenizer(WordConfig(**options), TrainingText(in_memory(data), "made up", folder))


def encoded(tokenizer, data, ends=None):
    found = tokenizer.encode([data], None if ends is None else np.array(ends))
    return [(ids.tolist(), ends_document) for ids, ends_document in found]


def test_ids_are_special_words_then_words_by_frequency_and_text(tmp_path):
    tokenizer = learn(LINES, tmp_path)
    # "=" and "b" come twice, "B" and "a" once.
    assert tokenizer.decode(range(6)) == "<unk>\n= b B a"
    assert encoded(tokenizer, LINES) == [([2, 4, 2, 1, 1, 5, 3, 0, 3, 1], False)]
    assert encoded(tokenizer, b"b c") == [([3, 0], False), ([1], False)], "a last line without newline is a line"
    assert tokenizer.encode_texts(["b c", "a\nb"]) == [[3, 0], [5, 1, 3]], "nothing is added to short texts"
    assert (tokenizer.unknown_id, tokenizer.separator_ids, tokenizer.end_of_document_id) == (0, (1,), None)


def test_documents_end_with_their_lines(tmp_path):
    tokenizer = learn(LINES, tmp_path)
    assert encoded(tokenizer, b"a\nbb\n\na", [2, 3, 6, 7]) == [
        ([5, 1], True),
        ([3, 1], True),
        ([3, 1, 1], True),
        ([5, 1], True),
    ]


def test_the_vocabulary_can_be_limited(tmp_path):
    assert learn(LINES, tmp_path, max_size=3).decode([2]) == "="
    assert learn(LINES, tmp_path, max_size=3).vocab_size == 3
    assert learn(LINES, tmp_path, min_count=2).vocab_size == 4


def test_decoding_restores_lines(tmp_path):
    tokenizer = learn(LINES, tmp_path)
    assert tokenizer.decode(tokenizer.encode_texts([LINES.decode()])[0]) == "= B =\n\na b <unk> b\n"


def test_a_vocabulary_file_keeps_its_order(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("\ufeffb\r\n<eos>\r\nnaïve\r\n", encoding="utf-8", newline="")
    tokenizer = build_tokenizer(WordConfig(path=path))
    assert tokenizer.encode_texts(["b naïve x\n"]) == [[0, 2, 3, 1]]
    assert tokenizer.vocab_size == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\n\nb\n", "line 2: b'' is not one word"),
        (b"a\nb c\n", "line 2: b'b c' is not one word"),
        (b"a\nb\na\n", "line 3: 'a' is already in line 1"),
        (b"a\xff\n", "is not UTF-8 text at byte 1"),
        (b"", "is empty"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path, data, message):
    path = tmp_path / "vocabulary.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"vocabulary\.txt.*{message}"):
        build_tokenizer(WordConfig(path=path))


def test_a_text_without_words_is_refused(tmp_path):
    with pytest.raises(DataError, match="no words to make a vocabulary of"):
        learn(b" \n\n", tmp_path)


def test_options_without_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no effect with path"):
        WordConfig(path=tmp_path, min_count=3)
    assert not WordConfig(path=tmp_path).learns()
    assert (WordConfig().learns(), WordConfig().nominal_vocab_size()) == (True, None)


@needs_real_data
def test_wikitext_has_the_published_numbers_of_tokens_and_words(tmp_path):
    with zipfile.ZipFile(DATA / "wikitext-2" / "wikitext-2-v1.train-valid.zip") as archive:
        train = archive.read("wikitext-2/wiki.train.tokens")
    tokenizer = learn(train, tmp_path)
    assert tokenizer.vocab_size == 33_278
    assert sum(len(ids) for ids, _ in tokenizer.encode([train])) == 2_088_628
    for folder in ("wikitext-2", "wikitext-103"):
        valid = (DATA / folder / "wiki.valid.tokens").read_bytes()
        assert sum(len(ids) for ids, _ in tokenizer.encode([valid])) == 217_646
