import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_tokenizers import TEXT

from smoe_train.data import TrainingText, build_tokenizer
from smoe_train.data.source import in_memory
from smoe_train.data.tokenizers import sentencepiece
from smoe_train.data.tokenizers.sentencepiece import SentencePieceConfig, learn
from smoe_train.errors import DataError

# What SentencePiece would normalise, strip, take for a space, or take for one of its symbols.
TRAPS = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\u2581", "\u3000", "\ufeff", "ﬁ", "e\u0301", "</s>", "<unk>", "<0x0A>"]
texts = st.lists(st.sampled_from([*TRAPS, *TEXT[:40].split()]) | st.text(max_size=5), max_size=12).map("".join)


def training_text(folder, text=TEXT):
    return TrainingText(in_memory(text.encode()), "made up", folder)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request, tmp_path_factory):
    config = SentencePieceConfig(vocab_size=400, model_type=request.param)
    return build_tokenizer(config, training_text(tmp_path_factory.mktemp("cache")))


@given(texts)
def test_no_text_loses_anything(tokenizer, text):
    ids = tokenizer.encode_texts([text])[0]
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.unknown_id, tokenizer.end_of_document_id} & set(ids), "symbols do not come out of a text"


def test_the_vocabulary_is_as_large_as_asked_and_shortens_the_text(tokenizer):
    assert tokenizer.vocab_size == 400 == tokenizer.config.nominal_vocab_size()
    ids = tokenizer.encode_texts([TEXT])[0]
    assert len(ids) < 0.6 * len(TEXT)
    (newline,) = tokenizer.encode_texts(["\n"])[0]
    assert ids.count(newline) == 300


def test_the_end_of_a_document_is_a_symbol_that_is_not_shown(tokenizer):
    assert tokenizer.separator_ids == (tokenizer.end_of_document_id,)
    assert tokenizer.decode([tokenizer.end_of_document_id]) == ""


def test_learning_twice_gives_the_same_model(tokenizer, tmp_path):
    again = build_tokenizer(tokenizer.config, training_text(tmp_path))
    assert again.fingerprint == tokenizer.fingerprint
    other = build_tokenizer(tokenizer.config.model_copy(update={"vocab_size": 399}), training_text(tmp_path))
    assert other.fingerprint != tokenizer.fingerprint


def test_without_byte_fallback_unknown_characters_are_lost_and_counted(tmp_path):
    config = SentencePieceConfig(vocab_size=60, byte_fallback=False, character_coverage=1.0)
    tokenizer = build_tokenizer(config, training_text(tmp_path))
    assert tokenizer.encode_texts(["the 漢"])[0].count(tokenizer.unknown_id) == 1
    assert tokenizer.decode(tokenizer.encode_texts(["the cat"])[0]) == "the cat"


def test_a_model_file_is_used_as_it_is(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    found = build_tokenizer(SentencePieceConfig(path=tmp_path / "sentencepiece.model"))
    assert found.fingerprint == tokenizer.fingerprint


def test_lines_beyond_the_limit_are_drawn_evenly_and_always_the_same():
    numbers = [str(number) for number in range(10_000)]
    drawn = sentencepiece._sample(iter(numbers), 500)
    assert drawn == sentencepiece._sample(iter(numbers), 500)
    assert (len(set(drawn)), drawn) == (500, sorted(drawn, key=int))
    # 500 draws from 0 .. 9999 have the mean 4999.5 with a standard deviation of 126.
    assert abs(sum(map(int, drawn)) / 500 - 4999.5) < 4 * 126
    assert sentencepiece._sample(iter(numbers), 20_000) == numbers


def test_long_lines_are_learnt_from_in_parts_that_end_before_spaces(tmp_path):
    line = " ".join(random.Random(0).choice(["rain", "tea", "roofs"]) for _ in range(2000))
    parts = list(sentencepiece._sentences(training_text(tmp_path, f"short\n\n{line}\n{'x' * 4100}")))
    long = parts[1:-3]
    assert (parts[0], "".join(long), [len(part) for part in parts[-3:]]) == ("short", line, [2000, 2000, 100])
    assert all(1990 < len(part) <= 2000 for part in long[:-1])
    assert all(part.startswith(" ") for part in long[1:])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (TEXT, {"vocab_size": 30_000}, "learn 30,000 ids from 300 lines: Vocabulary size too high"),
        (TEXT, {"vocab_size": 100}, "learn 100 ids from 300 lines: Vocabulary size is smaller than required_chars"),
        (" \n\n", {}, "learn 8,000 ids from 0 lines: the training split has no text"),
    ],
)
def test_what_cannot_be_learnt_is_refused(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        learn(SentencePieceConfig(**options), training_text(tmp_path, text))


@pytest.mark.parametrize("data", [b"", b"no model", None])
def test_what_is_no_model_is_refused(tmp_path, data):
    path = tmp_path / "some.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"some\.model: (is not a model of SentencePiece|cannot be read: No such file)"):
        build_tokenizer(SentencePieceConfig(path=path))


def test_options_without_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size, byte_fallback: no effect with path"):
        SentencePieceConfig(path=tmp_path, vocab_size=100, byte_fallback=False)
    assert not SentencePieceConfig(path=tmp_path).learns()
