import hashlib
import io
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.file_server import serving

from smoe_train.data import build_source
from smoe_train.data.reading import download
from smoe_train.data.reading.download import Published
from smoe_train.data.source import StoredFile
from smoe_train.data.sources import text8
from smoe_train.data.sources.text8 import Text8Config, filtered
from smoe_train.errors import DataError

SHARED = Path(os.environ.get("SMOE_TRAIN_DATA", Path(__file__).parents[5] / "shared" / "data"))
REAL = SHARED / "enwik8" / "enwik8.0-3000000"
TEXT = (b" anarchism originated as a term of abuse" * 10)[:300]

# Matt Mahoney's program (public domain), against which the port is held where there is a perl.
WIKIFIL = r"""
$/=">";
while (<>) {
  if (/<text /) {$text=1;}
  if (/#redirect/i) {$text=0;}
  if ($text) {
    if (/<\/text>/) {$text=0;}
    s/<.*>//;
    s/&amp;/&/g; s/&lt;/</g; s/&gt;/>/g;
    s/<ref[^<]*<\/ref>//g;
    s/<[^>]*>//g;
    s/\[http:[^] ]*/[/g;
    s/\|thumb//ig; s/\|left//ig; s/\|right//ig; s/\|\d+px//ig;
    s/\[\[image:[^\[\]]*\|//ig;
    s/\[\[category:([^|\]]*)[^]]*\]\]/[[$1]]/ig;
    s/\[\[[a-z\-]*:[^\]]*\]\]//g;
    s/\[\[[^\|\]]*\|/[[/g;
    s/\{\{[^\}]*\}\}//g;
    s/\{[^\}]*\}//g;
    s/\[//g; s/\]//g;
    s/&[^;]*;/ /g;
    $_=" $_ ";
    tr/A-Z/a-z/;
    s/0/ zero /g; s/1/ one /g; s/2/ two /g; s/3/ three /g; s/4/ four /g;
    s/5/ five /g; s/6/ six /g; s/7/ seven /g; s/8/ eight /g; s/9/ nine /g;
    tr/a-z/ /cs;
    chop;
    print $_;
  }
}
"""


def dump(*texts):
    pages = "".join(f"<page><title>T</title><text xml:space='preserve'>{text}</text>\n</page>\n" for text in texts)
    return f"<mediawiki>\n{pages}</mediawiki>\n".encode()


def cleaned(*texts):
    return b"".join(filtered(iter([dump(*texts)]))).decode()


def contents(config, cache):
    return {name: b"".join(split.read()) for name, split in build_source(config).load(cache).splits.items()}


@pytest.fixture
def whole_is_small(monkeypatch):
    monkeypatch.setattr(text8, "TEXT8", replace(text8.TEXT8, num_bytes=len(TEXT), md5=hashlib.md5(TEXT).hexdigest()))
    return Text8Config(train_bytes=200, valid_bytes=60, test_bytes=40)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("Anarchism, in 1789!", "anarchism in one seven eight nine"),
        ("a [[link]] and [[target|shown text]]", "a link and shown text"),
        ("[[Image:x.jpg|thumb|200px|A caption]]", "a caption"),
        ("[[Category:Anarchism|*]]", "anarchism"),
        ("words [[de:Anarchismus]] [[zh-min-nan:X]]", "words"),
        ("see [http://a.b/c the site]", "see the site"),
        ("x {{template|a}} y {| table |} z", "x y z"),
        ("fact&lt;ref&gt;source&lt;/ref&gt; next", "fact next"),
        ("one&lt;br /&gt;two", "onetwo"),
        ("a &amp;nbsp; b &amp;mdash; c", "a b c"),
        ("caf\u00e9 na\u00efve", "caf na ve"),
    ],
)
def test_markup_is_removed_by_the_documented_rules(markup, text):
    """What the program's own comments promise, worked out by hand."""
    assert " ".join(cleaned(markup).split()) == text


def test_redirects_and_all_outside_of_texts_are_left_out():
    assert cleaned("#REDIRECT [[Elsewhere]]", "kept").split() == ["kept"]


def test_the_result_has_letters_and_single_spaces_only():
    text = cleaned("A\n\n== B ==\n* c\t9", "d")
    assert set(text) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert "  " not in text


def test_where_the_dump_is_cut_into_chunks_makes_no_difference():
    data = dump("A [[b|c]] 1.", "#redirect [[x]]", "d &lt;i&gt;e&lt;/i&gt;")
    whole = b"".join(filtered(iter([data])))
    for size in (1, 7, 64):
        assert b"".join(filtered(data[i : i + size] for i in range(0, len(data), size))) == whole


@pytest.mark.skipif(shutil.which("perl") is None, reason="there is no perl to run the original program with")
def test_it_does_what_the_original_program_does(tmp_path):
    data = dump(
        "A [[b|c]] 1. {{x|{y}}} [[Image:a|thumb|left|10px|see [[d]]|e]] [http://x y] [http://z]",
        "#redirect [[x]]",
        "d &lt;i&gt;e&lt;/i&gt; &amp;amp;lt; {| a | b |} &lt;ref a&gt;r&lt;/ref&gt; caf\u00e9 [[category:c d]] [[f:e]]",
    )
    (tmp_path / "wikifil.pl").write_text(WIKIFIL)
    (tmp_path / "dump").write_bytes(data)
    perl = subprocess.run(["perl", tmp_path / "wikifil.pl", tmp_path / "dump"], capture_output=True, check=True)
    assert b"".join(filtered(iter([data]))) == perl.stdout


