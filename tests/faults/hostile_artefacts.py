"""A corpus of files that somebody hostile could hand over, each with the commands that read it.

Every payload, were it ever executed, would create the file ``CANARY``. The corpus is free of harm beyond that.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.sample_data import parquet, saved_tokenizer, tarred, zipped

CANARY = "CANARY"  # beside the work folder
RUN, EXPORT = Path("runs/tiny"), Path("export")
CHECKPOINT = "checkpoints/step-00000002"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"

Command = tuple[str, ...]
READERS: tuple[Command, ...] = (
    ("checkpoint", "list", "runs/tiny"),
    ("checkpoint", "show", "runs/tiny"),
    ("checkpoint", "verify", "runs/tiny"),
    ("evaluate", "runs/tiny", "--checkpoint", "latest", "--max-tokens", "50"),
    ("generate", "runs/tiny", "--prompt", "router", "--max-new-tokens", "2"),
    ("checkpoint", "export", "runs/tiny", "out/export", "--checkpoint", "latest"),
    ("tokenizer", "show", "runs/tiny"),
    ("train", "recipe.yaml", "name=from-path", "--resume", f"runs/tiny/{CHECKPOINT}"),
    ("train", "recipe.yaml", "name=tuned", "initialise.path=runs/tiny", "initialise.checkpoint=latest"),
    ("train", "recipe.yaml"),
)
FROM_EXPORT: tuple[Command, ...] = (("train", "recipe.yaml", "name=tuned", "initialise.path=export"),)
DATA: tuple[Command, ...] = (("data", "prepare", "recipe.yaml"), ("data", "show", "recipe.yaml"))
CACHED: tuple[Command, ...] = (("data", "verify", "recipe.yaml"), ("data", "prepare", "recipe.yaml"))


@dataclass(frozen=True)
class Artefact:
    """Something hostile.

    Attributes:
        name: What it is.
        catalogue: Its number in the catalogue.
        plant: Puts it into a work folder, the current one, that holds a sound run, export, recipe and cache.
        commands: What a user then does.
        refused: Whether each of these must fail; else it may also take no harm.
    """

    name: str
    catalogue: str
    plant: Callable[[], None]
    commands: Sequence[Command]
    refused: bool = False


def corpus() -> list[Artefact]:
    """Returns all artefacts."""
    return [
        *_pickles(), *_checkpoints(), *_paths(), *_archives(), *_bombs(), *_tokenizers(), *_recipes(), *_names(),
        *_records(),
    ]  # fmt: skip


# Pickles


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def payloads() -> dict[str, bytes]:
    """Returns files that execute something when they are unpickled, by their kind."""
    import subprocess

    import numpy as np
    import torch

    touch = f"open({str(Path.cwd().parent / CANARY)!r}, 'w')"
    shell = f"touch {Path.cwd().parent / CANARY}"
    system, evaluate, execute = _Calls(os.system, shell), _Calls(eval, touch), _Calls(exec, touch)
    archive, legacy, nested, array = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2), "x": system}, archive)
    torch.save(evaluate, legacy, _use_new_zipfile_serialization=False)
    torch.save({"state": {"deep": [execute, torch.zeros(1)]}}, nested)
    np.save(array, np.array([system], dtype=object), allow_pickle=True)
    found = {
        "REDUCE os.system, protocol 0": pickle.dumps(system, 0),
        "REDUCE eval, protocol 2": pickle.dumps(evaluate, 2),
        "STACK_GLOBAL exec, protocol 4": pickle.dumps(execute, 4),
        "Popen, protocol 5": pickle.dumps(_Calls(subprocess.Popen, ["touch", shell.split()[1]]), 5),
        "GLOBAL through an allowed module": b"\x80\x02ctorch.serialization\nos.system\nX" + _short(shell) + b"\x85R.",
        "BUILD on a torch class": pickle.dumps({"a": _Calls(torch.load, str(Path.cwd().parent / "x.pt"))}, 2),
        "torch.save": archive.getvalue(),
        "torch.save, legacy": legacy.getvalue(),
        "torch.save, nested": nested.getvalue(),
        "numpy object array": array.getvalue(),
    }
    return found


def _short(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def _pickles() -> Iterator[Artefact]:
    kinds = list(payloads())

    def write(path: Path, kind: str) -> Callable[[], None]:
        def plant() -> None:
            _write(path, payloads()[kind])
            if CHECKPOINT in str(path):
                sign(RUN / CHECKPOINT)

        return plant

    shared = RUN / CHECKPOINT / "shared.safetensors"
    for kind in kinds:
        yield Artefact(f"pickle ({kind}) as weights of a checkpoint", "E1", write(shared, kind), READERS)
    places: list[tuple[Path, Sequence[Command]]] = [
        (RUN / CHECKPOINT / "manifest.json", READERS),
        (RUN / CHECKPOINT / "rank-00000.safetensors", READERS),
        (RUN / CHECKPOINT / "tokenizer/smoe_tokenizer.json", READERS),
        (RUN / CHECKPOINT / "tokenizer/vocabulary.txt", READERS),
        (RUN / CHECKPOINT / "pytorch_model.bin", READERS),
        (RUN / "checkpoints/best", READERS),
        (RUN / "recipe.yaml", READERS),
        (RUN / "tokenizer/smoe_tokenizer.json", READERS),
        (RUN / "metrics.jsonl", (("report", "runs/tiny"), ("train", "recipe.yaml"))),
        (RUN / "environment.json", (("report", "runs/tiny"), ("train", "recipe.yaml"))),
        (RUN / "results.json", (("glue", "summary", "runs/tiny"), ("glue", "submission", "runs/tiny"))),
        (RUN / "predictions/test.tsv", (("glue", "submission", "runs/tiny"),)),
        (EXPORT / "model.safetensors", FROM_EXPORT),
        (EXPORT / "config.json", FROM_EXPORT),
        (EXPORT / "model.safetensors.index.json", FROM_EXPORT),
        (EXPORT / "pytorch_model.bin", FROM_EXPORT),
        (Path("recipe.yaml"), (("train", "recipe.yaml"), ("validate", "recipe.yaml"))),
        (
            Path("corpus.txt"),
            (*DATA, ("tokenizer", "train", "--input", "corpus.txt", "--type", "word", "--output", "t")),
        ),
    ]
    for number, (path, commands) in enumerate(places):
        kind = kinds[number % len(kinds)]
        yield Artefact(f"pickle ({kind}) as {path}", "E1", write(path, kind), commands)
    for number, pattern in enumerate(
        ("stores/*/store.json", "stores/*/train.bin", "stores/*/tokenizer/*.json", "known/*")
    ):

        def plant(pattern: str = pattern, kind: str = kinds[number]) -> None:
            for path in Path("cache").glob(pattern):
                path.write_bytes(payloads()[kind])

        yield Artefact(
            f"pickle in the cache as {pattern}", "E2", plant, (*CACHED, ("train", "recipe.yaml", "name=new"))
        )
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "a.zip", "a.tar.gz"):
        source = {"source": "imdb", "allow_piece": True} if name.startswith("a.") else {"source": "records"}

        def plant_data(name: str = name, source: dict[str, Any] = source) -> None:
            Path(name).write_bytes(payloads()["torch.save"])
            _recipe(data={**source, "path": name})

        yield Artefact(f"pickle as the data file {name}", "E2", plant_data, DATA, True)


# Checkpoints that lie


def sign(checkpoint: Path) -> None:
    """Makes a manifest right about the files that lie beside it, as whoever hands over a checkpoint can."""
    path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError:
        return
    for name, item in manifest["files"].items():
        if (checkpoint / name).is_file() and not (checkpoint / name).is_symlink():
            data = (checkpoint / name).read_bytes()
            item["bytes"], item["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    _write_manifest(path, manifest)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("sha256", None)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _changed_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[], None]:
    def plant() -> None:
        path = RUN / CHECKPOINT / "manifest.json"
        manifest = json.loads(path.read_bytes())
        change(manifest)
        _write_manifest(path, manifest)

    return plant


def _header(length: int, header: bytes = b"{}") -> Callable[[], None]:
    def plant() -> None:
        for path in (RUN / CHECKPOINT / "shared.safetensors", EXPORT / "model.safetensors"):
            path.write_bytes(struct.pack("<Q", length) + header)
        sign(RUN / CHECKPOINT)

    return plant


def _tensors(**entries: Any) -> Callable[[], None]:
    header = json.dumps(entries).encode()
    return _header(len(header), header + bytes(64))


def _checkpoints() -> Iterator[Artefact]:
    both = (*READERS, *FROM_EXPORT)
    huge = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    overflow = {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 64]}
    overlap = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    yield Artefact("safetensors header of 2^63 bytes", "E3", _header(1 << 63), both)
    yield Artefact("safetensors header of 90 MB that is not there", "E3", _header(90_000_000), both)
    nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    yield Artefact("safetensors header nested 100,000 deep", "E3", _header(len(nested), nested), both)
    yield Artefact("safetensors tensor of 4 TB", "E3", _tensors(**{"weight/x": huge}), both)
    yield Artefact("safetensors shape that overflows", "E3", _tensors(**{"weight/x": overflow}), both)
    yield Artefact("safetensors tensors that overlap", "E3", _tensors(a=overlap, b=overlap), both)
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "step of 10^400": lambda m: m.update(step=10**400),
        "negative step": lambda m: m.update(step=-1),
        "no state": lambda m: m.update(state=[]),
        "a state of other types": lambda m: m["state"].update({key: [None] for key in m["state"]}),
        "an empty state": lambda m: m.update(state={}),
        "optimizer_steps of text": lambda m: m["state"].update(optimizer_steps="x" * 1000),
        "tensors in no file": lambda m: m.update(tensors={"weight/x": "nowhere.safetensors"}),
        "no tensors": lambda m: m.update(tensors={}),
        "files that are texts": lambda m: m.update(files={"shared.safetensors": "x"}),
        "an unknown newer format": lambda m: m.update(format=99),
        "a format of another type": lambda m: m.update(format=[2]),
        "escape sequences in its keys": lambda m: m["state"].update({"identity": {ESCAPE: ESCAPE}}),
        "a state nested deeply": lambda m: m["state"].update(train=_deep(400)),
        "no format 1 state": lambda m: (m.update(format=1, state={"step": 2}), m.pop("tensor_sha256", None)),
    }
    for what, change in changes.items():
        yield Artefact(f"signed manifest with {what}", "E4", _changed_manifest(change), READERS)
    yield Artefact(
        "manifest nested 100,000 deep", "E8",
        lambda: _write(RUN / CHECKPOINT / "manifest.json", b"[" * 100_000 + b"]" * 100_000), READERS,
    )  # fmt: skip
    index = json.dumps({"weight_map": {"model.embed.weight": "../../secret.safetensors"}}).encode()
    yield Artefact(
        "index of an export that names a file outside", "E4",
        lambda: _write(EXPORT / "model.safetensors.index.json", index), FROM_EXPORT, True,
    )  # fmt: skip
    remote = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}}
    yield Artefact("code beside an export (auto_map)", "E10", lambda: _with_code(EXPORT, remote), FROM_EXPORT)
    for name, value in {
        "num_layers": 10**9,
        "router": {"type": ESCAPE},
        "moe_layers": [10**12],
        "d_model": 10**15,
    }.items():
        yield Artefact(
            f"config.json of an export with {name} = {str(value)[:20]!r}", "E7",
            lambda name=name, value=value: _change_json(EXPORT / "config.json", {name: value}), FROM_EXPORT, True,  # type: ignore[misc]
        )  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def _with_code(folder: Path, config: dict[str, Any]) -> None:
    canary = Path.cwd().parent / CANARY
    for name in ("evil.py", "sitecustomize.py", "conftest.py", "tokenization_evil.py"):
        (folder / name).write_text(
            f"open({str(canary)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass T: pass\n"
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _change_json(folder / name, config)


def _change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}), encoding="utf-8")


# Paths that lead out


def _paths() -> Iterator[Artefact]:
    secret = "../outside/secret.safetensors"
    for name in (secret, "/etc/passwd", "tokenizer/../../x.safetensors", "a\0b.safetensors", ".hidden.safetensors"):

        def change(manifest: dict[str, Any], name: str = name) -> None:
            first = next(iter(manifest["files"]))
            manifest["files"][name] = manifest["files"].pop(first)
            manifest["tensors"] = dict.fromkeys(manifest["tensors"], name)

        yield Artefact(f"manifest that names {name!r}", "E4", _changed_manifest(change), READERS[2:6], True)
    for target in ("../../../outside", "/etc", "step-00000002/../../..", "step-00000002\0", "step-99999999"):
        yield Artefact(
            f"pointer best to {target!r}", "E4",
            lambda target=target: _write(RUN / "checkpoints/best", target.encode()),  # type: ignore[misc]
            (("evaluate", "runs/tiny", "--checkpoint", "best"), ("checkpoint", "list", "runs/tiny")),
        )  # fmt: skip
    links = {
        f"{CHECKPOINT}/shared.safetensors": "../../../../../outside/secret.safetensors",
        f"{CHECKPOINT}/manifest.json": "/dev/zero",
        "checkpoints/best": "/dev/zero",
        "checkpoints/latest": "../../../../outside/keep.txt",
        "recipe.yaml": "/dev/zero",
    }
    for name, target in links.items():
        yield Artefact(f"{name} that is a link to {target}", "E4", _link(RUN / name, target), READERS)
    written = {
        "metrics.jsonl": "keep.txt", "routing.jsonl": "keep.txt", "environment.json": "keep.txt", ".lock": "keep.txt",
        "logs": "folder", "report": "folder", "checkpoints": "folder", "tokenizer": "folder",
        "logs/rank-0.log": "keep.txt",
    }  # fmt: skip
    for name, target in written.items():
        outside = os.path.relpath("../outside", RUN / Path(name).parent)
        yield Artefact(
            f"run folder whose {name} is a link out of it", "E4", _link(RUN / name, f"{outside}/{target}"),
            (("train", "recipe.yaml", "training.max_steps=4"), ("report", "runs/tiny")),
        )  # fmt: skip
    step = "step-00000004"
    yield Artefact(
        "link out in the place of the next checkpoint", "E4",
        _link(RUN / "checkpoints" / step, "../../../../outside/folder"),
        (("train", "recipe.yaml", "training.max_steps=4"),),
    )  # fmt: skip
    yield Artefact(
        "link out in the place of an export", "E4", _link(Path("out/export"), "../../outside/folder"), (READERS[5],)
    )


def _link(path: Path, target: str) -> Callable[[], None]:
    def plant() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return plant


# Archives


def _archives() -> Iterator[Artefact]:
    review = b"a fine film"
    sound = {f"aclImdb/{split}/{label}/0_1.txt": review for split in ("train", "test") for label in ("pos", "neg")}

    def tar_with(*members: tarfile.TarInfo) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w:gz") as archive:
            for name, content in sound.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            for member in members:
                archive.addfile(member, io.BytesIO(bytes(member.size)))
        return data.getvalue()

    def member(name: str, **fields: Any) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(info, key, value)
        return info

    home = "aclImdb/train/pos/"
    tars = {
        "a member ../": tar_with(member(f"{home}../../../../../outside/x.txt", size=4)),
        "an absolute member": tar_with(member("/tmp/aclImdb/train/pos/9_9.txt", size=4)),
        "a symbolic link": tar_with(member(f"{home}9_9.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "a hard link": tar_with(member(f"{home}9_9.txt", type=tarfile.LNKTYPE, linkname="../../../../etc/passwd")),
        "a device": tar_with(member(f"{home}9_9.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
        "a pipe": tar_with(member(f"{home}9_9.txt", type=tarfile.FIFOTYPE)),
        "a setuid member": tar_with(member(f"{home}9_9.txt", mode=0o4777, size=4)),
        "80 MB of zeros": gzip.compress(bytes(512) + bytes(80 << 20), 9),
        "a member of 8 EB": tarred(sound, bytes)[:-1024] + member(f"{home}9_9.txt", size=1 << 62).tobuf() + bytes(1024),
        "names with escape sequences": tar_with(member(f"{home}{ESCAPE}/../9.txt", size=4)),
    }
    for what, data in tars.items():

        def plant(data: bytes = data) -> None:
            Path("a.tar.gz").write_bytes(data)
            _recipe(data={"source": "imdb", "path": "a.tar.gz", "allow_piece": True})

        yield Artefact(
            f"tar with {what}", "E7" if "MB" in what or "EB" in what else "E6", plant, DATA, "setuid" not in what
        )
    rows = b"text,label\na,0\n" * 10
    link = zipfile.ZipInfo("train.csv")
    link.external_attr = 0o120777 << 16
    bomb = zipped({"train.csv": b"text,label\n" + b"0" * (80 << 20)})
    zips = {
        "a member ../": zipped({"../train.csv": rows}),
        "an absolute member": zipped({"/train.csv": rows}),
        "a drive letter": zipped({"C:\\train.csv": rows}),
        "a link": _zip_of([(link, b"/etc/passwd")]),
        "one name twice": _zip_of([(zipfile.ZipInfo("train.csv"), rows), (zipfile.ZipInfo("train.csv"), b"text\n")]),
        "80 MB of one character": bomb,
        "an archive in an archive": zipped({"train.zip": bomb}),
        "sizes that lie": bomb.replace(struct.pack("<I", (80 << 20) + 11), struct.pack("<I", 20)),
        "a million members": _many_members(),
        "a directory that is cut off": bomb[:-30],
    }
    for what, data in zips.items():

        def plant_zip(data: bytes = data) -> None:
            Path("a.zip").write_bytes(data)
            _recipe(data={"source": "labelled", "path": "a.zip", "labels": ["0", "x"], "dev_fraction": 0.5})

        yield Artefact(f"zip with {what}", "E7" if "MB" in what or "million" in what else "E6", plant_zip, DATA, True)


def _zip_of(members: list[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    import warnings

    data = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(data, "w") as archive:
        warnings.simplefilter("ignore")
        for info, content in members:
            archive.writestr(info, content)
    return data.getvalue()


def _many_members() -> bytes:
    """An archive whose directory says it has far more members than it has."""
    data = bytearray(zipped({"train.csv": b"text,label\na,0\n"}))
    end = data.rfind(b"PK\x05\x06")
    data[end + 8 : end + 12] = struct.pack("<HH", 65535, 65535)
    return bytes(data)


# Bombs in other forms


def _bombs() -> Iterator[Artefact]:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
    yaml_bomb = f"version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{levels}\n"
    everywhere: tuple[Command, ...] = (
        ("train", "recipe.yaml"), ("validate", "recipe.yaml"), ("recipes", "copy", "recipe.yaml", "copy.yaml"),
    )  # fmt: skip
    yield Artefact(
        "YAML bomb as a recipe", "E8", lambda: _write(Path("recipe.yaml"), yaml_bomb.encode()), everywhere, True
    )
    yield Artefact(
        "YAML bomb as the recipe of a run", "E8", lambda: _write(RUN / "recipe.yaml", yaml_bomb.encode()),
        (*READERS[3:6], READERS[8], ("report", "runs/tiny")), True,
    )  # fmt: skip
    doubled = "version: 1\ndescription: ${a0}\n" + "".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}\n" for i in range(40))
    yield Artefact(
        "text that doubles 40 times", "E8", lambda: _write(Path("recipe.yaml"), doubled.encode()), everywhere, True
    )
    for key, value in {"num_layers": 10**9, "d_model": 10**12, "num_heads": 10**15}.items():
        yield Artefact(
            f"recipe with model.{key} = {value:.0e}", "E7", lambda key=key, value=value: _recipe(model={key: value}),  # type: ignore[misc]
            (("validate", "recipe.yaml"), ("train", "recipe.yaml", "name=large")), True,
        )  # fmt: skip
    line = b'{"text": "' + b"x" * (40 << 20)
    yield Artefact("row of 40 MB without an end", "E7", lambda: _data_file("rows.jsonl", line), DATA, True)
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    yield Artefact("row nested 100,000 deep", "E7", lambda: _data_file("rows.jsonl", deep), DATA, True)
    digits = b'{"text": ' + b"9" * 1_000_000 + b"}\n"
    yield Artefact("number of a million digits", "E7", lambda: _data_file("rows.jsonl", digits), DATA, True)
    wide = parquet({"text": ["x"] * 10})
    lying = wide[:-8] + struct.pack("<I", 0x7FFFFFF0) + b"PAR1"
    yield Artefact("parquet footer of 2 GB", "E7", lambda: _data_file("rows.parquet", lying), DATA, True)


def _data_file(name: str, data: bytes) -> None:
    Path(name).write_bytes(data)
    _recipe(data={"source": "records", "path": name})


# Tokenizers


def _tokenizers() -> Iterator[Artefact]:
    def saved(**changes: Any) -> Callable[[], None]:
        def plant() -> None:
            for name, data in saved_tokenizer("saved/").items():
                _write(Path(name), data)
            _change_json(Path("saved/smoe_tokenizer.json"), changes)

        return plant

    show: tuple[Command, ...] = (
        ("tokenizer", "show", "saved", "--text", "router"),
        ("train", "recipe.yaml", "name=new", "tokenizer={type: saved, path: saved}"),
    )
    yield Artefact("saved tokenizer that names ../x", "E4", saved(files=["../../outside/keep.txt"]), show, True)
    yield Artefact("saved tokenizer of 10^15 ids", "E7", saved(vocab_size=10**15), show, True)
    yield Artefact("saved tokenizer of a type with escapes", "E9", saved(type=ESCAPE), show, True)
    yield Artefact(
        "saved tokenizer whose options lead out",
        "E4",
        saved(config={"type": "word", "path": "../../outside/keep.txt"}),
        show,
    )
    yield Artefact("saved tokenizer that is a link to a device", "E4", _saved_link(), show, True)

    def transformers(files: dict[str, Any], code: bool = False) -> Callable[[], None]:
        def plant() -> None:
            for name, value in files.items():
                _write(Path("tok") / name, value if isinstance(value, bytes) else json.dumps(value).encode())
            if code:
                _with_code(Path("tok"), {})

        return plant

    use: tuple[Command, ...] = (("train", "recipe.yaml", "name=new", "tokenizer={type: transformers, path: tok}"),)
    vocabulary = b"[UNK]\n[SEP]\n[CLS]\n[PAD]\n[MASK]\nrouter\n"
    auto = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T", "trust_remote_code": True}
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": model}
    regex = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    forms: dict[str, dict[str, Any]] = {
        "that names code of its own": {"vocab.txt": vocabulary, "tokenizer_config.json": auto},
        "of a class in another module": {
            "vocab.txt": vocabulary, "tokenizer_config.json": {"tokenizer_class": "os.system"},
        },
        "of a template with code": {
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "a",
                "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            },
        },
        "with ids of 10^12": {"tokenizer.json": {**tokenizer, "model": {**model, "vocab": {"a": 10**12, "[UNK]": 1}}}},
        "with ids of 4 billion": {
            "tokenizer.json": {**tokenizer, "model": {**model, "vocab": {"a": 2**32 - 2, "[UNK]": 1}}},
        },
        "with a pattern that takes forever": {"tokenizer.json": {**tokenizer, "pre_tokenizer": regex}},
        "nested 100,000 deep": {"tokenizer.json": b'{"a":' * 100_000 + b"1" + b"}" * 100_000},
        "that names a file": {"tokenizer.json": tokenizer, "tokenizer_config.json": {"vocab_file": "/etc/passwd"}},
        "of pickles": {"tokenizer.json": pickle.dumps([1]), "tokenizer.model": pickle.dumps([1])},
    }  # fmt: skip
    for what, files in forms.items():
        yield Artefact(f"tokenizer of transformers {what}", "E2", transformers(files, code=True), use)
    spm: tuple[Command, ...] = (("train", "recipe.yaml", "name=new", "tokenizer={type: sentencepiece, path: s.model}"),)
    for what, data in {
        "of noise": os.urandom(0) + bytes(range(256)) * 40,
        "of one length of 2 GB": b"\x0a\xff\xff\xff\xff\x07",
        "of a pickle": pickle.dumps([1]),
        "that is empty": b"",
    }.items():
        yield Artefact(
            f"model of sentencepiece {what}", "E2", lambda data=data: _write(Path("s.model"), data), spm, True,  # type: ignore[misc]
        )  # fmt: skip


def _saved_link() -> Callable[[], None]:
    def plant() -> None:
        for name, data in saved_tokenizer("saved/").items():
            _write(Path(name), data)
        _link(Path("saved/vocabulary.txt"), "/dev/zero")()

    return plant


# Recipes and names


def _recipes() -> Iterator[Artefact]:
    train: tuple[Command, ...] = (
        ("train", "recipe.yaml"),
        ("validate", "recipe.yaml"),
        ("data", "prepare", "recipe.yaml"),
    )
    canary = Path.cwd().parent / CANARY
    tags = {
        "!!python/object/apply": f"!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new": f"!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
        "!!python/name": "!!python/name:os.system",
        "!!python/module": "!!python/module:antigravity",
        "${oc.env}": "${oc.env:SECRET_TOKEN}",
    }
    for what, value in tags.items():
        text = f"version: 1\ndescription: {value}\n".encode()
        yield Artefact(f"recipe with {what}", "E8", lambda text=text: _write(Path("recipe.yaml"), text), train, True)  # type: ignore[misc]
    names = (
        "../../outside/x",
        "/tmp/x",
        "-rf",
        "a/../../x",
        "a\0b",
        ESCAPE,
        "",
        ".",
        "..",
        "x" * 300,
        "con\n",
        "~root",
    )
    for name in names:
        yield Artefact(f"run name {name[:20]!r}", "E5", lambda name=name: _recipe(name=name), train[:1], True)  # type: ignore[misc]
    yield Artefact(
        "override of the name", "E5", lambda: None, (("train", "recipe.yaml", "name=../../outside/x"),), True
    )
    yield Artefact("recipe that extends a device", "E8", lambda: _link(Path("zero.yaml"), "/dev/zero")(), (
        ("train", "zero.yaml"), ("validate", "zero.yaml"), ("recipes", "show", "zero.yaml"),
    ), True)  # fmt: skip
    yield Artefact("recipe that is a pipe", "E8", lambda: os.mkfifo("pipe.yaml"), (("train", "pipe.yaml"),), True)
    yield Artefact("task of a path", "E5", lambda: _recipe(
        task={"type": "sequence_classification"},
        data={"source": "labelled", "task": "../../outside/x", "path": "rows.csv", "labels": ["a", "b"]},
    ), train[:1], True)  # fmt: skip


def _names() -> Iterator[Artefact]:
    def folder(name: str) -> Callable[[], None]:
        def plant() -> None:
            Path(name).mkdir(parents=True)
            (Path(name) / "a.txt").write_bytes(b"\xff\xfe\0" * 1000)
            _recipe(data={"source": "text", "path": f"{name}/a.txt"}, tokenizer={"type": "word"})

        return plant

    for name in (f"{ESCAPE}", "a\nerror: all is well", "\u202egpj.exe", "%s%n{0}", "[red]rich[/red]"):
        yield Artefact(f"folder named {name!r}", "E9", folder(name), DATA)
    columns = f"{ESCAPE},label\n".encode() + b"a,0\n" * 20
    yield Artefact("column named by an escape sequence", "E9", lambda: _data_file("rows.csv", columns), DATA, True)
    labels = f"text,label\na,{ESCAPE}\n".encode()

    def labelled() -> None:
        Path("train.csv").write_bytes(labels)
        _recipe(
            data={"source": "labelled", "path": "train.csv", "labels": ["0", "1"], "dev_fraction": 0.5},
            task={"type": "sequence_classification"},
        )

    yield Artefact("label that is an escape sequence", "E9", labelled, DATA, True)


# Records of runs


def _records() -> Iterator[Artefact]:
    report: tuple[Command, ...] = (("report", "runs/tiny"),)
    script = {"step": 1, "split": "<script>alert(1)</script>", "loss": 1.0, "tokens": 1}
    lines = {
        "records of other types": b'{"step": "x", "split": [1], "loss": {}}\n[]\n1\nnull\n',
        "records with scripts": json.dumps(script).encode() + b"\n",
        "a record nested deeply": b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"\n",
        "a record of 10^400": b'{"step": 1, "split": "train", "loss": ' + b"9" * 400 + b', "tokens": 1}\n',
    }
    for what, data in lines.items():
        yield Artefact(f"run with {what}", "E9", lambda data=data: _write(RUN / "metrics.jsonl", data), report)  # type: ignore[misc]
    summary: tuple[Command, ...] = (("glue", "summary", "runs/tiny"), ("glue", "submission", "runs/tiny"))
    for what, content in {
        "a list": [1],
        "a task of a path": {"task": "../x", "run": ESCAPE},
        "depth": _deep(300),
    }.items():
        yield Artefact(
            f"results that are {what}", "E9",
            lambda content=content: _write(RUN / "results.json", json.dumps(content).encode()), summary, True,  # type: ignore[misc]
        )  # fmt: skip
    owner = json.dumps({"pid": ESCAPE, "host": ESCAPE, "started": ESCAPE, "command": f"x\n{ESCAPE}"}).encode()
    yield Artefact("note of the owner with escapes", "E9", lambda: _write(RUN / ".owner.json", owner), (
        ("train", "recipe.yaml", "training.max_steps=4"),
    ))  # fmt: skip


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _recipe(**sections: Any) -> None:
    """Merges sections over the recipe in the work folder; data is replaced."""
    import yaml

    from smoe_train.config import merge

    values = yaml.safe_load(Path("recipe.yaml").read_bytes())
    Path("recipe.yaml").write_text(yaml.safe_dump(merge(values, sections)), encoding="utf-8")
