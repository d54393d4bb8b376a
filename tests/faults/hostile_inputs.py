"""Hostile inputs: archives, bombs, tokenizers, recipes and names."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.hostile_artefacts import (
    CANARY,
    DATA,
    ESCAPE,
    READERS,
    RUN,
    Artefact,
    Command,
    add_code,
    change_json,
    change_recipe,
    link,
    write,
)
from faults.sample_data import parquet, saved_tokenizer, tarred, zipped


def hostile_inputs() -> list[Artefact]:
    """Returns the artefacts of this file."""
    return [*_archives(), *_bombs(), *_tokenizers(), *_recipes(), *_names()]


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
            change_recipe(data={"source": "imdb", "path": "a.tar.gz", "allow_piece": True})

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
            change_recipe(data={"source": "labelled", "path": "a.zip", "labels": ["0", "x"], "dev_fraction": 0.5})

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


def _bombs() -> Iterator[Artefact]:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
    yaml_bomb = f"version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{levels}\n"
    everywhere: tuple[Command, ...] = (
        ("train", "recipe.yaml"), ("validate", "recipe.yaml"), ("recipes", "copy", "recipe.yaml", "copy.yaml"),
    )  # fmt: skip
    yield Artefact(
        "YAML bomb as a recipe", "E8", lambda: write(Path("recipe.yaml"), yaml_bomb.encode()), everywhere, True
    )
    yield Artefact(
        "YAML bomb as the recipe of a run", "E8", lambda: write(RUN / "recipe.yaml", yaml_bomb.encode()),
        (*READERS[3:6], READERS[8], ("report", "runs/tiny")), True,
    )  # fmt: skip
    doubled = "version: 1\ndescription: ${a0}\n" + "".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}\n" for i in range(40))
    yield Artefact(
        "text that doubles 40 times", "E8", lambda: write(Path("recipe.yaml"), doubled.encode()), everywhere, True
    )
    for key, value in {"num_layers": 10**9, "d_model": 10**12, "num_heads": 10**15}.items():
        yield Artefact(
            f"recipe with model.{key} = {value:.0e}", "E7",
            lambda key=key, value=value: change_recipe(model={key: value}),  # type: ignore[misc]
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
    change_recipe(data={"source": "records", "path": name})


def _tokenizers() -> Iterator[Artefact]:
    def saved(**changes: Any) -> Callable[[], None]:
        def plant() -> None:
            for name, data in saved_tokenizer("saved/").items():
                write(Path(name), data)
            change_json(Path("saved/smoe_tokenizer.json"), changes)

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
                write(Path("tok") / name, value if isinstance(value, bytes) else json.dumps(value).encode())
            if code:
                add_code(Path("tok"), {})

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
            f"model of sentencepiece {what}", "E2", lambda data=data: write(Path("s.model"), data), spm, True,  # type: ignore[misc]
        )  # fmt: skip


def _saved_link() -> Callable[[], None]:
    def plant() -> None:
        for name, data in saved_tokenizer("saved/").items():
            write(Path(name), data)
        link(Path("saved/vocabulary.txt"), "/dev/zero")()

    return plant


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
        yield Artefact(f"recipe with {what}", "E8", lambda text=text: write(Path("recipe.yaml"), text), train, True)  # type: ignore[misc]
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
        yield Artefact(f"run name {name[:20]!r}", "E5", lambda name=name: change_recipe(name=name), train[:1], True)  # type: ignore[misc]
    yield Artefact(
        "override of the name", "E5", lambda: None, (("train", "recipe.yaml", "name=../../outside/x"),), True
    )
    yield Artefact("recipe that extends a device", "E8", lambda: link(Path("zero.yaml"), "/dev/zero")(), (
        ("train", "zero.yaml"), ("validate", "zero.yaml"), ("recipes", "show", "zero.yaml"),
    ), True)  # fmt: skip
    yield Artefact("recipe that is a pipe", "E8", lambda: os.mkfifo("pipe.yaml"), (("train", "pipe.yaml"),), True)
    yield Artefact("task of a path", "E5", lambda: change_recipe(
        task={"type": "sequence_classification"},
        data={"source": "labelled", "task": "../../outside/x", "path": "rows.csv", "labels": ["a", "b"]},
    ), train[:1], True)  # fmt: skip


def _names() -> Iterator[Artefact]:
    def folder(name: str) -> Callable[[], None]:
        def plant() -> None:
            Path(name).mkdir(parents=True)
            (Path(name) / "a.txt").write_bytes(b"\xff\xfe\0" * 1000)
            change_recipe(data={"source": "text", "path": f"{name}/a.txt"}, tokenizer={"type": "word"})

        return plant

    for name in (f"{ESCAPE}", "a\nerror: all is well", "\u202egpj.exe", "%s%n{0}", "[red]rich[/red]"):
        yield Artefact(f"folder named {name!r}", "E9", folder(name), DATA)
    columns = f"{ESCAPE},label\n".encode() + b"a,0\n" * 20
    yield Artefact("column named by an escape sequence", "E9", lambda: _data_file("rows.csv", columns), DATA, True)
    labels = f"text,label\na,{ESCAPE}\n".encode()

    def labelled() -> None:
        Path("train.csv").write_bytes(labels)
        change_recipe(
            data={"source": "labelled", "path": "train.csv", "labels": ["0", "1"], "dev_fraction": 0.5},
            task={"type": "sequence_classification"},
        )

    yield Artefact("label that is an escape sequence", "E9", labelled, DATA, True)