@pytest.mark.skipif(not REAL.is_file(), reason="the folder of real data is absent (SMOE_TRAIN_DATA)")
def test_the_real_dump_becomes_what_the_original_program_makes_of_it():
    """Length and digest are those of the output of wikifil.pl under Perl 5, run on the same 3,000,000 bytes."""
    text = b"".join(filtered(StoredFile.at(REAL).chunks()))
    assert text.startswith(b" anarchism originated as a term of abuse first used against early working class radicals")
    assert len(text) == 2_170_400
    assert hashlib.sha256(text).hexdigest() == "86c56cbf1a80c0a0406e59c266ee620a6594e248b76265550d8b7f582a526a4e"


def test_a_text_is_made_from_a_dump_once_and_cut_at_the_size_of_text8(tmp_path, monkeypatch, whole_is_small):
    path = tmp_path / "enwik9"
    path.write_bytes(dump(TEXT.decode()[:250], TEXT.decode()))
    made = b"".join(filtered(iter([path.read_bytes()])))
    assert len(made) > len(TEXT)
    small = replace(text8.TEXT8, md5=hashlib.md5(made[:300]).hexdigest())
    monkeypatch.setattr(text8, "TEXT8", small)
    config = whole_is_small.model_copy(update={"dump_path": path})
    expected = {"train": made[:200], "valid": made[200:260], "test": made[260:300]}
    assert contents(config, tmp_path) == expected
    monkeypatch.setattr(text8, "filtered", lambda chunks: pytest.fail("was made again"))
    assert contents(config, tmp_path) == expected


def test_a_zipped_dump_is_read_like_the_file_in_it_and_a_piece_needs_sizes(tmp_path, whole_is_small):
    path = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", dump("a b c d e f g h i j k l"))
    with pytest.raises(
        DataError, match=r"text8 has 300 and the splits ask for 300\. A piece of text8 needs split sizes"
    ):
        contents(whole_is_small.model_copy(update={"dump_path": path}), tmp_path)
    piece = Text8Config(dump_path=path, train_bytes=10, valid_bytes=4, test_bytes=0)
    assert contents(piece, tmp_path) == {"train": b" a b c d e", "valid": b" f g"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes", b"")
    with pytest.raises(DataError, match="holds no member enwik8 or enwik9"):
        contents(piece, tmp_path)
    with pytest.raises(DataError, match=r"there is no such file; set data\.dump_path"):
        contents(Text8Config(dump_path=tmp_path / "absent"), tmp_path)


def test_the_file_and_the_archive_are_read_and_checked(tmp_path, whole_is_small):
    (tmp_path / "text8").write_bytes(TEXT)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("text8", TEXT)
    for name in ("text8", "a.zip"):
        config = whole_is_small.model_copy(update={"path": tmp_path / name})
        assert contents(config, tmp_path) == {"train": TEXT[:200], "valid": TEXT[200:260], "test": TEXT[260:]}
    (tmp_path / "text8").write_bytes(TEXT[::-1])
    with pytest.raises(DataError, match="has text8's size but not its contents"):
        contents(whole_is_small.model_copy(update={"path": tmp_path / "text8"}), tmp_path)


def test_without_a_path_the_archive_is_downloaded(tmp_path, whole_is_small, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("text8", TEXT)
    data = buffer.getvalue()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    with serving(**{"text8.zip": data}) as server:
        published = Published("text8.zip", [f"{server.url}/text8.zip"], hashlib.sha256(data).hexdigest())
        monkeypatch.setattr(text8, "TEXT8", replace(text8.TEXT8, archive=published))
        for _ in range(2):
            assert contents(whole_is_small, tmp_path)["train"] == TEXT[:200]
        assert len(server.requests) == 1
        server.status = 500
        with pytest.raises(DataError, match=r"HTTP 500.*set data\.path to it, or data\.dump_path to enwik9"):
            contents(whole_is_small, tmp_path / "other")


def test_there_is_one_origin():
    with pytest.raises(ValidationError, match="path and dump_path exclude each other"):
        Text8Config(path=Path("a"), dump_path=Path("b"))
    config = Text8Config()
    assert (config.train_bytes, config.valid_bytes, config.test_bytes) == (90_000_000, 5_000_000, 5_000_000)


def test_a_piece_of_another_text_is_refused(tmp_path):
    path = tmp_path / "piece"
    path.write_bytes(TEXT[:200] + b"<page>" + TEXT[:94])
    config = Text8Config(path=path, train_bytes=200, valid_bytes=50, test_bytes=50)
    with pytest.raises(DataError, match=r"piece: byte 200 is b'<', and text8 has only a to z .*data\.dump_path"):
        build_source(config).load(tmp_path)
