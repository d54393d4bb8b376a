"""Layers of YAML and overrides: what is read, what is refused, and that every mistake is named with its place."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from smoe_train.config import Layered, StrictModel, apply_overrides, build, merge, read_layers
from smoe_train.errors import RecipeError


class Round(StrictModel):
    type: Literal["round"] = "round"
    radius: float = Field(1.0, gt=0.0)


class Square(StrictModel):
    type: Literal["square"] = "square"
    side: float = 1.0
    corners: int = 4


class Inner(StrictModel):
    count: int = Field(3, ge=1)
    rate: float = 0.5
    numbers: Literal["all"] | tuple[int, ...] = "all"
    shape: Annotated[Round | Square, Field(discriminator="type")] = Round()


class Needy(StrictModel):
    low: int
    high: int


class Outer(StrictModel):
    version: Literal[1]
    name: str = "x"
    flag: bool = False
    inner: Inner = Inner()
    needy: Needy | None = None


def beside(name, folder):
    return folder / name


def read(tmp_path, text, name="r.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_layers(path, beside)


def problems_of(layered):
    return {problem.key: problem for problem in build(Outer, layered)[1]}


def refusal(tmp_path, text):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    (problem,) = caught.value.problems
    return problem


def refusal_of_many(tmp_path, text):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    return caught.value.problems[0]


def test_every_mistake_is_reported_with_file_line_and_key(tmp_path):
    layered = read(
        tmp_path,
        "version: 1\nflag: maybe\ninner:\n  coutn: 5\n  rate: fast\n  shape:\n    type: round\n    radius: -1\n",
    )
    model, problems, dropped = build(Outer, layered)
    assert {(problem.where.rpartition("/")[2], problem.key) for problem in problems} == {
        ("r.yaml:2", "flag"),
        ("r.yaml:4", "inner.coutn"),
        ("r.yaml:5", "inner.rate"),
        ("r.yaml:8", "inner.shape.radius"),
    }
    assert dropped == {"flag", "inner.coutn", "inner.rate", "inner.shape.radius"}
    assert model == Outer(version=1), "the sound rest makes a model for further checks"


def test_an_unknown_key_names_the_nearest_and_all_others(tmp_path):
    found = problems_of(read(tmp_path, "version: 1\ninner: {coutn: 5, shape: {type: square, sied: 2}}"))
    assert found["inner.coutn"].message == ("unknown key; did you mean 'count'? allowed: count, numbers, rate, shape")
    assert found["inner.shape.sied"].message == "unknown key; did you mean 'side'? allowed: corners, side, type"


def test_an_unknown_tag_names_the_choices(tmp_path):
    found = problems_of(read(tmp_path, "version: 1\ninner: {shape: {type: squar, side: 2}}"))
    assert list(found) == ["inner.shape"]
    assert found["inner.shape"].message == "unknown type 'squar'; did you mean 'square'? allowed: round, square"


def test_a_missing_tag_is_said_to_be_missing(tmp_path):
    assert (
        "the key 'type' is missing"
        in problems_of(read(tmp_path, "version: 1\ninner: {shape: {side: 2}}"))["inner.shape"].message
    )


def test_alternatives_of_one_value_are_one_problem(tmp_path):
    found = problems_of(read(tmp_path, "version: 1\ninner: {numbers: some}"))
    assert list(found) == ["inner.numbers"]
    assert "'all'" in found["inner.numbers"].message
    assert "array" in found["inner.numbers"].message
    assert list(problems_of(read(tmp_path, "version: 1\ninner: {numbers: [1, x]}"))) == ["inner.numbers"]


def test_a_block_that_lacks_a_value_does_not_hide_other_mistakes(tmp_path):
    model, problems, dropped = build(Outer, read(tmp_path, "version: 1\nflag: 3\nneedy: {low: 1}"))
    assert {problem.key for problem in problems} == {"flag", "needy.high"}
    assert model == Outer(version=1)
    assert dropped == {"flag", "needy.high", "needy"}


def test_without_what_is_required_there_is_no_model(tmp_path):
    model, problems, _ = build(Outer, read(tmp_path, "name: y\nflag: 3"))
    assert model is None
    assert {problem.key for problem in problems} == {"version", "flag"}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("inner: {count: true}", "inner.count"),
        ("inner: {count: 1.5}", "inner.count"),
        ("inner: {count: '3'}", "inner.count"),
        ("inner: {count: null}", "inner.count"),
        ("inner: {count: .inf}", "inner.count"),
        ("inner: {rate: .nan}", "inner.rate"),
        ("inner: {rate: -.inf}", "inner.rate"),
        ("inner: {rate: true}", "inner.rate"),
        ("inner: {rate: '0.5'}", "inner.rate"),
        ("inner: null", "inner"),
        ("inner: []", "inner"),
        ("flag: 1", "flag"),
        ("flag: 'yes'", "flag"),
        ("name: 5", "name"),
        ("name: null", "name"),
        ("version: 2", "version"),
    ],
)
def test_values_are_never_converted(tmp_path, text, key):
    rest = "" if key == "version" else "version: 1\n"
    assert key in problems_of(read(tmp_path, rest + text))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e-3", 1e-3), ("1E5", 1e5), ("2", 2.0), (".5", 0.5), ("+1.5", 1.5), ("1_000", 1000.0)],
)
def test_numbers_in_every_notation(tmp_path, text, value):
    model, problems, _ = build(Outer, read(tmp_path, f"version: 1\ninner: {{rate: {text}}}"))
    assert problems == []
    assert model.inner.rate == value
    assert isinstance(model.inner.rate, float)


@pytest.mark.parametrize(("text", "value"), [("1e5", 100_000), ("12.0", 12), ("7", 7)])
def test_whole_numbers_in_every_notation(tmp_path, text, value):
    model, problems, _ = build(Outer, read(tmp_path, f"version: 1\ninner: {{count: {text}}}"))
    assert problems == []
    assert model.inner.count == value
    assert isinstance(model.inner.count, int)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "duplicate key a"),
        ("inner:\n\tcount: 1\n", 2, r"'\t'"),
        ("a: [1, 2\n", 2, "expected"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "could not determine a constructor"),
    ],
)
def test_broken_yaml_is_refused_with_its_line(tmp_path, text, line, what):
    problem = refusal(tmp_path, text)
    assert problem.where == f"{tmp_path / 'r.yaml'}:{line}"
    assert what in problem.message


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"name: \xff\xfe", "not UTF-8 text: invalid start byte at byte 6"),
        ("version: 1".encode("utf-16"), "not UTF-8"),
        (b"name: a\0b", "not valid YAML"),
        ("- 1\n- 2", "expected a YAML mapping"),
        ("word", "expected a YAML mapping"),
        ("3", "expected a YAML mapping"),
        ("1: 2", "expected a YAML mapping"),
        ("a: &a [*a]", "not valid YAML"),
        ("name: ${name}", "no replacements"),
        ("a: [x, {b: '${oc.env:HOME}'}]", "no replacements"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, what):
    assert what in refusal(tmp_path, text).message


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_deep_nesting_is_refused(tmp_path, opening):
    closing = "]" if opening == "[" else "}"
    problem = refusal(tmp_path, f"version: 1\ninner: {opening * 3000}1{closing * 3000}")
    assert "nested too deeply" in problem.message


def test_an_alias_bomb_is_refused_quickly(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
    assert "YAML" in refusal(tmp_path, "\n".join(lines)).message


def test_a_text_that_doubles_with_every_line_and_the_environment_are_refused(tmp_path):
    lines = [f"a{level}: ${{a{level + 1}}}${{a{level + 1}}}" for level in range(40)]
    problem = refusal_of_many(tmp_path, "\n".join(lines))
    assert (problem.where, problem.key) == (f"{tmp_path / 'r.yaml'}:1", "a0")
    assert r"\${ for these characters" in problem.message
    with pytest.raises(RecipeError, match="no replacements"):
        apply_overrides(Layered({}), ["name=${oc.env:HOME}"])


def test_escaped_signs_of_replacement_stand_for_themselves(tmp_path):
    assert read(tmp_path, r"name: a \${x} $ {y}").values == {"name": "a ${x} $ {y}"}


def test_more_than_a_recipe_can_hold_is_refused(tmp_path):
    assert "has more than" in refusal(tmp_path, "#" * (1 << 20)).message


@pytest.mark.parametrize("text", ["a: !!timestamp x", "a: !!int ''", "a: !!bool x", "? !!float y\n: 1"])
def test_a_value_that_does_not_fit_its_tag_is_refused(tmp_path, text):
    assert "YAML" in refusal(tmp_path, text).message


def test_a_byte_order_mark_and_an_empty_file_are_no_mistakes(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfversion: 1\n").values == {"version": 1}
    assert read(tmp_path, "# nothing\n").values == {}


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecipeError, match=r"cannot be read") as caught:
            read_layers(path, beside)
        assert caught.value.problems[0].where == str(path)


def test_files_extend_each_other_oldest_first(tmp_path):
    (tmp_path / "base.yaml").write_text("version: 1\nname: base\ninner: {count: 1, rate: 0.1}\n")
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\ninner:\n  rate: 0.2\n")
    layered = read(tmp_path, "extends: middle.yaml\nname: top\n")
    assert layered.values == {"version": 1, "name": "top", "inner": {"count": 1, "rate": 0.2}}
    assert layered.where("name") == f"{tmp_path / 'r.yaml'}:2"
    assert layered.where("inner.rate") == f"{tmp_path / 'middle.yaml'}:3"
    assert layered.where("inner.count") == f"{tmp_path / 'base.yaml'}:3"


def test_a_cycle_is_shown(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match=r"a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read_layers(tmp_path / "a.yaml", beside)


def test_a_chain_without_end_is_refused(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    with pytest.raises(RecipeError, match="nested too deeply"):
        read_layers(tmp_path / "0.yaml", beside)


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("[a.yaml, b.yaml]", {"count": 1, "rate": 0.2, "shape": {"type": "square", "side": 2}}),
        ("[b.yaml, a.yaml]", {"count": 1, "rate": 0.1, "shape": {"type": "round", "radius": 1}}),
        ("[c.yaml, b.yaml]", {"count": 3, "rate": 0.2, "shape": {"type": "square", "side": 2}}),
        ("[b.yaml, c.yaml]", {"count": 3, "rate": 0.1, "shape": {"type": "round", "radius": 1}}),
        ("[a.yaml, a.yaml]", {"count": 1, "rate": 0.1, "shape": {"type": "round", "radius": 1}}),
        ("[b.yaml]", {"rate": 0.2, "shape": {"type": "square", "side": 2}}),
        ("[]", {}),
    ],
)
def test_of_a_list_the_later_override_the_earlier_and_the_file_all(tmp_path, extends, expected):
    """c extends a: all that it inherits counts as its own, so it overrides whatever stands before it."""
    (tmp_path / "a.yaml").write_text("inner: {count: 1, rate: 0.1, shape: {type: round, radius: 1}}\n")
    (tmp_path / "b.yaml").write_text("inner: {rate: 0.2, shape: {type: square, side: 2}}\n")
    (tmp_path / "c.yaml").write_text("extends: a.yaml\ninner: {count: 3}\n")
    layered = read(tmp_path, f"extends: {extends}\nname: top\n")
    assert layered.values == ({"name": "top", "inner": expected} if expected else {"name": "top"})
    below = read(tmp_path, f"extends: {extends}\ninner: {{rate: 0.9}}\n")
    assert below.values == {"inner": {**expected, "rate": 0.9}}


def test_values_from_a_list_say_where_they_are_from(tmp_path):
    (tmp_path / "a.yaml").write_text("version: 1\ninner: {count: 1, rate: 0.1}\n")
    (tmp_path / "b.yaml").write_text("\n\ninner: {rate: 0.2}\n")
    layered = read(tmp_path, "extends:\n- a.yaml\n- b.yaml\n")
    assert layered.where("inner.count") == f"{tmp_path / 'a.yaml'}:2"
    assert layered.where("inner.rate") == f"{tmp_path / 'b.yaml'}:3"


def test_what_belongs_to_a_file_alone_is_not_inherited_from_a_list(tmp_path):
    (tmp_path / "a.yaml").write_text("name: a\nflag: true\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b\n")
    (tmp_path / "r.yaml").write_text("extends: [a.yaml, b.yaml]\n")
    layered = read_layers(tmp_path / "r.yaml", beside, frozenset({"name"}))
    assert layered.values == {"flag": True}
    assert layered.origins["extends"] == f"{tmp_path / 'r.yaml'}:1"
    assert "name" not in layered.origins


def test_a_cycle_in_a_list_is_shown(tmp_path):
    (tmp_path / "sound.yaml").write_text("version: 1\n")
    (tmp_path / "a.yaml").write_text("extends: [sound.yaml, b.yaml]\n")
    (tmp_path / "b.yaml").write_text("extends: [sound.yaml, sound.yaml, a.yaml]\n")
    with pytest.raises(RecipeError, match=r": .*/a\.yaml -> .*/b\.yaml -> .*/a\.yaml$"):
        read_layers(tmp_path / "a.yaml", beside)


@pytest.mark.parametrize("extends", ["3", "true", "{a: b}", "[3]", "[a, [b]]", "[a, null]", "[{a: b}]", "[1.5]"])
def test_extends_takes_names(tmp_path, extends):
    problem = refusal(tmp_path, f"version: 1\nextends: {extends}\n")
    assert (problem.where, problem.key) == (f"{tmp_path / 'r.yaml'}:2", "extends")
    assert problem.message == "expected the name or path of one recipe, or a list of them"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("inner.count=4", {"inner": {"count": 4, "rate": 0.5}}),
        ("inner.rate=3e-4", {"inner": {"count": 1, "rate": 3e-4}}),
        ("name=a=b", {"inner": {"count": 1, "rate": 0.5}, "name": "a=b"}),
        ("inner.numbers=[1,2]", {"inner": {"count": 1, "rate": 0.5, "numbers": [1, 2]}}),
        ("needy={low: 1, high: 2}", {"inner": {"count": 1, "rate": 0.5}, "needy": {"low": 1, "high": 2}}),
        ("inner.count=null", {"inner": {"count": None, "rate": 0.5}}),
        ("name='7'", {"inner": {"count": 1, "rate": 0.5}, "name": "7"}),
        ("name=", {"inner": {"count": 1, "rate": 0.5}, "name": None}),
    ],
)
def test_forms_of_overrides(override, expected):
    layered = apply_overrides(Layered({"inner": {"count": 1, "rate": 0.5}}), [override])
    if override == "name=":
        assert not layered.values.pop("name")
        expected = {"inner": expected["inner"]}
    assert layered.values == expected


def test_bad_overrides_are_listed_together():
    with pytest.raises(RecipeError) as caught:
        apply_overrides(Layered({}), ["good=1", "noequals", "=1", "a..b=1", "a=[1", "b=" + "[" * 3000])
    assert [problem.where for problem in caught.value.problems] == ["command line"] * 5
    assert "write key.path=value" in str(caught.value)


def test_a_value_from_the_command_line_is_said_to_be_from_there(tmp_path):
    layered = apply_overrides(
        read(tmp_path, "version: 1\ninner: {count: 2}\n"),
        ["inner.count=no", "needy.low=1", "needy.high=x", "inner.rate.deep=1"],
    )
    assert {key: problem.where for key, problem in problems_of(layered).items()} == {
        "inner.count": "command line",
        "needy.high": "command line",
        "inner.rate": "command line",
    }
    assert layered.where("inner") == f"{tmp_path / 'r.yaml'}:2"


def test_later_overrides_win():
    assert apply_overrides(Layered({}), ["a.b=1", "a.b=2"]).values == {"a": {"b": 2}}


def test_another_tag_replaces_the_block_in_any_order_of_overrides():
    layered = Layered({"shape": {"type": "round", "radius": 2.0}})
    for overrides in (["shape.type=square", "shape.side=3"], ["shape.side=3", "shape.type=square"]):
        assert apply_overrides(layered, overrides).values == {"shape": {"type": "square", "side": 3}}
    assert apply_overrides(layered, ["shape.type=round", "shape.x=1"]).values == {
        "shape": {"type": "round", "radius": 2.0, "x": 1}
    }


def test_a_tag_within_a_block_that_gets_another_tag_is_kept_in_any_order():
    layered = Layered({"shape": {"type": "round", "base": {"type": "old", "size": 1}}})
    overrides = ["shape.base.size=2", "shape.base.type=new", "shape.type=square"]
    expected = {"shape": {"type": "square", "base": {"type": "new", "size": 2}}}
    assert apply_overrides(layered, overrides).values == expected
    assert apply_overrides(layered, overrides[::-1]).values == expected


@pytest.mark.parametrize(
    ("base", "top", "merged"),
    [
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"source": "x", "path": 1}, {"source": "y"}, {"source": "y"}),
        ({"source": "x", "path": 1}, {"source": "x"}, {"source": "x", "path": 1}),
    ],
)
def test_merge(base, top, merged):
    before = repr(base), repr(top)
    assert merge(base, top) == merged
    assert (repr(base), repr(top)) == before, "neither argument is changed"


trees = st.recursive(
    st.integers(0, 3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("abc"), trees), st.dictionaries(st.sampled_from("abc"), trees))
def test_merging_what_is_there_changes_nothing(base, top):
    merged = merge(base, top)
    assert merge(merged, top) == merged
    assert merge(base, {}) == base
    assert merge({}, top) == top
    assert merged.keys() == base.keys() | top.keys()


class Placed(StrictModel):
    path: Path


@pytest.mark.parametrize("path", ["a\0b", "~a-user-that-there-is-not/x", "~\0", "x" * 300, "x/" * 2000])
def test_a_path_that_no_file_can_have_is_a_problem(path):
    model, problems, _ = build(Placed, Layered({"path": path}))
    assert model is None
    assert "path: " in problems[0].message


@pytest.mark.parametrize("value", [2**63, -(2**63), 1e300])
def test_a_number_beyond_all_measure_is_a_problem_at_its_key(value):
    model, problems, dropped = build(Outer, Layered({"version": 1, "inner": {"count": value}}))
    assert model is not None
    assert [problem.key for problem in problems] == ["inner.count"]
    assert dropped == {"inner.count"}
