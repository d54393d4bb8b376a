"""Small sound data sets in every form that a source reads, to be damaged."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Files = Mapping[str, bytes]

WORDS = [
    "router",
    "expert",
    "token",
    "gate",
    "layer",
    "batch",
    "step",
    "loss",
    "norm",
    "rank",
    "shard",
    "send",
    "merge",
    "plan",
    "sort",
    "score",
    "the",
    "of",
    "and",
    "to",
]
REVIEWS = {"neg": "dull", "pos": "great"}


@dataclass(frozen=True)
class Sample:
    """A data set.

    Attributes:
        name: What it is, for messages.
        files: Its files by their paths in a folder.
        data: The data section of a recipe; every value ``@`` stands for the folder, ``@/x`` for a file in it.
        labelled: Whether it holds examples rather than text.
        tokenizer: The tokenizer section, in the same form.
    """

    name: str
    files: Files
    data: Mapping[str, Any]
    labelled: bool = False
    tokenizer: Mapping[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Writes the files."""
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)

    def sections(self, folder: Path) -> dict[str, Any]:
        """Returns the sections of a recipe that uses it in a folder."""

        def placed(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                key: f"{folder}{value[1:]}" if isinstance(value, str) and value.startswith("@") else value
                for key, value in values.items()
            }

        found: dict[str, Any] = {"version": 1, "data": placed(self.data)}
        if self.labelled:
            found["task"] = {"type": "sequence_classification"}
        if self.tokenizer is not None:
            found["tokenizer"] = placed(self.tokenizer)
        return found


def samples() -> list[Sample]:
    """Returns data sets of every source, in every form of file and archive, and of every tokenizer with files."""
    return [*_texts(), *_labelled(), *_glue(), *_tokenizers()]


def lines(count: int, seed: int = 0) -> list[str]:
    """Returns lines of words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(count)]


def zipped(files: Files) -> bytes:
    """Returns a zip archive."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return data.getvalue()


