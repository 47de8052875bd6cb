"""Rows of data files of both tasks, whatever they hold."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import REFUSED, attempt, cases
from values import plain, scalars

from meta_trainer.tasks import ModelArguments, Task
from meta_trainer.tasks.ner import NerArguments, build_ner_task
from meta_trainer.tasks.text_classification import TextClassificationArguments, build_text_classification_task

MODEL = ModelArguments(hidden_size=8, num_hidden_layers=1, intermediate_size=8, vocab_size=300)
HUGE = "word " * 50_000

SENTENCES: list[dict[str, Any]] = [
    {"tokens": ["Ada", "saw", "Turin"], "ner_tags": ["B-PER", "O", "B-LOC"], "dup": False},
    {"tokens": ["It", "rained"], "ner_tags": ["O", "O"], "dup": True},
    {"tokens": ["IBM", "hired", "Ada", "Lovelace"], "ner_tags": ["B-ORG", "O", "B-PER", "I-PER"], "dup": False},
    {"tokens": ["Paris"], "ner_tags": ["B-LOC"], "dup": False},
]
TEXTS: list[dict[str, Any]] = [
    {"text": f"{word} number {i}", "label": label, "noisy": label, "dup": i == 1}
    for i, (word, label) in enumerate([("goal", "sport"), ("bank", "money"), ("match", "sport"), ("loan", "money")] * 2)
]
CONLL_LINES = (
    "Ada B-PER",
    "Lovelace I-PER",
    "saw O",
    "",
    "  ",
    "Turin\tB-LOC",
    "x\t\tO",
    "alone",
    "\t",
    "-DOCSTART- O",
)
odd = st.one_of(
    plain,
    st.sampled_from(
        [[], [[]], [""], ["O", None], ["I-PER"], ["B-"], ["B-PER", "I-LOC"], "HUGE", "[HUGE]", "\ud800", "²", "٣"]
    ),
    st.lists(scalars, max_size=4),
)
changes = st.lists(
    st.tuples(
        st.integers(0, 7),
        st.sampled_from(["tokens", "ner_tags", "dup", "text", "label", "noisy"]),
        st.one_of(odd, st.just("drop the column"), st.just("drop the row"), st.just("longer"), st.just("shorter")),
    ),
    max_size=3,
)
sizes = st.sampled_from([1, 2, 3, 4, 50])


def changed(rows: list[dict[str, Any]], changes: list[tuple[int, str, Any]]) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    # Not drawn as it is: Hypothesis prints what it draws.
    huge = {"HUGE": HUGE, "[HUGE]": [HUGE]}
    changes = [
        (n, column, huge.get(change, change) if isinstance(change, str) else change) for n, column, change in changes
    ]
    for number, column, change in changes:
        if not rows:
            break
        row = rows[number % len(rows)]
        if column not in row:
            continue
        if change == "drop the column":
            for other in rows[: 1 + number]:
                other.pop(column, None)
        elif change == "drop the row":
            rows.pop(number % len(rows))
        elif change in ("longer", "shorter") and isinstance(row[column], list):
            row[column] = [*row[column], "O"] if change == "longer" else row[column][:-1]
        else:
            row[column] = change
    return rows


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
            assume(False)  # no such file can be
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def check_sound(task: Task, classes: int) -> None:
    """Every set can be batched, and its labels are classes; at least one counts in each row of words."""
    for rows in (task.train_dataset, task.meta_dataset, task.eval_dataset):
        if rows is None:
            continue
        assert len(rows) > 0
        batch = task.data_collator([rows[i] for i in range(min(2, len(rows)))])
        for part in (batch, batch.get("meta_batch", batch)):
            assert part["input_ids"].shape == part["attention_mask"].shape
            labels = part["labels"]
            assert not labels.is_floating_point()
            assert bool(((labels == -100) | ((labels >= 0) & (labels < classes))).all())


def ner_task(folder: Path, suffix: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
    files = {name: str(write(folder / f"{name}{suffix}", part)) for name, part in (("bad", rows), ("good", SENTENCES))}
    order = ("bad", "good") if settings.pop("as_source") else ("good", "bad")
    meta_batch_size = settings.pop("meta_batch_size")

    def build() -> Task:
        arguments = NerArguments(
            source_train_file=files[order[0]], target_train_file=files[order[1]],
            target_validation_file=files["bad"], max_length=32, **settings,
        )  # fmt: skip
        return build_ner_task(arguments, MODEL, seed=0, with_meta=True, meta_batch_size=meta_batch_size)

    return attempt(build)


@cases(120)
@given(
    changes=changes,
    suffix=st.sampled_from([".jsonl", ".jsonl", ".parquet"]),
    as_source=st.booleans(),
    settings=st.fixed_dictionaries(
        {"meta_batch_size": sizes, "target_batch_size": sizes},
        optional={
            "exclude_column": st.just("dup"),
            "meta_split": st.just("fixed"),
            "tags_column": st.sampled_from(["tokens", "dup", "nothing"]),
            "map_tags": st.sampled_from([["PER=O"], ["NONE=O"], ["PER=LOC"]]),
        },
    ),
)
def test_tagged_sentences_are_a_task_or_refused(folder, changes, suffix, as_source, settings):
    task = ner_task(folder, suffix, changed(SENTENCES, changes), as_source=as_source, **settings)
    if task is not REFUSED:
        check_sound(task, len(task.compute_metrics.tags))


@cases(80)
@given(
    lines=st.lists(
        st.one_of(
            st.sampled_from(CONLL_LINES),
            st.text(max_size=10),
        ),
        max_size=8,
    ),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)  # fmt: skip
def test_a_conll_file_is_a_task_or_refused(folder, lines, encoding):
    (folder / "good.conll").write_text("Ada B-PER\nsaw O\n\nTurin B-LOC\n\nIt O\nrained O\n")
    (folder / "bad.conll").write_bytes("\n".join(lines).encode(encoding, "replace"))

    def build() -> Task:
        arguments = NerArguments(
            source_train_file=str(folder / "bad.conll"),
            target_train_file=str(folder / "good.conll"),
            target_batch_size=1,
        )
        return build_ner_task(arguments, MODEL, seed=0, with_meta=True, meta_batch_size=1)

    task = attempt(build)
    if task is not REFUSED:
        check_sound(task, len(task.compute_metrics.tags))


@cases(120)
@given(
    changes=changes,
    suffix=st.sampled_from([".jsonl", ".jsonl", ".parquet"]),
    settings=st.fixed_dictionaries(
        {"num_meta_examples": st.sampled_from([0, 1, 2, 3, 4, 8, 100])},
        optional={
            "exclude_column": st.sampled_from(["dup", "text"]),
            "train_label_column": st.sampled_from(["noisy", "text", "dup"]),
            "label_column": st.sampled_from(["text", "dup", "nothing"]),
            "text_column": st.sampled_from(["label", "dup"]),
            "max_train_examples": st.sampled_from([1, 100]),
            "subset_seed": st.sampled_from([1, 2**40]),
            "noise_seed": st.sampled_from([1, 2**70]),
        },
    ),
    noise=st.sampled_from([{}, {}, {"label_noise": "flip", "label_noise_share": 0.5}, {"label_noise": "uniform"}]),
)
def test_labelled_texts_are_a_task_or_refused(folder, changes, suffix, settings, noise):
    bad, good = write(folder / f"bad{suffix}", changed(TEXTS, changes)), write(folder / f"good{suffix}", TEXTS)

    def build() -> Task:
        arguments = TextClassificationArguments(
            train_file=str(bad), validation_file=str(good), max_length=32, **settings, **noise
        )
        return build_text_classification_task(arguments, MODEL, seed=0, with_meta=True)

    task = attempt(build)
    if task is not REFUSED:
        classes = {
            label for part in (task.train_dataset, task.meta_dataset, task.eval_dataset) for label in part["labels"]
        }
        check_sound(task, max(classes) + 1)


@cases(120)
@given(
    content=st.one_of(
        st.binary(max_size=30),
        st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace")),
        st.sampled_from(
            [b"", b"{}", b"[]", b"[{}]", b"[[]]", b"null", b"{\"text\": 1}", b"text,label\n", b"text,text\na,b\n",
             b"text,label\n\"a,b\n", b"text,label\na\n", b"PAR1PAR1", b"[" * 3000, b"{\"a\":" * 3000, b"[1, 2]", b"NaN",
             b"{\"text\": \"a\", \"label\": 1e999}", b"{\"text\": \"a\", \"label\": 99999999999999999999999}",
             b"{\"text\": \"a\", \"text\": \"b\", \"label\": 1}\n{\"text\": \"c\", \"label\": 0}"]
        ),
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]),
)  # fmt: skip
def test_a_file_of_garbage_is_refused(folder, content, suffix):
    file = folder / f"garbage{suffix}"
    file.write_bytes(content)

    def build() -> Task:
        arguments = TextClassificationArguments(train_file=str(file), num_meta_examples=2)
        return build_text_classification_task(arguments, MODEL, seed=0, with_meta=True)

    assert attempt(build) is REFUSED


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_that_is_there_twice_is_refused(folder, suffix):
    file = folder / f"twice{suffix}"
    if suffix == ".csv":
        file.write_text("text,label,label\na,x,y\nb,y,x\n")
    else:
        arrays = [pyarrow.array(["a", "b"]), pyarrow.array(["x", "y"]), pyarrow.array(["y", "x"])]
        pyarrow.parquet.write_table(pyarrow.table(arrays, names=["text", "label", "label"]), file)

    def build() -> Task:
        arguments = TextClassificationArguments(train_file=str(file), num_meta_examples=2)
        return build_text_classification_task(arguments, MODEL, seed=0, with_meta=False)

    assert attempt(build) is REFUSED
