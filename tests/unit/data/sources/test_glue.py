import io
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from smoe_train.data import build_source
from smoe_train.data.examples import Example
from smoe_train.data.reading import download
from smoe_train.data.reading.glue_tasks import GLUE_TASKS
from smoe_train.data.sources import hub
from smoe_train.data.sources.glue import GlueConfig
from smoe_train.errors import DataError
from tests.support.real_data import DATA, needs_real_data

RTE = "index\tsentence1\tsentence2\tlabel\n"
RTE_ROWS = [
    Example('A man said "no.', "He spoke.", 0, 0),
    Example("It rained.", "It was 'dry'.", 1, 1),
    Example("Über uns.", "Nothing.", 1, 2),
]
RTE_TSV = (
    RTE + '0\tA man said "no.\tHe spoke.\tentailment\n'
    "1\tIt rained.\tIt was 'dry'.\tnot_entailment\n2\tÜber uns.\tNothing.\tnot_entailment\n"
)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / f"{name}.tsv"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def load(task, path=None, cache=None, **options):
    options.setdefault("allow_piece", True)
    return build_source(GlueConfig(task=task, path=path, **options)).load(cache or path)


def only(task, folder, split="train", **options):
    return load(task, folder, splits=[split], **options).splits[split]


# The original files, each with its traps.


def test_cola_has_a_header_in_test_alone(tmp_path):
    write(
        tmp_path / "CoLA",
        train="gj04\t1\t\tHe said \"go.\ngj04\t0\t*\tHe said'd.\n",
        dev="gj04\t0\t*\tGo he.\n",
        test="index\tsentence\n0\tWho?\n1\tWhom?\n",
    )
    splits = load("cola", tmp_path).splits
    assert splits["train"] == [Example('He said "go.', None, 1, 0), Example("He said'd.", None, 0, 1)]
    assert splits["dev"] == [Example("Go he.", None, 0, 0)]
    assert splits["test"] == [Example("Who?", None, None, 0), Example("Whom?", None, None, 1)]


def test_sst2_sentences_lose_the_space_before_the_tab(tmp_path):
    write(
        tmp_path,
        train="sentence\tlabel\nfine film \t1\n",
        dev="sentence\tlabel\nbad \t0\n",
        test="index\tsentence\n5\tso so\n",
    )
    splits = load("sst2", tmp_path).splits
    assert splits["train"] == [Example("fine film", None, 1, 0)]
    assert splits["test"] == [Example("so so", None, None, 5)]


