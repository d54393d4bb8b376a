"""The tasks of GLUE: what is asked, where rows have it, and how many rows are published.

Sources: arXiv 1804.07461 (tasks, metrics), gluebenchmark.com (submissions), the last ``dataset_infos.json`` of GLUE in
huggingface/datasets (numbers of rows, addresses, checksums).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from smoe_train.data.examples import DEV, TEST, TRAIN, Metric, TaskInfo
from smoe_train.data.reading.download import Published
from smoe_train.data.reading.row_examples import Columns

GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"]
GLUE_NAMES: tuple[GlueName, ...] = get_args(GlueName)

HUB = "nyu-mll/glue"
DATA = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
DEV_MISMATCHED, TEST_MISMATCHED = "dev_mismatched", "test_mismatched"
STEMS = {TRAIN: ("train",), DEV: ("dev", "validation"), TEST: ("test",)}


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        info: What is asked.
        folder: Its folder in the original layout.
        columns: Where rows have their parts, in the original files and on the hub.
        rows: Published number of rows of each split.
        archives: The original files.
        stems: By split, how its files are called, in the original layout and on the hub.
        hub_splits: By split, its name on the hub.
        headerless: Columns of original files that have no header line.
        skips_short_rows: Whether the original files have rows with too few tabs, which are left out and counted, as
            the hub's edition does.
    """

    info: TaskInfo
    folder: str
    columns: Columns
    rows: Mapping[str, int]
    archives: Sequence[Published]
    stems: Mapping[str, Sequence[str]]
    hub_splits: Mapping[str, str]
    headerless: Sequence[str] = ()
    skips_short_rows: bool = False


def _zip(name: str, num_bytes: int, sha256: str) -> tuple[Published, ...]:
    return (Published(name, [f"{DATA}/{name}"], sha256, num_bytes=num_bytes),)


def _task(
    name: GlueName,
    folder: str,
    labels: tuple[str, ...],
    metrics: tuple[Metric, ...],
    texts: Sequence[tuple[str, ...]],
    rows: tuple[int, int, int],
    archives: Sequence[Published],
    *,
    label: tuple[str, ...] = ("label",),
    index: tuple[str, ...] = ("index", "idx"),
    names: Sequence[str] = (),
    headerless: Sequence[str] = (),
    skips_short_rows: bool = False,
) -> GlueTask:
    info = TaskInfo(
        name,
        "classification" if labels else "regression",
        labels,
        metrics,
        high=0.0 if labels else 5.0,
        submissions={TEST: f"{folder}.tsv"},
    )
    columns = Columns(
        texts[0], texts[1] if len(texts) > 1 else (), label, index, {name: number for number, name in enumerate(names)}
    )
    return GlueTask(
        info,
        folder,
        columns,
        dict(zip((TRAIN, DEV, TEST), rows, strict=True)),
        archives,
        STEMS,
        {TRAIN: "train", DEV: "validation", TEST: "test"},
        headerless,
        skips_short_rows,
    )


_PREMISE, _HYPOTHESIS = ("sentence1", "premise", "Premise"), ("sentence2", "hypothesis", "Hypothesis")

