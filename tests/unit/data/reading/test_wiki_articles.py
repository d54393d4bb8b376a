import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoe_train.data.reading.wiki_articles import scan
from smoe_train.errors import DataError

FIRST = b" \n = First article = \n \n Text . \n \n = = Section = = \n \n More , with = signs = in it . \n \n"
SECOND = (
    b" \n = Second = \n \n = not a title : text follows = \n Text . \n = nor this , no blank line before it = \n \n"
)
THIRD = b" \n = = = Deep section = = = \n \n = = Odd = \n \n = Odd = = \n \n Caf\xc3\xa9 \n"


def test_articles_begin_before_a_title_between_blank_lines():
    text = FIRST + SECOND + THIRD
    found = scan("made-up", [text])
    assert found.article_ends.tolist() == [len(FIRST), len(text)]
    assert found.num_bytes == len(text)
    assert found.num_lines == text.count(b"\n")
    assert found.sha1 == hashlib.sha1(text).hexdigest()


def test_a_title_may_be_the_first_line_and_lines_before_the_first_belong_to_it():
    assert scan("made-up", [b" = A = \n \n x \n \n = B = \n \n"]).article_ends.tolist() == [14, 26]
    assert scan("made-up", [b" x \n \n = A = \n \n x \n \n = B = \n \n"]).article_ends.tolist() == [20, 32]


def test_a_text_without_titles_is_one_article_and_needs_no_last_line_end():
    found = scan("made-up", [b" x \n y"])
    assert (found.article_ends.tolist(), found.num_lines, found.num_bytes) == ([6], 2, 6)


@given(st.data())
def test_where_the_text_is_cut_into_chunks_makes_no_difference(data):
    text = FIRST + SECOND + THIRD + FIRST
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=8)))
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = scan("made-up", chunks)
    assert found.article_ends.tolist() == [len(FIRST), len(FIRST + SECOND + THIRD), len(text)]
    assert (found.num_lines, found.sha1) == (text.count(b"\n"), hashlib.sha1(text).hexdigest())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xef\xbb\xbf \n = A = \n", "line 1: begins with a byte order mark"),
        (b" \n = A = \r\n \r\n", "line 2: ends with CRLF"),
        (b" \n x \n a\x00b \n", "line 3: has a NUL byte"),
        (b" \n caf\xe9 \n", r"line 2: is not valid UTF-8: .*byte 0xe9 at byte 5"),
    ],
)
def test_what_wikitext_has_not_is_an_error_with_file_and_line(text, message):
    with pytest.raises(DataError, match=f"wiki.train.raw: {message}"):
        scan("wiki.train.raw", [text])
