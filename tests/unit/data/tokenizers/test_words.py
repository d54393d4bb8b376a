import re

from hypothesis import given
from hypothesis import strategies as st

from smoe_train.data.tokenizers.words import WordCounter, words_of


def lines_and_words(data: bytes) -> int:
    """Counts by a state machine, as `wc` does."""
    lines = data.count(b"\n") + (data[-1:] not in (b"", b"\n"))
    return lines + len(re.findall(rb"[^ \t\n\r\v\f]+", data))


@given(st.lists(st.text(st.sampled_from("ab \n\t\ré\xa0"), max_size=8).map(str.encode), max_size=6))
def test_words_and_lines_are_counted_wherever_the_text_is_cut(chunks):
    counter = WordCounter()
    for chunk in chunks:
        counter.add(chunk)
    assert counter.total == lines_and_words(b"".join(chunks))


def test_a_blank_line_is_one_token_and_a_last_line_needs_no_newline():
    counter = WordCounter()
    counter.add(b" \n = Title = \n \n two words")
    assert counter.total == 1 + 4 + 1 + 3
    assert words_of(b" a b \n\n") == [b"a", b"b", b"<eos>", b"<eos>"]


def test_bytes_that_are_no_text_are_counted_too():
    counter = WordCounter()
    counter.add(b"\xff\xfe \x00")
    assert counter.total == 3