_MNLI = GlueTask(
    TaskInfo(
        "mnli",
        "classification",
        INFERENCE,
        ("accuracy",),
        submissions={TEST: "MNLI-m.tsv", TEST_MISMATCHED: "MNLI-mm.tsv"},
    ),
    "MNLI",
    Columns(_PREMISE, _HYPOTHESIS, ("gold_label", "label"), ("index", "idx")),
    {TRAIN: 392_702, DEV: 9_815, DEV_MISMATCHED: 9_832, TEST: 9_796, TEST_MISMATCHED: 9_847},
    _zip("MNLI.zip", 312_783_507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    {
        TRAIN: ("train",),
        DEV: ("dev_matched", "validation_matched"),
        DEV_MISMATCHED: ("dev_mismatched", "validation_mismatched"),
        TEST: ("test_matched",),
        TEST_MISMATCHED: ("test_mismatched",),
    },
    {
        TRAIN: "train",
        DEV: "validation_matched",
        DEV_MISMATCHED: "validation_mismatched",
        TEST: "test_matched",
        TEST_MISMATCHED: "test_mismatched",
    },
)

_AX = GlueTask(
    TaskInfo("ax", "classification", INFERENCE, ("matthews",), submissions={TEST: "AX.tsv"}),
    "AX",
    Columns(_PREMISE, _HYPOTHESIS, ("gold_label", "label", "Label"), ("index", "idx")),
    {TEST: 1_104},
    (
        Published(
            "AX.tsv",
            [f"{DATA}/AX.tsv"],
            "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd",
            num_bytes=222_257,
        ),
    ),
    {TEST: ("AX", "diagnostic", "diagnostic-full", "test")},
    {TEST: "test"},
)

_MRPC_ARCHIVES = (
    Published(
        "msr_paraphrase_train.txt",
        [f"{SENTEVAL}/msr_paraphrase_train.txt"],
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        num_bytes=1_047_044,
    ),
    Published(
        "msr_paraphrase_test.txt",
        [f"{SENTEVAL}/msr_paraphrase_test.txt"],
        "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
        num_bytes=441_275,
    ),
    Published(
        "mrpc_dev_ids.tsv",
        [f"{DATA}/mrpc_dev_ids.tsv"],
        "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
        num_bytes=6_222,
    ),
)

GLUE_TASKS: Mapping[GlueName, GlueTask] = {
    "cola": _task(
        "cola",
        "CoLA",
        BINARY,
        ("matthews",),
        [("sentence",)],
        (8_551, 1_043, 1_063),
        _zip("CoLA.zip", 376_971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
        names=("unacceptable", "acceptable"),
        headerless=("source", "label", "judgement", "sentence"),
    ),
    "sst2": _task(
        "sst2",
        "SST-2",
        BINARY,
        ("accuracy",),
        [("sentence",)],
        (67_349, 872, 1_821),
        _zip("SST-2.zip", 7_439_277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
        names=("negative", "positive"),
    ),
    "mrpc": _task(
        "mrpc",
        "MRPC",
        BINARY,
        ("f1", "accuracy"),
        [("#1 String", "sentence1"), ("#2 String", "sentence2")],
        (3_668, 408, 1_725),
        _MRPC_ARCHIVES,
        label=("Quality", "label"),
        names=("not_equivalent", "equivalent"),
    ),
    "stsb": _task(
        "stsb",
        "STS-B",
        (),
        ("pearson", "spearman"),
        [("sentence1",), ("sentence2",)],
        (5_749, 1_500, 1_379),
        _zip("STS-B.zip", 802_872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
        label=("score", "label"),
    ),
    "qqp": _task(
        "qqp",
        "QQP",
        BINARY,
        ("f1", "accuracy"),
        [("question1",), ("question2",)],
        (363_846, 40_430, 390_965),
        _zip("QQP-clean.zip", 41_696_084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
        label=("is_duplicate", "label"),
        index=("id", "idx"),
        names=("not_duplicate", "duplicate"),
        headerless=("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
        skips_short_rows=True,
    ),
    "mnli": _MNLI,
    "qnli": _task(
        "qnli",
        "QNLI",
        ENTAILMENT,
        ("accuracy",),
        [("question",), ("sentence",)],
        (104_743, 5_463, 5_463),
        _zip("QNLIv2.zip", 10_627_589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    ),
    "rte": _task(
        "rte",
        "RTE",
        ENTAILMENT,
        ("accuracy",),
        [("sentence1",), ("sentence2",)],
        (2_490, 277, 3_000),
        _zip("RTE.zip", 697_150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    ),
    "wnli": _task(
        "wnli",
        "WNLI",
        BINARY,
        ("accuracy",),
        [("sentence1",), ("sentence2",)],
        (635, 71, 146),
        _zip("WNLI.zip", 28_999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
        names=("not_entailment", "entailment"),
    ),
    "ax": _AX,
}