def test_mrpc_begins_with_a_bom_and_has_odd_column_names(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    row = '1\t10\t11\tHe said.\t"He spoke.\n'
    test = "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tOne.\tTwo.\n"
    splits = load("mrpc", write(tmp_path, train=header + row, dev=header + row, test=test)).splits
    assert splits["train"] == [Example("He said.", '"He spoke.', 1, 0)]
    assert splits["test"] == [Example("One.", "Two.", None, 0)]


def test_mrpc_as_its_authors_publish_it_is_divided_by_the_ids_of_the_dev_rows(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = "".join(f"{n % 2}\t{n}\t{n + 1}\tfirst {n}\tsecond {n}\r\n" for n in range(4))
    (tmp_path / "msr_paraphrase_train.txt").write_text(header + rows, newline="")
    (tmp_path / "msr_paraphrase_test.txt").write_text(header + rows, newline="")
    (tmp_path / "mrpc_dev_ids.tsv").write_text("1\t2\n3\t4\n")
    splits = load("mrpc", tmp_path).splits
    assert [one.first for one in splits["train"]] == ["first 0", "first 2"]
    assert [one.first for one in splits["dev"]] == ["first 1", "first 3"]
    assert len(splits["test"]) == 4


def test_stsb_has_ten_columns_and_nine_in_test(tmp_path):
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
    row = "{}\tnews\tf\t2012\t7\tn\tn\tA plane.\tA bird."
    train = f"{header}\tscore\n{row.format(0)}\t3.800\n{row.format(1)}\t0\n"
    splits = load("stsb", write(tmp_path, train=train, dev=train, test=f"{header}\n{row.format(4)}\n")).splits
    assert splits["train"] == [Example("A plane.", "A bird.", 3.8, 0), Example("A plane.", "A bird.", 0.0, 1)]
    assert splits["test"] == [Example("A plane.", "A bird.", None, 4)]


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
QQP_ROWS = "7\t1\t2\tHow? Why? 0\n8\t3\t4\tWho?\tWho is?\t1\n9\t5\t6\tWhen?\tWhere?\t0\n10\t3\n"


@pytest.mark.parametrize("header", [QQP, "", QQP.replace("\n", "\r\n")])
def test_qqp_rows_with_too_few_tabs_are_skipped_and_counted(tmp_path, header):
    corpus = load("qqp", write(tmp_path, train=header + QQP_ROWS), splits=["train"])
    assert corpus.splits["train"] == [Example("Who?", "Who is?", 1, 8), Example("When?", "Where?", 0, 9)]
    assert corpus.skipped == {"train.tsv: too few tabs": 2}


def test_mnli_has_two_dev_and_two_test_splits(tmp_path):
    middle = "promptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    header, row = f"index\t{middle}\tsentence1\tsentence2", "{}\t1\t1e\tfiction\t(\t(\t(\t(\tA dog.\tA cat."
    labels = "".join(f"\tlabel{n}" for n in range(1, 6))
    train = f"{header}\tlabel1\tgold_label\n{row.format(0)}\tneutral\tneutral\n"
    dev = f"{header}{labels}\tgold_label\n{row.format(0)}{5 * ' x'}\t{{}}\n".replace(" x", "\tneutral")
    write(
        tmp_path / "MNLI",
        train=train,
        dev_matched=dev.format("contradiction"),
        dev_mismatched=dev.format("entailment"),
        test_matched=f"{header}\n{row.format(3)}\n",
        test_mismatched=f"{header}\n{row.format(4)}\n",
    )
    corpus = load("mnli", tmp_path)
    assert list(corpus.splits) == ["train", "dev", "dev_mismatched", "test", "test_mismatched"]
    assert {name: rows[0].label for name, rows in corpus.splits.items()} == {
        "train": 1,
        "dev": 2,
        "dev_mismatched": 0,
        "test": None,
        "test_mismatched": None,
    }
    assert corpus.splits["test_mismatched"] == [Example("A dog.", "A cat.", None, 4)]
    assert corpus.task.submissions == {"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}


def test_what_to_leave_out_of_mnli_keeps_the_dev_split_that_is_cut(tmp_path):
    write(tmp_path, train="premise\thypothesis\tlabel\na\tb\tneutral\n")
    with pytest.raises(DataError, match=r"no dev_mismatched split .*or data\.splits=\[train,dev\] to go without"):
        load("mnli", tmp_path / "train.tsv", dev_fraction=0.5)


def test_qnli_and_rte_have_labels_in_words_and_wnli_in_digits(tmp_path):
    qnli = "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tnot_entailment\n1\tWhat?\tIt.\tentailment\n"
    assert [one.label for one in only("qnli", write(tmp_path / "QNLI", train=qnli).parent)] == [1, 0]
    assert only("rte", write(tmp_path / "RTE", train=RTE_TSV).parent) == RTE_ROWS
    wnli = RTE + "0\tHe.\tShe.\t1\n"
    assert [one.label for one in only("wnli", write(tmp_path / "WNLI", train=wnli).parent)] == [1]


def test_ax_has_only_a_test_split(tmp_path):
    write(tmp_path, AX="index\tsentence1\tsentence2\n3\tA cat.\tNo cat.\n")
    for path in (tmp_path, tmp_path / "AX.tsv"):
        corpus = load("ax", path)
        assert corpus.splits == {"test": [Example("A cat.", "No cat.", None, 3)]}
    assert corpus.task.labels == GLUE_TASKS["mnli"].info.labels


# Other layouts.


def test_crlf_copies_are_the_same(tmp_path):
    write(tmp_path / "lf", train=RTE_TSV)
    write(tmp_path / "crlf", train=RTE_TSV.replace("\n", "\r\n"))
    assert only("rte", tmp_path / "lf") == only("rte", tmp_path / "crlf")


def columns(rows, **more):
    return {
        "sentence1": [one.first for one in rows],
        "sentence2": [one.second for one in rows],
        "label": [-1 if one.label is None else one.label for one in rows],
        "idx": [one.index for one in rows],
        **more,
    }


def test_tsv_jsonl_csv_and_parquet_agree(tmp_path):
    table = pa.table(columns(RTE_ROWS))
    write(tmp_path / "tsv", train=RTE_TSV)
    for name in ("parquet/rte", "jsonl", "csv"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(2):
        shard = tmp_path / "parquet" / "rte" / f"train-{number:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(table.slice(2 * number, 2), shard)
    pyarrow.parquet.write_table(
        pa.table(columns([Example("a", "b", None, 0)])), tmp_path / "parquet" / "rte" / "test.parquet"
    )
    table.to_pandas().to_json(tmp_path / "jsonl" / "train.jsonl", orient="records", lines=True)
    table.to_pandas().to_csv(tmp_path / "csv" / "train.csv", index=False)
    found = {name: load("rte", tmp_path / name, splits=["train"]) for name in ("tsv", "parquet", "jsonl", "csv")}
    for corpus in found.values():
        assert corpus.splits["train"] == RTE_ROWS
    assert len({corpus.fingerprint for corpus in found.values()}) == 1
    assert only("rte", tmp_path / "parquet", "test") == [Example("a", "b", None, 0)]


@needs_real_data
def test_tsv_and_parquet_agree_on_all_of_rte():
    options = {"splits": ["train"], "allow_piece": False}
    tsv = load("rte", DATA / "glue_data", **options)
    parquet = load("rte", DATA / "glue_hf_parquet", **options)
    assert len(tsv.splits["train"]) == 2_490
    for one, other in zip(tsv.splits["train"], parquet.splits["train"], strict=True):
        assert one == other
    assert tsv.fingerprint == parquet.fingerprint


@needs_real_data
@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("cola", {"train": 8_551, "dev": 1_043, "test": 1_063}),
        ("sst2", {"train": 67_349, "dev": 872, "test": 1_821}),
        ("mrpc", {"train": 3_668, "dev": 408}),
        ("wnli", {"train": 635, "dev": 71}),
    ],
)
def test_real_splits_are_whole(task, rows):
    splits = load(task, DATA / "glue_data", splits=list(rows), allow_piece=False).splits
    assert {name: len(found) for name, found in splits.items()} == rows
    assert {one.label for one in splits["train"]} == {0, 1}


@needs_real_data
def test_real_pieces_need_explicit_settings(tmp_path):
    stsb = load("stsb", DATA / "glue_data", splits=["train"], allow_piece=False).splits["train"]
    assert len(stsb) == 5_749
    assert {min(one.label for one in stsb), max(one.label for one in stsb)} == {0.0, 5.0}
    piece = DATA / "glue_data" / "QQP" / "piece.rows0-11999.tsv"
    qqp = load("qqp", piece, dev_fraction=0.1, train_rows=4_000)
    assert {name: len(rows) for name, rows in qqp.splits.items()} == {"train": 4_000, "dev": 1_200}
    assert qqp.skipped == {"piece.rows0-11999.tsv: too few tabs": 1}
    with pytest.raises(DataError, match=r"has 11,999 rows, and the train split of glue-qqp has 363,846.*allow_piece"):
        load("qqp", piece, dev_fraction=0.1, allow_piece=False)
    qnli = load("qnli", DATA / "glue_data" / "QNLI" / "dev.rows0-2999.tsv", dev_fraction=0.1)
    assert {name: len(rows) for name, rows in qnli.splits.items()} == {"train": 2_700, "dev": 300}
    mnli = only("mnli", None, "dev", dev_path=DATA / "mnli" / "dev_matched.rows0-5999.jsonl", cache=tmp_path)
    assert len(mnli) == 6_000


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_the_official_archive_is_read_as_it_is(tmp_path):
    archive = zipped(tmp_path / "RTE.zip", **{"RTE/train.tsv": RTE_TSV, "RTE/dev.tsv": RTE_TSV, "RTE/readme.txt": "x"})
    assert load("rte", archive, splits=["train", "dev"]).splits == {"train": RTE_ROWS, "dev": RTE_ROWS}
    source = build_source(GlueConfig(task="rte", path=archive, splits=["train", "dev"]))
    assert source.files(tmp_path) == [archive]


def test_the_official_archive_is_fetched_if_asked_for(tmp_path, monkeypatch):
    def fetch(file, cache, remedy):
        assert (file.name, file.num_bytes) == ("RTE.zip", 697_150)
        path = download.location(file, cache)
        path.parent.mkdir()
        return zipped(path, **{f"RTE/{split}.tsv": RTE_TSV for split in ("train", "dev", "test")})

    monkeypatch.setattr(download, "fetch", fetch)
    source = build_source(GlueConfig(task="rte", fetch="archive", allow_piece=True))
    assert source.files(tmp_path) == [tmp_path / "downloads" / "RTE.zip"]
    assert source.load(tmp_path).splits["dev"] == RTE_ROWS


def test_without_path_rows_come_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def read_hub(name, config, split, revision):
        asked.append((name, config, split, revision))
        label = -1 if split.startswith("test") else 2
        yield 1, {"premise": f"{split} ", "hypothesis": "h", "label": label, "idx": 5}

    monkeypatch.setattr(hub, "read_hub", read_hub)
    source = build_source(GlueConfig(task="mnli", revision="abc", allow_piece=True))
    splits = source.load(tmp_path).splits
    assert source.files(tmp_path) is None
    assert asked[1] == ("nyu-mll/glue", "mnli", "validation_matched", "abc")
    assert splits["dev_mismatched"] == [Example("validation_mismatched", "h", 2, 5)]
    assert splits["test"] == [Example("test_matched", "h", None, 5)]


# Splits and pieces.


def test_a_piece_is_refused_unless_allowed(tmp_path, monkeypatch):
    write(tmp_path, train=RTE_TSV)
    with pytest.raises(
        DataError, match=r"train\.tsv: has 3 rows, and the train split of glue-rte has 2,490;.*allow_pi"
    ):
        only("rte", tmp_path, allow_piece=False)
    monkeypatch.setitem(GLUE_TASKS["rte"].rows, "train", 3)
    assert only("rte", tmp_path, allow_piece=False) == RTE_ROWS


def test_missing_splits_need_explicit_settings(tmp_path, caplog):
    write(tmp_path / "RTE", train=RTE_TSV)
    with pytest.raises(DataError, match=r"glue-rte: has no dev split at .* \(there are: train\); .*dev_fraction=0.1"):
        load("rte", tmp_path)
    assert load("rte", tmp_path, splits=["train"]).splits == {"train": RTE_ROWS}
    assert not caplog.records
    splits = load("rte", tmp_path, dev_fraction=0.34).splits
    assert (len(splits["train"]), len(splits["dev"])) == (2, 1)
    assert "glue-rte: there is no test split" in caplog.text
    with pytest.raises(DataError, match=r"has no train split at .*expected train\.tsv, dev\.tsv, test\.tsv, or the sa"):
        load("cola", tmp_path)


def test_single_files_replace_those_of_the_folder(tmp_path):
    write(tmp_path / "RTE", train=RTE_TSV, dev=RTE_TSV)
    other = write(tmp_path / "other", some=RTE + "9\ta\tb\tentailment\n") / "some.tsv"
    splits = load("rte", tmp_path, dev_path=other).splits
    assert splits == {"train": RTE_ROWS, "dev": [Example("a", "b", 0, 9)]}
    with pytest.raises(DataError, match=r"some\.tsv: is both the dev and the test split of glue-rte"):
        load("rte", tmp_path, dev_path=other, test_path=tmp_path / "RTE" / ".." / "other" / "some.tsv")
    with pytest.raises(DataError, match=r"train\.tsv: is both the train and the dev split of glue-rte"):
        load("rte", tmp_path, dev_path=tmp_path / "RTE" / "train.tsv")


def test_two_files_for_one_split_are_refused(tmp_path):
    write(tmp_path, train=RTE_TSV)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(
        DataError, match=r"has train\.jsonl and train\.tsv for the train split; say which one by data\.tr"
    ):
        load("rte", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dev_mismatched_path": "x"}, "rte has no dev_mismatched split; it has: train, dev, test"),
        ({"splits": ["train"], "dev_fraction": 0.1}, "dev_fraction cuts dev from train"),
        ({"splits": ["train"], "dev_rows": 4}, "dev_rows has no effect"),
        ({"splits": ["train"], "test_path": "x"}, "test_path has no effect"),
        ({"splits": ["train", "train"]}, "names one twice"),
        ({"path": "x", "revision": "main"}, "revision is of the hub"),
        ({"path": "x", "fetch": "archive"}, "fetch has no effect"),
        ({"fetch": "archive", "revision": "main"}, "revision is of the hub"),
        ({"task": "boolq"}, "Input should be"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        GlueConfig.model_validate_json(json.dumps({"task": "rte", **options}))


# Bad data.


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("rte", b"", r"train\.tsv: is empty"),
        ("rte", RTE.encode(), r"train\.tsv: holds no rows"),
        ("rte", b"0\tHe.\tShe.\tentailment\n", r"train\.tsv: line 1: the header lacks 'sentence1'"),
        ("rte", b"index\tsentence1\tsentence2\n0\ta\tb\n", r"train\.tsv: line 2: has no column 'label'"),
        ("rte", b"index\tsentence1\tlabel\n0\ta\t0\n", r"train\.tsv: line 2: has no column 'sentence2';"),
        ("rte", RTE.encode() + b"0\ta\tb\n", r"train\.tsv: line 2: has 3 columns instead of 4 .*too few tabs"),
        ("rte", RTE.encode() + b"0\ta\tb\tc\tentailment\n", r"train\.tsv: line 2: has 5 columns.*too many tabs"),
        (
            "rte",
            RTE.encode() + b"0\ta\tb\tperhaps\n",
            r"line 2: the label 'perhaps' is none of rte; allowed are entail",
        ),
        ("rte", RTE.encode() + b"0\ta\tb\t2\n", r"line 2: the label '2' is none of rte; .* or their ids 0 to 1"),
        ("rte", RTE.encode() + b"0\ta\tb\t\n", r"line 2: has no label \(label is ''\)"),
        ("rte", RTE.encode() + b"x\ta\tb\t1\n", r"line 2: index is 'x', which is no row number"),
        ("rte", RTE.encode() + b"0\ta\0\tb\t1\n", r"train\.tsv: line 2: has a NUL byte"),
        ("rte", RTE.encode() + b"0\ta\xff\tb\t1\n", r"train\.tsv: line 2: is not valid UTF-8"),
        ("cola", b"gj04\t1\t\tFine.\ngj04\t1\tNo.\n", r"train\.tsv: line 2: has 3 columns instead of 4"),
        ("cola", b"gj04\t-1\t\tFine.\n", r"line 1: has no label \(label is '-1'\)"),
        (
            "stsb",
            b"index\tsentence1\tsentence2\tscore\n0\ta\tb\t5.5\n",
            r"'5.5' is none of stsb; .* numbers from 0 to 5",
        ),
        ("stsb", b"index\tsentence1\tsentence2\tscore\n0\ta\tb\tnan\n", r"the label 'nan' is none of stsb"),
        ("qqp", QQP.encode() + b"1\t2\t3\ta\tb\tc\t1\n", r"line 2: has 7 columns instead of 6"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, data, message):
    with pytest.raises(DataError, match=message):
        only(task, write(tmp_path, train=data))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"sentence1": "a", "sentence2": 3, "label": 0}', r"train\.jsonl: line 1: column 'sentence2' holds 3"),
        ('{"sentence1": "a", "sentence2": "b", "label": {}}', r"line 1: the label '{}' is none of rte"),
        ('{"sentence1": "a", "sentence2": "b", "label": null}', r"line 1: has no label \(label is None\)"),
        ('{"sentence1": "a", "sentence2": "b", "label": 0', r"train\.jsonl: line 1: is not valid JSON"),
    ],
)
def test_bad_rows_of_jsonl_are_named(tmp_path, row, message):
    (tmp_path / "train.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=message):
        only("rte", tmp_path)


def test_a_damaged_archive_is_refused(tmp_path):
    data = io.BytesIO()
    zipped(data, **{"RTE/train.tsv": RTE_TSV})
    (tmp_path / "cut.zip").write_bytes(data.getvalue()[:-30])
    with pytest.raises(DataError, match=r"cut\.zip: is not a zip archive or is damaged"):
        load("rte", tmp_path / "cut.zip")
    escaping = zipped(tmp_path / "escaping.zip", **{"../train.tsv": RTE_TSV})
    with pytest.raises(DataError, match="leads out of its folder"):
        load("rte", escaping)
    with pytest.raises(DataError, match="there is no such file or folder"):
        load("rte", tmp_path / "absent")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    write(tmp_path / "elsewhere", train=RTE_TSV)
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").symlink_to(tmp_path / "elsewhere" / "train.tsv")
    with pytest.raises(DataError, match="is a link out of"):
        load("rte", tmp_path / "RTE")


def test_every_task_has_its_submission_file_and_the_metrics_of_glue():
    files = {file for task in GLUE_TASKS.values() for file in task.info.submissions.values()}
    assert files == {
        *("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv"),
        *("RTE.tsv", "WNLI.tsv", "AX.tsv"),
    }
    metrics = {name: set(task.info.metrics) for name, task in GLUE_TASKS.items()}
    assert metrics["cola"] == metrics["ax"] == {"matthews"}
    assert metrics["mrpc"] == metrics["qqp"] == {"f1", "accuracy"}
    assert metrics["stsb"] == {"pearson", "spearman"}
    assert all(metrics[name] == {"accuracy"} for name in ("sst2", "mnli", "qnli", "rte", "wnli"))
    assert [GLUE_TASKS[name].info.num_outputs for name in ("stsb", "mnli", "cola")] == [1, 3, 2]
