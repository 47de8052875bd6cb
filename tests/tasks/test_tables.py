"""Files that every task reads alike, and the places where they are looked up."""

from pathlib import Path

import pytest
from datasets import Dataset

from meta_trainer.tasks.locations import check_data, check_file, data_name, locate
from meta_trainer.tasks.tables import check_columns, load_split, read_table


def test_a_csv_file_may_hold_commas_quotes_and_line_breaks_in_a_text(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('text,label,dup\n"one, ""two""\nthree",7,true\nfour,8,false\n')
    rows = read_table(path).to_list()
    assert rows == [
        {"text": 'one, "two"\nthree', "label": 7, "dup": True},
        {"text": "four", "label": 8, "dup": False},
    ]


def test_empty_cells_of_a_csv_file_are_missing_and_other_names_of_nothing_are_names(tmp_path: Path):
    (tmp_path / "a.csv").write_text('text,label\none,\n"",NA\nthree,null\n')
    rows = read_table(tmp_path / "a.csv").to_list()
    assert rows == [
        {"text": "one", "label": None}, {"text": None, "label": "NA"}, {"text": "three", "label": "null"},
    ]  # fmt: skip


def test_keys_that_a_json_row_lacks_are_missing_wherever_the_row_is(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\n{"text": "b", "label": "x"}\n')
    rows = read_table(tmp_path / "a.jsonl").to_list()
    assert rows == [{"text": "a", "label": None}, {"text": "b", "label": "x"}]


def test_a_csv_file_of_another_encoding_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes("text,label\nfianc\u00e9,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv cannot be read as a table: it should be UTF-8 .* 'text' is not"):
        read_table(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"train.jsonl": b'{"text": "a"}\n{"text": "b" "label": "x"}\n'}, "JSON"),
        ({"train-0.csv": b"text,label\na,x\n", "train-1.csv": b"text,topic\na,x\n"}, "topic"),
        ({"train.csv": b"text,label\na,x\n", "README.md": b"---\nconfigs: [\n---\n"}, "flow node"),
    ],
)
def test_what_is_wrong_with_the_files_of_a_folder_is_said_in_one_error(tmp_path: Path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)split 'train' cannot be loaded .*{reason}"):
        load_split(str(tmp_path), None, "train")


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,label\none\n"), ("a.csv", ""), ("a.parquet", "x")])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as a table"):
        read_table(tmp_path / name)


@pytest.mark.parametrize("content", ["", "[]", "[1, 2]", "3\n"])
def test_json_that_holds_no_rows_is_refused(tmp_path: Path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="expected a list of objects"):
        read_table(tmp_path / "a.json")


def test_a_missing_column_is_named_beside_those_that_there_are():
    dataset = Dataset.from_dict({"text": ["a"], "label": [0]})
    check_columns(dataset, "news", ["text", None])
    with pytest.raises(ValueError, match="news has no column 'topic'; its columns are text, label"):
        check_columns(dataset, "news", ["text", "topic"])


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("text,label,label\na,x,y\n")
    with pytest.raises(ValueError, match=r"a\.csv should have each column once, got 'label' more than once"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: .*should have each name once, got text, text"):
        read_table(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", r"should be UTF-8 text"),
        (b"[" * 100_000, r"line 1: (cannot be read|not JSON)"),
        (b'{"text": "\\ud800"}', r"cannot be read as a table: .*surrogates"),
        (b'{"text": 1}\n{"text": "%s"}' % (b"long" * 10_000), r"cannot be read as a table: .{,300}$"),
        (b'{"label": 99999999999999999999999}', r"cannot be read as a table"),
    ],
)
def test_a_json_file_of_what_no_table_holds_is_named(tmp_path: Path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)a\.jsonl,? {message}"):
        read_table(tmp_path / "a.jsonl")


def test_an_empty_folder_is_no_data_set(tmp_path: Path):
    with pytest.raises(ValueError, match="split 'train' cannot be loaded"):
        load_split(str(tmp_path), None, "train")


def test_only_names_that_are_written_as_paths_have_to_be_folders(tmp_path: Path):
    check_data("data", None, str(tmp_path))
    check_data("data", "SetFit/TREC-QC", str(tmp_path))
    with pytest.raises(ValueError, match=r"data: there is no folder .*nowhere"):
        check_data("data", "./nowhere", str(tmp_path))
    check_data("data", "n" * 1000, str(tmp_path))
    (tmp_path / "news.csv").touch()
    with pytest.raises(ValueError, match=r"data='news\.csv' is a file, where a data set of the Hub or a folder is exp"):
        check_data("data", "news.csv", str(tmp_path))


def test_a_file_has_to_exist_and_to_be_of_a_known_kind(tmp_path: Path):
    (tmp_path / "a.csv").touch()
    check_file("train_file", "a.csv", str(tmp_path), [".csv"])
    check_file("train_file", None, str(tmp_path), [".csv"])
    with pytest.raises(ValueError, match=r"train_file='a.csv': expected a file that ends in one of .json"):
        check_file("train_file", "a.csv", str(tmp_path), [".json"])
    with pytest.raises(ValueError, match=r"train_file: there is no file .*b\.csv"):
        check_file("train_file", "b.csv", str(tmp_path), [".csv"])


def test_relative_names_start_from_the_setting_then_the_environment_then_here(monkeypatch):
    monkeypatch.setenv("META_TRAINER_DATA", "/from/environment")
    assert locate("a.csv", "/from/setting") == Path("/from/setting/a.csv")
    assert locate("a.csv", None) == Path("/from/environment/a.csv")
    monkeypatch.delenv("META_TRAINER_DATA")
    assert locate("a.csv", None) == Path("a.csv")


def test_data_are_named_by_their_set_and_subset_or_by_their_file():
    assert data_name("glue", "sst2", None) == "glue (sst2)"
    assert data_name("glue", None, None) == "glue"
    assert data_name(None, None, "text/trec6_train.parquet") == "trec6_train"
