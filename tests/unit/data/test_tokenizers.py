import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.data import BytesConfig, build_tokenizer
from smoe_train.data.tokenizers import TOKENIZERS
from smoe_train.registry import UnknownNameError


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_are_their_own_ids_wherever_the_text_is_cut(chunks):
    tokenizer = build_tokenizer(BytesConfig())
    arrays = list(tokenizer.encode(chunks))
    assert all(array.dtype == np.dtype(tokenizer.dtype) == np.uint8 for array in arrays)
    assert [int(i) for array in arrays for i in array] == list(b"".join(chunks))


@given(st.text())
def test_text_survives_the_round_trip(text):
    tokenizer = build_tokenizer(BytesConfig())
    ids = tokenizer.encode_texts([text])[0]
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_half_a_character_is_shown_as_a_replacement_and_undecodable_arguments_keep_their_bytes():
    tokenizer = build_tokenizer(BytesConfig())
    assert tokenizer.decode([0x41, 0xC3]) == "A\ufffd"
    assert tokenizer.encode_texts([b"\xff".decode("utf-8", "surrogateescape")])[0] == [0xFF]


def test_saving_writes_the_options(tmp_path):
    build_tokenizer(BytesConfig()).save(tmp_path)
    assert BytesConfig.model_validate_json((tmp_path / "bytes_tokenizer.json").read_text()) == BytesConfig()


def test_unknown_tokenizers_are_refused_with_the_choices():
    with pytest.raises(UnknownNameError, match="unknown tokenizer 'byte'; did you mean 'bytes'"):
        TOKENIZERS.get("byte")
