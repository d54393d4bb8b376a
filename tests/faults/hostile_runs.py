"""Hostile runs, checkpoints and exports: pickles, manifests that lie, links, and records."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults.hostile_artefacts import (
    CACHED,
    CHECKPOINT,
    DATA,
    ESCAPE,
    EXPORT,
    FROM_EXPORT,
    READERS,
    RUN,
    Artefact,
    Command,
    add_code,
    change_json,
    change_recipe,
    deep,
    link,
    payloads,
    write,
)


def hostile_runs() -> list[Artefact]:
    """Returns the artefacts of this file."""
    return [*_pickles(), *_checkpoints(), *_paths(), *_records()]


def _pickles() -> Iterator[Artefact]:
    kinds = list(payloads())

    def write(path: Path, kind: str) -> Callable[[], None]:
        def plant() -> None:
            write(path, payloads()[kind])
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
            (*DATA, ("tokenizer", "train", "--input", "corpus.txt", "--type", "word", "--output", "out/t")),
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
            change_recipe(data={**source, "path": name})

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
        "a state nested deeply": lambda m: m["state"].update(train=deep(400)),
        "no format 1 state": lambda m: (m.update(format=1, state={"step": 2}), m.pop("tensor_sha256", None)),
    }
    for what, change in changes.items():
        yield Artefact(f"signed manifest with {what}", "E4", _changed_manifest(change), READERS)
    yield Artefact(
        "manifest nested 100,000 deep", "E8",
        lambda: write(RUN / CHECKPOINT / "manifest.json", b"[" * 100_000 + b"]" * 100_000), READERS,
    )  # fmt: skip
    index = json.dumps({"weight_map": {"model.embed.weight": "../../secret.safetensors"}}).encode()
    yield Artefact(
        "index of an export that names a file outside", "E4",
        lambda: write(EXPORT / "model.safetensors.index.json", index), FROM_EXPORT, True,
    )  # fmt: skip
    remote = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}}
    yield Artefact("code beside an export (auto_map)", "E10", lambda: add_code(EXPORT, remote), FROM_EXPORT)
    for name, value in {
        "num_layers": 10**9,
        "router": {"type": ESCAPE},
        "moe_layers": [10**12],
        "d_model": 10**15,
    }.items():
        yield Artefact(
            f"config.json of an export with {name} = {str(value)[:20]!r}", "E7",
            lambda name=name, value=value: change_json(EXPORT / "config.json", {name: value}), FROM_EXPORT, True,  # type: ignore[misc]
        )  # fmt: skip


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
            lambda target=target: write(RUN / "checkpoints/best", target.encode()),  # type: ignore[misc]
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
        yield Artefact(f"{name} that is a link to {target}", "E4", link(RUN / name, target), READERS)
    written = {
        "metrics.jsonl": "keep.txt", "routing.jsonl": "keep.txt", "environment.json": "keep.txt", ".lock": "keep.txt",
        "logs": "folder", "report": "folder", "checkpoints": "folder", "tokenizer": "folder",
        "logs/rank-0.log": "keep.txt",
    }  # fmt: skip
    for name, target in written.items():
        outside = os.path.relpath("../outside", RUN / Path(name).parent)
        yield Artefact(
            f"run folder whose {name} is a link out of it", "E4", link(RUN / name, f"{outside}/{target}"),
            (("train", "recipe.yaml", "training.max_steps=4"), ("report", "runs/tiny")),
        )  # fmt: skip
    step = "step-00000004"
    yield Artefact(
        "link out in the place of the next checkpoint", "E4",
        link(RUN / "checkpoints" / step, "../../../../outside/folder"),
        (("train", "recipe.yaml", "training.max_steps=4"),),
    )  # fmt: skip
    yield Artefact(
        "link out in the place of an export", "E4", link(Path("out/export"), "../../outside/folder"), (READERS[5],)
    )


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
        yield Artefact(f"run with {what}", "E9", lambda data=data: write(RUN / "metrics.jsonl", data), report)  # type: ignore[misc]
    summary: tuple[Command, ...] = (("glue", "summary", "runs/tiny"), ("glue", "submission", "runs/tiny"))
    for what, content in {
        "a list": [1],
        "a task of a path": {"task": "../x", "run": ESCAPE},
        "depth": deep(300),
    }.items():
        yield Artefact(
            f"results that are {what}", "E9",
            lambda content=content: write(RUN / "results.json", json.dumps(content).encode()), summary, True,  # type: ignore[misc]
        )  # fmt: skip
    owner = json.dumps({"pid": ESCAPE, "host": ESCAPE, "started": ESCAPE, "command": f"x\n{ESCAPE}"}).encode()
    yield Artefact("note of the owner with escapes", "E9", lambda: write(RUN / ".owner.json", owner), (
        ("train", "recipe.yaml", "training.max_steps=4"),
    ))  # fmt: skip
