import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from ner_rows import ROWS

from meta_trainer.tasks.ner import NerArguments
from meta_trainer.tasks.ner.columns import read_columns
from meta_trainer.tasks.ner.files import read_conll, read_table
from meta_trainer.tasks.ner.loading import draw_subset, load_ner_data
from meta_trainer.tasks.ner.sentences import Sentences

TOKENS = [row["tokens"] for row in ROWS]
TAGS = [row["ner_tags"] for row in ROWS]
CONLL = "-DOCSTART- O\n\nAda NNP B-PER\nLovelace NNP I-PER\nsaw VB O\nTurin NNP B-LOC\n\n\nIt\tO\nrained\tO\n"


def read(rows: list[dict], **options: str) -> Sentences:
    return read_columns(Dataset.from_list(rows), "news", "tokens", "ner_tags", **options)


def files(path: Path, **changes: object) -> NerArguments:
    return NerArguments(source_train_file=str(path), target_train_file=str(path), **changes)


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_every_kind_of_table_gives_the_same_sentences(tmp_path: Path, write_rows, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        write_rows(path.name)
    loaded = load_ner_data(files(path, max_source_examples=None)).source_train
    assert sorted(zip(loaded.tokens, loaded.tags, strict=True)) == sorted(zip(TOKENS, TAGS, strict=True))


def test_conll_columns_may_be_separated_by_spaces_or_tabs_and_know_their_lines(tmp_path: Path):
    path = tmp_path / "a.conll"
    path.write_text(CONLL)
    loaded = read_conll(path)
    assert (loaded.tokens, loaded.tags, loaded.lines) == (TOKENS[:2], TAGS[:2], [[3, 4, 5, 6], [9, 10]])
    assert loaded.where(1, 1) == f"{path}, sentence 2, token 2 'rained' (line 10)"


def test_conll_words_may_hold_the_other_blanks_of_unicode(tmp_path: Path):
    path = tmp_path / "a.conll"
    path.write_text("10\u00a0000 NN O\nvon\u2009Neumann\tB-PER\n  x\u3000y   B-LOC \n", encoding="utf-8")
    loaded = read_conll(path)
    assert loaded.tokens == [["10\u00a0000", "von\u2009Neumann", "x\u3000y"]]
    assert loaded.tags == [["O", "B-PER", "B-LOC"]]


def test_comments_of_a_conll_file_are_skipped_and_its_lines_keep_their_numbers(tmp_path: Path):
    path = tmp_path / "a.conll"
    path.write_text("# sent_id = 1\n# text = # 1\n# O\n#\n1 O\n\n# text = plan O\n\n#tag B-LOC\n# why\nTurin I-ORG\n")
    with pytest.raises(ValueError, match=r"sentence 2, token 2 'Turin' \(line 11\): 'I-ORG' continues"):
        read_conll(path)
    path.write_text(path.read_text().replace("I-ORG", "I-LOC"))
    loaded = read_conll(path)
    assert loaded.tokens == [["#", "1"], ["#tag", "Turin"]]
    assert loaded.lines == [[3, 5], [9, 11]]


def test_a_conll_file_that_numbers_its_words_is_refused(tmp_path: Path):
    path = tmp_path / "a.conll"
    path.write_text("1\tAda\tB-PER\n2\tsaw\tO\n\n1\tTurin\tB-LOC\n")
    with pytest.raises(ValueError, match=r"a\.conll: expected words in the first column, got the numbers 1, 2, 3"):
        read_conll(path)


@pytest.mark.parametrize("content", ["1 O\n\n1 O\n", "1 O\n2 O\n\nAda B-PER\n", "1 O\n3 O\n"])
def test_numbers_may_be_words_of_a_conll_file(tmp_path: Path, content):
    path = tmp_path / "a.conll"
    path.write_text(content)
    assert read_conll(path).tokens[0][0] == "1"


def test_a_conll_line_without_a_tag_is_named(tmp_path: Path):
    path = tmp_path / "a.bio"
    path.write_text("Ada B-PER\nsaw\n")
    with pytest.raises(ValueError, match=r"a\.bio, line 2: expected a word and its tag, got 'saw'"):
        read_conll(path)


def test_a_conll_file_of_another_encoding_is_named(tmp_path: Path):
    (tmp_path / "a.conll").write_text("Ada B-PER\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.conll should be UTF-8 text"):
        read_conll(tmp_path / "a.conll")


def test_a_malformed_tag_of_a_conll_file_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("It O\n\nin O\nTurin I-LOC\n")
    with pytest.raises(ValueError, match=r"a.txt, sentence 2, token 2 'Turin' \(line 4\): 'I-LOC' continues"):
        load_ner_data(files(path))


def test_broken_json_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["a"], "ner_tags": ["O"]}\n{"tokens": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        read_table(path)


def test_a_broken_parquet_file_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    path.write_text("no table")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        read_table(path)


def test_integer_tags_become_the_names_of_their_classes():
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    dataset = Dataset.from_dict({"tokens": [["Ada", "saw"]], "ner_tags": [[1, 0]]}, features=features)
    assert read_columns(dataset, "news", "tokens", "ner_tags").tags == [["B-PER", "O"]]


def test_an_integer_tag_outside_the_classes_is_named():
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-PER"]))})
    dataset = Dataset.from_dict({"tokens": [["Ada"]], "ner_tags": [[-1]]}, features=features)
    with pytest.raises(ValueError, match="news, sentence 1, token 1 'Ada': tag -1 is outside the 2 classes O, B-PER"):
        read_columns(dataset, "news", "tokens", "ner_tags")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": [], "ner_tags": []}, "news, sentence 1 has no words"),
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "news, sentence 1: 2 words but 1 tags"),
        ({"tokens": [1], "ner_tags": ["O"]}, "news, sentence 1, token 1 1: expected a word as text, got int"),
        ({"tokens": ["a"], "ner_tags": [3]}, "news, sentence 1, token 1 'a': expected a tag as text, got 3"),
        (
            {"tokens": "a b", "ner_tags": ["O"]},
            "news, sentence 1: expected lists of words and of tags, got 'a b'",
        ),
        ({"words": ["a"], "ner_tags": ["O"]}, "news has no column 'tokens'; its columns are words, ner_tags"),
    ],
)
def test_a_row_that_is_no_sentence_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        read([row])


