"""Strict configuration: YAML files and overrides merged by OmegaConf, checked by pydantic, all mistakes at once.

A configuration is built from layers, each overriding the one before: the files named by ``extends:`` (oldest first),
the file itself, then ``key.path=value`` overrides. Blocks that are tagged unions (``type`` or ``source``) are
replaced, not merged, when a later layer changes the tag: options of one router mean nothing to another.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from smoe_train.bounded import read_bounded
from smoe_train.errors import Problem, RecipeError
from smoe_train.registry import suggest

TAGS = ("type", "source")
MAX_EXTENDS = 16
COMMAND_LINE = "command line"
MAX_PATH_BYTES = 3500  # systems take 4095, and names of files come behind it
MAX_FILE_BYTES = 128 << 10  # a hundred times what a recipe has; reading YAML takes seconds beyond

# An even number of backslashes before it, or none. OmegaConf would replace it: by the environment, whose secrets a
# stranger's recipe could so send into the records of a run, or by other texts, which doubles a text with every line.
_REPLACED = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_NOT_REPLACED = r"holds ${...}, and recipes have no replacements; write the value itself (or \${ for these characters)"

Tree = dict[str, Any]
Model = TypeVar("Model", bound="StrictModel")


class StrictModel(BaseModel):
    """Base of every configuration section: unknown keys, wrong types and NaN are errors; instances are immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _paths_can_be(self) -> StrictModel:
        for name, value in self.__dict__.items():
            if isinstance(value, Path) and (problem := path_problem(value)) is not None:
                raise ValueError(f"{name}: {str(value)!r} {problem}")
        return self


def path_problem(path: Path) -> str | None:
    """Returns why no file can have a path, or None."""
    if "\0" in str(path):
        return "holds a NUL character, which no path can"
    try:
        size = len(os.fsencode(path))
        os.lstat(path.expanduser())
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which no path can"
    except RuntimeError:
        return "begins with the name of a user that there is not"
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return "is too long for a path"
    return "is too long for a path" if size > MAX_PATH_BYTES else None


LARGEST = 1 << 63  # no whole number of a run needs more bits; floats may be larger


@dataclass(frozen=True)
class Layered:
    """A merged configuration that remembers where each value came from.

    Attributes:
        values: Plain nested dictionaries.
        origins: Dotted key path -> ``file:line`` or ``command line``.
        source: What to name when a key has no origin of its own (the last file read).
    """

    values: Tree
    origins: dict[str, str] = field(default_factory=dict)
    source: str = "recipe"

    def where(self, key: str) -> str:
        """Returns the origin of ``key`` or of its nearest ancestor."""
        while key:
            if any(self._is_override(f"{key}.{tag}") for tag in TAGS):
                return COMMAND_LINE  # which has chosen what the block describes
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return self.source

    def overridden(self, key: str) -> bool:
        """Returns whether an override has set ``key`` or anything in it."""
        return any(self._is_override(one) and (one == key or one.startswith(f"{key}.")) for one in self.origins)

    def _is_override(self, key: str) -> bool:
        return self.origins.get(key) == COMMAND_LINE


def read_layers(path: Path, resolve: typing.Callable[[str, Path], Path], own: frozenset[str] = frozenset()) -> Layered:
    """Reads a YAML file and everything it extends.

    ``extends`` names one file or a list of them, of which later ones override earlier ones.

    Args:
        path: The file.
        resolve: Turns a text after ``extends:`` and the folder of the extending file into a path.
        own: Top-level keys that a file does not inherit from what it extends.

    Raises:
        RecipeError: A file is missing, is not a YAML mapping, or extends itself.
    """
    return _read_extended(path, resolve, own, ())