def tarred(files: Files, compress: Callable[[bytes], bytes] = lambda data: gzip.compress(data, mtime=0)) -> bytes:
    """Returns a tar archive, compressed by gzip unless said otherwise."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return compress(data.getvalue())


def parquet(columns: Mapping[str, list[Any]]) -> bytes:
    """Returns a parquet file."""
    import pyarrow
    import pyarrow.parquet

    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), data)
    return data.getvalue()


def _jsonl(columns: Mapping[str, list[Any]]) -> bytes:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _separated(columns: Mapping[str, list[Any]], separator: str, header: bool = True) -> bytes:
    rows = [*([list(columns)] if header else []), *zip(*columns.values(), strict=True)]
    return "".join(separator.join(map(str, row)) + "\n" for row in rows).encode()


FORMS: Mapping[str, Callable[[Mapping[str, list[Any]]], bytes]] = {
    "jsonl": _jsonl,
    "csv": lambda columns: _separated(columns, ","),
    "tsv": lambda columns: _separated(columns, "\t"),
    "parquet": parquet,
}


def _texts() -> list[Sample]:
    text = "\n".join(lines(300)).encode()
    sizes = {"train_bytes": len(text) - 800, "valid_bytes": 400, "test_bytes": 400}
    letters = text.replace(b"\n", b" ")
    articles = "".join(f" \n = Title {i} = \n \n {line} \n" for i, line in enumerate(lines(40))).encode()
    wiki = {f"wikitext-2/wiki.{split}.tokens": articles for split in ("train", "valid", "test")}
    wikitext = {"source": "wikitext", "name": "wikitext-2", "allow_piece": True}
    rows = [line.decode() if line.strip() else "" for line in articles.splitlines(keepends=True)]
    names = {"train": "train", "valid": "validation", "test": "test"}
    numbers, places = {}, {"train": (0, -800), "valid": (-800, -400), "test": (-400, None)}
    for split, (start, stop) in places.items():
        numbers[f"{split}.txt"] = " ".join("\n" if one == 10 else str(one) for one in text[start:stop]).encode()
    dump = b"".join(b'<page><text xml:space="preserve">%b</text></page>\n' % line for line in text.split(b"\n"))
    found = [
        Sample("text, one file", {"a.txt": text}, {"source": "text", "path": "@/a.txt"}),
        Sample("text, a folder", {f"{i}.txt": text for i in range(3)}, {"source": "text", "path": "@"}),
        Sample("enwik8, a piece", {"enwik8": text}, {"source": "enwik8", "path": "@/enwik8", **sizes}),
        Sample(
            "enwik8, zip", {"enwik8.zip": zipped({"enwik8": text})},
            {"source": "enwik8", "path": "@/enwik8.zip", **sizes},
        ),
        Sample("enwik8, decimal numbers", numbers, {"source": "enwik8", "path": "@", **sizes}),
        Sample("text8, a piece", {"text8": letters}, {"source": "text8", "path": "@/text8", **sizes}),
        Sample(
            "text8 of a dump, zip", {"enwik9.zip": zipped({"enwik9": dump})},
            {"source": "text8", "dump_path": "@/enwik9.zip", **sizes},
        ),
        Sample("wikitext, folder", wiki, {**wikitext, "path": "@"}),
        Sample("wikitext, zip", {"w.zip": zipped(wiki)}, {**wikitext, "path": "@/w.zip"}),
        Sample(
            "wikitext, parquet",
            {f"{names[split]}-00000-of-00001.parquet": parquet({"text": rows}) for split in names},
            {**wikitext, "path": "@"},
        ),
        Sample(
            "records, shards in a folder",
            {f"data/train-0000{i}-of-00002.parquet": parquet({"text": lines(80, i)}) for i in range(2)},
            {"source": "records", "path": "@"},
        ),
    ]  # fmt: skip
    for form, write in FORMS.items():
        columns = {"text": lines(150), "n": list(range(150))}
        found.append(
            Sample(f"records, {form}", {f"r.{form}": write(columns)}, {"source": "records", "path": f"@/r.{form}"})
        )
    return found


def _labelled() -> list[Sample]:
    draw = random.Random(1)
    columns = {
        split: {"text": lines(count, count), "label": [draw.choice(["low", "high"]) for _ in range(count)]}
        for split, count in (("train", 60), ("dev", 20))
    }
    labelled = {"source": "labelled", "path": "@", "labels": ["low", "high"]}
    found = [
        Sample(
            f"labelled, {form}", {f"{split}.{form}": write(columns[split]) for split in columns}, labelled, True
        )
        for form, write in FORMS.items()
    ]  # fmt: skip
    packed = zipped({f"{split}.csv": FORMS["csv"](columns[split]) for split in columns})
    found.append(Sample("labelled, zip", {"set.zip": packed}, {**labelled, "path": "@/set.zip"}, True))
    reviews = {
        f"aclImdb/{split}/{label}/{i}_5.txt": f"{line} {word}<br /><br />end".encode()
        for split in ("train", "test")
        for label, word in REVIEWS.items()
        for i, line in enumerate(lines(15))
    }
    imdb = {"source": "imdb", "allow_piece": True}
    found += [
        Sample("imdb, tar.gz", {"aclImdb_v1.tar.gz": tarred(reviews)}, {**imdb, "path": "@/aclImdb_v1.tar.gz"}, True),
        Sample("imdb, tar", {"a.tar": tarred(reviews, bytes)}, {**imdb, "path": "@/a.tar"}, True),
        Sample("imdb, folder", reviews, {**imdb, "path": "@"}, True),
    ]
    sst = {
        f"{split}.txt": "".join(f"__label__{1 + i % 5}\t{line}\n" for i, line in enumerate(lines(count))).encode()
        for split, count in (("train", 50), ("dev", 10), ("test", 10))
    }
    trees = dict.fromkeys(
        ("trees/train.txt", "trees/dev.txt", "trees/test.txt"),
        b"(3 (2 a) (2 film))\n(1 (2 -LRB-) (0 (2 dull) (1 one)))\n" * 20,
    )
    sst5 = {"source": "sst5", "allow_piece": True, "path": "@"}
    found += [
        Sample("sst5, fastText", sst, sst5, True),
        Sample("sst5, trees", trees, sst5, True),
        Sample("sst5, zip", {"s.zip": zipped(trees)}, {**sst5, "path": "@/s.zip"}, True),
    ]
    from smoe_train.data.sources.banking77 import INTENTS

    questions = {
        f"{split}.csv": _separated({"text": lines(40), "category": [draw.choice(INTENTS) for _ in range(40)]}, ",")
        for split in ("train", "test")
    }
    bank = {**questions, "categories.json": json.dumps(INTENTS).encode()}
    found.append(Sample("banking77", bank, {"source": "banking77", "allow_piece": True, "path": "@"}, True))
    return found


def _glue() -> list[Sample]:
    count = 30
    pair = {"index": [*range(count)], "sentence1": lines(count), "sentence2": lines(count, 1)}
    rte = {**pair, "label": ["entailment", "not_entailment"] * (count // 2)}
    files = {f"RTE/{split}.tsv": FORMS["tsv"](rte) for split in ("train", "dev")}
    files["RTE/test.tsv"] = FORMS["tsv"](pair)
    cola = {"source": ["gj04"] * count, "label": [0, 1] * (count // 2), "judgement": [""] * count, "s": lines(count)}
    acceptable = {f"CoLA/{split}.tsv": _separated(cola, "\t", header=False) for split in ("train", "dev")}
    stsb = {**pair, "score": [i % 6 * 0.9 for i in range(count)]}
    mnli = {"premise": lines(count), "hypothesis": lines(count, 1), "label": [0, 1, 2] * (count // 3)}
    splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    hub = {
        f"mnli/{split}.parquet": parquet({**mnli, "label": [-1] * count} if "test" in split else mnli)
        for split in splits
    }
    glue = {"source": "glue", "allow_piece": True, "path": "@"}
    return [
        Sample("glue rte, tsv", files, {**glue, "task": "rte"}, True),
        Sample("glue rte, zip", {"RTE.zip": zipped(files)}, {**glue, "task": "rte", "path": "@/RTE.zip"}, True),
        Sample("glue cola, tsv without header", acceptable, {**glue, "task": "cola"}, True),
        Sample(
            "glue stsb, tsv", {f"STS-B/{split}.tsv": FORMS["tsv"](stsb) for split in ("train", "dev")},
            {**glue, "task": "stsb"}, True,
        ),
        Sample("glue mnli, parquet", hub, {**glue, "task": "mnli"}, True),
    ]  # fmt: skip


def _tokenizers() -> list[Sample]:
    text = "\n".join(lines(60)).encode()
    data = {"source": "text", "path": "@/text/a.txt"}
    base = {"text/a.txt": text}
    vocabulary = "".join(f"{word}\n" for word in WORDS).encode()
    return [
        Sample("word vocabulary", {**base, "v.txt": vocabulary}, data, False, {"type": "word", "path": "@/v.txt"}),
        Sample(
            "tokenizer of transformers, tokenizer.json", {**base, **tokenizer_of_transformers("t/")}, data, False,
            {"type": "transformers", "path": "@/t"},
        ),
        Sample(
            "tokenizer of transformers, vocab.txt",
            {**base, "t/vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]).encode()}, data,
            False, {"type": "transformers", "path": "@/t"},
        ),
        Sample(
            "model of sentencepiece", {**base, "s.model": sentencepiece_model()}, data, False,
            {"type": "sentencepiece", "path": "@/s.model"},
        ),
        Sample("saved tokenizer", {**base, **saved_tokenizer("k/")}, data, False, {"type": "saved", "path": "@/k"}),
    ]  # fmt: skip


def tokenizer_of_transformers(prefix: str) -> dict[str, bytes]:
    """Returns the files of a small tokenizer of transformers, by their paths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "</s>", *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "[UNK]"}
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}
    return {f"{prefix}{name}": text.encode() for name, text in files.items()}


def sentencepiece_model() -> bytes:
    """Returns a small model of SentencePiece."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines(200)), model_writer=model, vocab_size=40, minloglevel=2, num_threads=1
    )
    return model.getvalue()


def saved_tokenizer(prefix: str) -> dict[str, bytes]:
    """Returns the files of a saved word tokenizer, by their paths."""
    import tempfile

    from smoe_train.data import save_tokenizer
    from smoe_train.data.tokenizers.word import WordConfig, WordTokenizer

    words = [b"<unk>", b"<eos>", *(word.encode() for word in WORDS)]
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(WordTokenizer(WordConfig(), words), Path(folder) / "t")
        return {f"{prefix}{path.name}": path.read_bytes() for path in (Path(folder) / "t").iterdir()}
