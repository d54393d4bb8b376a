import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from smoe_train.data import build_source
from smoe_train.data.sources import pydocs
from smoe_train.data.sources.pydocs import PydocsConfig, assign_splits, docstrings, standard_modules
from smoe_train.errors import DataError

LONG = "A sentence that is longer than forty characters, number {}."


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A made-up standard library of two modules and a package."""
    monkeypatch.setattr(pydocs, "standard_library", lambda: tmp_path)
    monkeypatch.setattr(pydocs, "ENOUGH_BYTES", 100)
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "json" / "__init__.py").write_text(f'"""{LONG.format(1)}"""\n')
    (tmp_path / "json" / "tests" / "test_a.py").write_text(f'"""{LONG.format(2)}"""\n')
    (tmp_path / "abc.py").write_text(f'class A:\n    """Short."""\n    def f(self):\n        """{LONG.format(3)}"""\n')
    (tmp_path / "zipfile.py").write_text(f'x = 1\nasync def g():\n    """{LONG.format(4)}\n\n    More."""\n')
    (tmp_path / "sitecustomize.py").write_text(f'"""{LONG.format(5)}"""\n')
    (tmp_path / "site-packages" / "abc.py").write_text(f'"""{LONG.format(6)}"""\n')
    return tmp_path


def test_modules_are_those_of_the_standard_library_without_tests(library):
    assert [str(path.relative_to(library)) for path in standard_modules(library)] == [
        "abc.py",
        "json/__init__.py",
        "zipfile.py",
    ]


def test_docstrings_come_cleaned_from_top_to_bottom():
    source = f'''"""{LONG.format(0)}"""
class A:
    """{LONG.format(1)}

        indented
    """
    def f(self):
        """{"x" * 40}"""
        def g():
            """{LONG.format(2)}"""
    if A:
        pass
    else:
        try:
            pass
        except OSError:
            def h(self):
                "{LONG.format(3)}"
"not a docstring, though it is more than forty characters long"
'''
    assert list(docstrings(source.encode())) == [
        ("module", LONG.format(0)),
        ("class", LONG.format(1) + "\n\nindented"),
        ("function", LONG.format(2)),
        ("function", LONG.format(3)),
    ]


def test_source_in_other_encodings_or_other_grammars_is_survived():
    latin = f'# -*- coding: latin-1 -*-\n"""{LONG.format("é")}"""\n'
    assert list(docstrings(latin.encode("latin-1"))) == [("module", LONG.format("é"))]
    assert list(docstrings(b"print 'Python 2'")) == []
    assert list(docstrings(b"\x00")) == []


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=60), st.floats(0.01, 0.49), st.floats(0, 0.49))
def test_splits_meet_their_shares_and_keep_equal_documents_together(documents, valid, test):
    names = assign_splits(documents, {"valid": valid, "test": test})
    where = {}
    for name, document in zip(names, documents, strict=True):
        assert where.setdefault(document, name) == name
    total = sum(map(len, documents))
    largest = max(documents.count(document) * len(document) for document in documents)
    for split, share in (("valid", valid), ("test", test)):
        filled = sum(len(document) for name, document in zip(names, documents, strict=True) if name == split)
        assert filled >= share * total or "train" not in names
        assert filled <= share * total + largest


def test_a_document_more_moves_only_documents_at_the_boundaries():
    documents = [LONG.format(i).encode() for i in range(400)]
    before = assign_splits(documents, {"valid": 0.1, "test": 0.1})
    after = assign_splits([*documents, b"one more document"], {"valid": 0.1, "test": 0.1})
    assert sum(a != b for a, b in zip(before, after[:-1], strict=True)) <= 4


def test_a_stripped_library_gives_its_source_and_an_empty_one_an_error(library, monkeypatch, caplog):
    monkeypatch.setattr(pydocs, "ENOUGH_BYTES", 200)
    modules = b"".join(path.read_bytes() + b"\n\n" for path in standard_modules(library))
    assert b"".join(pydocs._standard_library_documents(library)) == modules
    assert "uses its source code instead" in caplog.text
    with pytest.raises(DataError, match=r"neither docstrings nor source.*data\.source=text"):
        pydocs._standard_library_documents(library / "absent")


def test_the_corpus_is_the_topics_and_then_the_docstrings(library, monkeypatch):
    monkeypatch.setattr(pydocs, "_topics", lambda: [b"topic\n\n"])
    corpus = build_source(PydocsConfig(valid_fraction=1e-9, test_fraction=0.0)).load(library)
    texts = {name: b"".join(split.read()) for name, split in corpus.splits.items()}
    in_order = [b"topic\n\n", *(LONG.format(i).encode() + b"\n\n" for i in (3, 1)), b"", b""]
    in_order[3] = (LONG.format(4) + "\n\nMore.").encode() + b"\n\n"
    first = min((document for document in in_order[:4]), key=lambda document: hashlib.sha256(document).digest())
    assert texts == {"valid": first, "train": b"".join(d for d in in_order[:4] if d != first)}


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValidationError, match="must be below 1"):
        PydocsConfig(valid_fraction=0.5, test_fraction=0.5)


def test_this_python_carries_two_megabytes_of_english(tmp_path):
    source = build_source(PydocsConfig())
    corpus = source.load(tmp_path)
    sizes = {name: split.num_bytes for name, split in corpus.splits.items()}
    total = sum(sizes.values())
    assert 1_500_000 < total < 4_000_000
    assert 0.05 * total <= sizes["valid"] < 0.09 * total
    assert 0.05 * total <= sizes["test"] < 0.09 * total
    train = b"".join(corpus.splits["train"].read()).decode("utf-8")
    assert "The standard type hierarchy" in train or "Assignment" in train
    assert all(isinstance(path, Path) and path.is_file() for path in source.files(tmp_path))