def _read_extended(
    path: Path, resolve: typing.Callable[[str, Path], Path], own: frozenset[str], below: tuple[Path, ...]
) -> Layered:
    if path in below or len(below) >= MAX_EXTENDS:
        cycle = " -> ".join(str(p) for p in [*below, path])
        raise RecipeError([Problem(str(below[0]), "extends", f"extends itself or is nested too deeply: {cycle}")])
    values, lines = _read_yaml(path)
    parents = values.pop("extends", None)
    where = lines.get("extends", str(path))
    parents = [] if parents is None else [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise RecipeError([Problem(where, "extends", "expected the name or path of one recipe, or a list of them")])
    merged = Layered({}, {}, str(path))
    for parent in parents:
        try:
            found = resolve(parent, path.parent)
        except RecipeError as error:
            problems = [
                Problem(where, "extends", f"{problem.where!r}: {problem.message}") for problem in error.problems
            ]
            raise RecipeError(problems) from error
        layer = _read_extended(found, resolve, own, (*below, path))
        kept = {key: value for key, value in layer.values.items() if key not in own}
        origins = {key: origin for key, origin in layer.origins.items() if key.partition(".")[0] not in own}
        merged = Layered(merge(merged.values, kept), merged.origins | origins, str(path))
    return Layered(merge(merged.values, values), merged.origins | lines, str(path))


def read_values(path: Path) -> Tree:
    """Returns the values in a YAML file by itself, such as the recipe in a run's folder.

    Raises:
        RecipeError: It is missing, or is not a YAML mapping.
    """
    return _read_yaml(path)[0]


def apply_overrides(layered: Layered, overrides: Sequence[str]) -> Layered:
    """Applies ``key.path=value`` texts on top; values are read as YAML, tags of unions are applied first.

    Raises:
        RecipeError: An override is not of that form; all bad ones are listed.
    """
    problems: list[Problem] = []
    parsed: list[tuple[str, Tree]] = []
    for text in overrides:
        key, separator, _ = text.partition("=")
        if not separator or not key or any(not part for part in key.split(".")):
            problems.append(Problem(COMMAND_LINE, "", f"{text!r} is not an override; write key.path=value"))
            continue
        if _REPLACED.search(text):
            problems.append(Problem(COMMAND_LINE, key, _NOT_REPLACED))
            continue
        try:
            tree = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=True)
            assert isinstance(tree, dict)
            parsed.append((key, typing.cast(Tree, tree)))
        except (OmegaConfBaseException, yaml.YAMLError, RecursionError, ValueError) as error:
            problems.append(Problem(COMMAND_LINE, key, f"cannot read the value: {_first_line(error)}"))
        except (AttributeError, IndexError, KeyError, TypeError):  # of both libraries, for `[x=1` and the like
            problems.append(Problem(COMMAND_LINE, "", f"{text!r} is not an override; write key.path=value"))
    if problems:
        raise RecipeError(problems)
    # Outer tags before inner ones: a change of tag replaces the block with all that lies in it.
    parsed.sort(key=lambda item: item[0].count(".") if item[0].rpartition(".")[2] in TAGS else math.inf)
    values, origins = layered.values, dict(layered.origins)
    for key, tree in parsed:
        values = merge(values, tree)
        parts = key.replace("[", ".").replace("]", "").split(".")
        for length in range(1, len(parts)):
            origins.setdefault(".".join(parts[:length]), COMMAND_LINE)
        origins[".".join(parts)] = COMMAND_LINE
    return Layered(values, origins, layered.source)


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> Tree:
    """Returns ``base`` overridden by ``top``; a block whose tag changes is replaced whole."""
    if any(tag in top and tag in base and top[tag] != base[tag] for tag in TAGS):
        return dict(top)
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def build(model: type[Model], layered: Layered) -> tuple[Model | None, list[Problem], frozenset[str]]:
    """Checks a configuration against its model and reports every mistake.

    Returns:
        The model, or None if not even the sound part of the values makes one; the problems; the key paths whose
        values were left out because they are wrong (the model then holds defaults there, good only for further checks).
    """
    values = _integral_floats(layered.values)
    problems: list[Problem] = []
    dropped: set[str] = set()
    for keys in [*_too_large(values, ())]:
        key = ".".join(keys)
        problems.append(Problem(layered.where(key), key, "is larger than any number of a run (2^63 - 1)"))
        dropped.add(key)
        values = _without(values, keys)
    for _ in range(MAX_EXTENDS):
        try:
            return model.model_validate_json(json.dumps(values)), problems, frozenset(dropped)
        except ValidationError as error:
            found: dict[tuple[str, ...], list[ErrorDetails]] = {}
            for details in error.errors(include_url=False, include_context=True):
                found.setdefault(tuple(_key_path(model, details["loc"])), []).append(details)
            before = len(dropped)
            for keys, alternatives in found.items():
                key = ".".join(keys)
                if key in dropped:
                    continue
                message = "; or ".join(_message(model, details, keys) for details in alternatives)
                problems.append(Problem(layered.where(key), key, message))
                # What lacks a value is left out with its block, whose default is good enough for further checks.
                wrong = keys[:-1] if alternatives[0]["type"] == "missing" and len(keys) > 1 else keys
                dropped |= {key, ".".join(wrong)}
                values = _without(values, wrong)
            if len(dropped) == before:
                return None, problems, frozenset(dropped)
        except (TypeError, ValueError, RecursionError) as error:
            return None, [Problem(layered.source, "", f"cannot be read: {_first_line(error)}")], frozenset()
    return None, problems, frozenset(dropped)


