import pytest

from smoe_train.data import build_source, prepare_examples
from smoe_train.data.sources import pydocs, pydocs_kinds
from smoe_train.data.sources.pydocs_kinds import PydocsKindsConfig, labelled_docstrings
from smoe_train.errors import DataError
from smoe_train.recipe import load_recipe

MODULE, CLASS, FUNCTION = 0, 1, 2


def text(number):
    return f"Documentation that is longer than forty characters, number {number}."


def module(*, own=None, classes=(), functions=()):
    lines = [] if own is None else [f'"""{text(own)}"""']
    lines += [f'class A{number}:\n    """{text(number)}"""\n    x = 1' for number in classes]
    lines += [f'async def f{number}():\n    """{text(number)}"""' for number in functions]
    return "\n".join(lines).encode()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A made-up standard library with docstrings of 2 modules, 3 classes and 5 functions."""
    monkeypatch.setattr(pydocs, "standard_library", lambda: tmp_path)
    monkeypatch.setattr(pydocs_kinds, "ENOUGH_EXAMPLES", 2)
    (tmp_path / "zipfile.py").write_bytes(module(own=0, classes=[1], functions=[2, 3]))
    (tmp_path / "abc.py").write_bytes(module(own=4, classes=[5, 6], functions=[7, 8, 9]))
    return tmp_path


def rows(corpus):
    return [(one.first, one.label) for split in corpus.splits.values() for one in split]


def test_docstrings_are_labelled_by_what_they_document():
    found = labelled_docstrings([module(own=0, classes=[1, 2], functions=[3]), module(own=4, functions=[5])])
    assert [(one.first, one.label, one.index) for one in found] == [
        (text(0), MODULE, 0),
        (text(1), CLASS, 1),
        (text(2), CLASS, 2),
        (text(3), FUNCTION, 3),
        (text(4), MODULE, 4),
        (text(5), FUNCTION, 5),
    ]
    assert all(one.second is None for one in found)


def test_a_text_comes_once_and_not_at_all_if_its_label_is_in_doubt():
    found = labelled_docstrings([module(own=0, classes=[1], functions=[2, 3]), module(own=2, functions=[3, 4])])
    assert [(one.first, one.label) for one in found] == [
        (text(0), MODULE),
        (text(1), CLASS),
        (text(3), FUNCTION),
        (text(4), FUNCTION),
    ]


def test_a_lone_surrogate_is_written_as_its_escape():
    (found,) = labelled_docstrings([b'"""' + text(0).encode() + b' \\ud800"""'])
    assert found.first == text(0) + " \\ud800"


def test_of_each_kind_there_are_as_many_and_equal_answers_are_right_in_a_third(library):
    """abc.py comes before zipfile.py; which of a kind are kept is decided by their texts alone, not by their places."""
    corpus = build_source(PydocsKindsConfig(dev_fraction=0.3)).load(library)
    assert list(corpus.splits) == ["train", "dev"]
    assert [len(split) for split in corpus.splits.values()] == [4, 2], "0.3 of 6 is 1.8"
    assert sorted(label for _, label in rows(corpus)) == [MODULE] * 2 + [CLASS] * 2 + [FUNCTION] * 2
    assert {(text(4), MODULE), (text(0), MODULE)} < set(rows(corpus))
    assert (corpus.task.labels, corpus.task.metrics) == (("module", "class", "function"), ("accuracy",))
    for split in corpus.splits.values():
        assert [one.index for one in split] == sorted(one.index for one in split)
    # The same texts in other places: the same rows in the same splits.
    (library / "abc.py").rename(library / "zipimport.py")
    moved = build_source(PydocsKindsConfig(dev_fraction=0.3)).load(library)
    for name, split in corpus.splits.items():
        assert {one.first for one in moved.splits[name]} == {one.first for one in split}


def test_it_is_made_anew_when_a_module_changes(library):
    source = build_source(PydocsKindsConfig())
    assert sorted(path.name for path in source.files(library)) == ["abc.py", "zipfile.py"]
    fingerprint = build_source(PydocsKindsConfig(dev_fraction=0.3)).load(library).fingerprint
    (library / "abc.py").write_bytes(module(own=10, classes=[5, 6], functions=[7, 8, 9]))
    assert build_source(PydocsKindsConfig(dev_fraction=0.3)).load(library).fingerprint != fingerprint


def test_a_stripped_library_and_an_empty_split_are_errors(library, monkeypatch):
    with pytest.raises(DataError, match=r"dev_fraction=0\.01 leaves 6 training and 0 dev rows; change it"):
        build_source(PydocsKindsConfig(dev_fraction=0.01)).load(library)
    monkeypatch.setattr(pydocs_kinds, "ENOUGH_EXAMPLES", 3)
    with pytest.raises(DataError, match=r"only 2 docstrings of some kind.*data\.source=labelled"):
        build_source(PydocsKindsConfig()).load(library)


def test_this_python_carries_a_thousand_examples():
    """Read as the smoke recipe does, so that tests which train it find the store."""
    recipe = load_recipe("smoke/classification")
    store = prepare_examples(recipe.data, recipe.tokenizer)
    train, dev = store.split("train").labels, store.split("dev").labels
    count = len(train) + len(dev)
    assert 1_000 < count < 3_000
    assert len(dev) == round(0.1 * count), "no text comes twice"
    for label in range(3):
        assert (train == label).sum() + (dev == label).sum() == count / 3