def test_excluded_sentences_are_left_out_of_training_only(write_rows):
    path = write_rows("a.jsonl")
    data = load_ner_data(files(path, exclude_column="dup", target_test_file=str(path)))
    assert sorted(data.source_train.tokens) == sorted(data.target_train.tokens) == sorted([TOKENS[0], TOKENS[2]])
    assert data.target_test is not None
    assert data.target_test.tokens == TOKENS
    assert data.target_validation is None


def test_a_sentence_keeps_its_number_when_sentences_before_it_are_excluded(write_rows):
    rows = [ROWS[1], {"tokens": ["Turin"], "ner_tags": ["I-LOC"], "dup": False}]
    with pytest.raises(ValueError, match="sentence 2, token 1 'Turin'"):
        load_ner_data(files(write_rows("a.jsonl", rows), exclude_column="dup"))


def test_a_missing_exclude_column_is_refused(write_rows, tmp_path: Path):
    with pytest.raises(ValueError, match="has no column 'duplicate'"):
        load_ner_data(files(write_rows("a.jsonl"), exclude_column="duplicate"))
    conll = tmp_path / "a.conll"
    conll.write_text(CONLL)
    with pytest.raises(ValueError, match=r"a\.conll is a CoNLL file, which has no such column"):
        load_ner_data(files(conll, exclude_column="dup"))


def test_sentences_are_left_out_by_booleans_alone(write_rows):
    rows = [{**row, "dup": "False"} for row in ROWS]
    with pytest.raises(ValueError, match="exclude_column='dup' should hold booleans, got 'False'"):
        load_ner_data(files(write_rows("a.jsonl", rows), exclude_column="dup"))


def test_tags_of_source_and_target_are_joined_and_mapped(write_rows):
    source = write_rows("s.jsonl", [{"tokens": ["Ada"], "ner_tags": ["B-PERSON"]}])
    arguments = NerArguments(
        source_train_file=str(source),
        target_train_file=str(write_rows("t.jsonl")),
        map_tags=["PERSON=PER", "DATE=O"],
    )
    data = load_ner_data(arguments)
    assert data.tags == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    assert data.source_train.tags == [["B-PER"]]


def test_mapping_a_type_that_occurs_nowhere_names_the_known_ones(write_rows):
    with pytest.raises(ValueError, match="no entity of type MISC in the data; it has DATE, LOC, ORG, PER"):
        load_ner_data(files(write_rows("a.jsonl"), map_tags=["MISC=O"]))


def one_type(write_rows, **types: str) -> NerArguments:
    """Sets of one word each, an entity of the type that is given."""
    names = {f"{name}_file": f"{name}.jsonl" for name in types}
    for name, entity_type in types.items():
        write_rows(f"{name}.jsonl", [{"tokens": ["Ada"], "ner_tags": [f"B-{entity_type}"]}])
    return NerArguments(data_dir=str(write_rows("other.jsonl").parent), **names)