def _read_yaml(path: Path) -> tuple[Tree, dict[str, str]]:
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode | None):  # OmegaConf would take a lone word for a key
            raise RecipeError([Problem(str(path), "", "expected a YAML mapping of keys to values")])
        loaded: Any = {}
        if root is not None:
            created = _created(path, text)  # refuses too many aliases, before anything follows them
            _refuse_replacements(path, root)
            loaded = OmegaConf.to_container(created, resolve=True)
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            [Problem(str(path), "", f"is not UTF-8 text: {error.reason} at byte {error.start}")]
        ) from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError([Problem(f"{path}{line}", "", f"is not valid YAML: {error.problem}")]) from error
    except RecursionError as error:
        raise RecipeError([Problem(str(path), "", "is nested too deeply to be a recipe")]) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise RecipeError([Problem(str(path), "", f"is not valid YAML: {_first_line(error)}")]) from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise RecipeError([Problem(str(path), "", "expected a YAML mapping of keys to values")])
    return typing.cast(Tree, loaded), {key: f"{path}:{line}" for key, line in _lines(root, "")}


def _created(path: Path, text: str) -> Any:
    try:
        return OmegaConf.create(text)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # of PyYAML, for `!!timestamp x` and the like
        problem = "a value does not fit its YAML tag (!!int, !!timestamp ...); leave tags out"
        raise RecipeError([Problem(str(path), "", problem)]) from error


def _refuse_replacements(path: Path, root: yaml.Node) -> None:
    problems = [
        Problem(f"{path}:{node.start_mark.line + 1}", key, _NOT_REPLACED)
        for key, node in _scalars(root, "")
        if _REPLACED.search(node.value)
    ]
    if problems:
        raise RecipeError(problems)


def _scalars(node: yaml.Node, key: str) -> Iterator[tuple[str, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield key, node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item, key)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            yield from _scalars(value, f"{key}.{key_node.value}" if key else str(key_node.value))


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            yield key, key_node.start_mark.line + 1
            yield from _lines(value_node, key)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _integral_floats(value: Any) -> Any:
    """Writes 1e5 as 100000, so that a whole number may be given in either notation."""
    if isinstance(value, Mapping):
        return {str(key): _integral_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integral_floats(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST else value


def _too_large(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _too_large(item, (*keys, key))
    elif isinstance(value, int) and abs(value) >= LARGEST:
        yield keys


def _without(values: Tree, keys: Sequence[str]) -> Tree:
    if not keys or keys[0] not in values:
        return values
    if len(keys) == 1 or not isinstance(values[keys[0]], Mapping):
        return {key: value for key, value in values.items() if key != keys[0]}
    return {**values, keys[0]: _without(dict(values[keys[0]]), keys[1:])}


def _key_path(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Turns pydantic's location, which names union tags too, into the keys that the user wrote."""
    keys: list[str] = []
    current: Any = model
    for part in loc:
        members = _members(current)
        if keys and not members:  # below a value: pydantic names the alternatives of its type, or items of a list
            break
        if (
            not isinstance(part, int)
            and len(members) > 1
            and (part in members or part in {getattr(member, "__name__", "") for member in members.values()})
        ):
            current = members.get(str(part), current)
            continue
        keys.append(str(part))
        chosen = next(iter(members.values())) if len(members) == 1 else current
        fields = getattr(chosen, "model_fields", {})
        current = fields[part].annotation if part in fields else None
    return keys


def _members(annotation: Any) -> dict[str, Any]:
    """Returns the models that an annotation admits, by tag (or by class name where there is no tag)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tags = [annotation.model_fields[tag].default for tag in TAGS if tag in annotation.model_fields]
        return {str(tags[0]) if tags else annotation.__name__: annotation}
    members: dict[str, Any] = {}
    if get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        for argument in get_args(annotation):
            members |= _members(argument)
    return members


def _message(model: type[BaseModel], details: ErrorDetails, keys: Sequence[str]) -> str:
    if details["type"] == "extra_forbidden":
        return "unknown key" + suggest(keys[-1], _allowed_keys(model, details["loc"]))
    if details["type"] == "union_tag_invalid":
        context = details.get("ctx", {})
        choices = [tag.strip().strip("'") for tag in str(context.get("expected_tags", "")).split(",")]
        tag_key = str(context.get("discriminator", "type")).strip("'")
        return f"unknown {tag_key} {context.get('tag')!r}{suggest(str(context.get('tag')), choices)}"
    if details["type"] == "union_tag_not_found":
        tag_key = str(details.get("ctx", {}).get("discriminator", "type"))
        return f"the key {tag_key} is missing from this block; it chooses what the block describes"
    if details["type"] == "missing":
        return "is required and missing"
    message = details["msg"].removeprefix("Value error, ")
    shown = repr(details["input"])
    return f"{message[0].lower()}{message[1:]} (got {shown if len(shown) <= 60 else shown[:57] + '...'})"


def _allowed_keys(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    current: Any = model
    for part in loc[:-1]:
        members = _members(current)
        if part in members:
            current = members[str(part)]
            continue
        chosen = next(iter(members.values()), None) if len(members) == 1 else None
        fields = getattr(chosen, "model_fields", {})
        current = fields[part].annotation if part in fields else None
    members = _members(current)
    return sorted(next(iter(members.values())).model_fields) if len(members) == 1 else []