@pytest.mark.parametrize("scored", ["target_validation", "target_test"])
def test_a_scored_set_without_a_type_to_train_on_is_refused(write_rows, scored):
    sets = {"source_train": "PER", "target_train": "LOC", scored: "Person"}
    message = (
        rf"type of .*{scored}\.jsonl \(Person\) is one of .*source_.* and .*target_train.* \(LOC, PER\): .*map_tags"
    )
    with pytest.raises(ValueError, match=message):
        load_ner_data(one_type(write_rows, **sets))
    arguments = one_type(write_rows, **sets)
    arguments.map_tags = ["Person=PER"]
    assert load_ner_data(arguments).tags == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_a_type_that_only_the_target_is_trained_on_may_be_scored(write_rows, caplog):
    load_ner_data(one_type(write_rows, source_train="PER", target_train="LOC", target_test="LOC"))
    assert not caplog.records


def test_a_scored_set_without_entities_has_no_type_to_refuse(write_rows):
    arguments = one_type(write_rows, source_train="PER", target_train="PER", target_test="PER")
    write_rows("target_test.jsonl", [{"tokens": ["It", "rained"], "ner_tags": ["O", "O"]}])
    assert load_ner_data(arguments).target_test is not None


def test_types_that_are_scored_and_never_trained_on_are_named_by_a_warning(write_rows, caplog):
    arguments = one_type(write_rows, source_train="PER", target_train="PER", target_test="PER")
    write_rows("target_test.jsonl")
    load_ner_data(arguments)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "target_test.jsonl has entities of type DATE, LOC, ORG, of which" in record.message


@pytest.mark.parametrize("seed", [0, 7])
def test_a_smaller_subset_is_the_beginning_of_a_larger_one(seed):
    whole = Sentences("news", [[str(i)] for i in range(50)], [["O"]] * 50)
    small, large = draw_subset(whole, 10, seed).tokens, draw_subset(whole, 30, seed).tokens
    assert large[:10] == small
    assert len({token for (token,) in large}) == 30
    assert draw_subset(whole, 10, seed + 1).tokens != small
    assert len(draw_subset(whole, None, seed)) == len(draw_subset(whole, 99, seed)) == 50


@pytest.fixture
def hub_folder(tmp_path: Path, write_rows, monkeypatch) -> Callable[[str], Path]:
    """Lay out a local folder like a data set of the Hub, with one file per split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def lay_out(subset: str) -> Path:
        for split in ("train", "validation", "test"):
            write_rows(f"wiki/{subset}/{split}.jsonl", [{"tokens": [split], "ner_tags": ["B-PER"]}])
        return tmp_path / "wiki"

    return lay_out


@pytest.mark.parametrize("subset", ["", "qu"])
def test_a_local_folder_in_the_layout_of_the_hub_is_read_by_split(hub_folder, subset):
    folder = hub_folder(subset)
    data = load_ner_data(
        NerArguments(
            source_data="generated",
            target_data="wiki",
            target_subset=subset or None,
            data_dir=str(folder.parent),
        )
    )
    sets = (data.target_train, data.target_validation, data.target_test)
    assert [loaded.tokens for loaded in sets if loaded is not None] == [
        [["train"]],
        [["validation"]],
        [["test"]],
    ]


def test_a_split_that_a_folder_does_not_have_is_refused(hub_folder):
    folder = hub_folder("")
    with pytest.raises(ValueError, match="split 'gold' cannot be loaded"):
        load_ner_data(NerArguments(source_data="generated", target_data=str(folder), target_train_split="gold"))


def test_a_subset_that_a_folder_does_not_have_is_refused(hub_folder):
    settings = {"target_data": "generated", "source_data": str(hub_folder("")), "source_subset": "en"}
    with pytest.raises(
        ValueError, match=r"wiki has no subset 'en': .*default.* For a folder without .*: `--source_subset none`"
    ):
        load_ner_data(NerArguments(**settings))


def test_conll_files_in_a_folder_are_found_by_the_names_of_their_splits(tmp_path: Path):
    for name in ("train.txt", "dev.txt", "test.txt"):
        (tmp_path / name).write_text(f"{name} B-PER\n")
    data = load_ner_data(NerArguments(source_data=str(tmp_path), target_data=str(tmp_path)))
    assert data.target_validation is not None
    assert data.target_validation.tokens == [["dev.txt"]]


def test_the_splits_named_none_are_not_loaded(generated):
    data = load_ner_data(generated(target_validation_split=None, target_test_split=None))
    assert data.target_validation is None
    assert data.target_test is None
