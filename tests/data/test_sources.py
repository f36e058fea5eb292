"""Every kind of source gives the same rows, from where they stand in the file."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_engine.data.records import Origin
from hybrid_engine.data.sources import open_source
from hybrid_engine.data.textfiles import open_csv, open_json, open_jsonl
from hybrid_engine.errors import UserError

ROWS = [
    {"text": "plain", "label": "1"},
    {"text": 'a "quoted", comma\nand a second line', "label": "0"},
    {"text": "naïve \u2028 日本語 😀", "label": "1"},
]


def write(path, rows):
    """The rows in the format that the file's name says."""
    if path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
        )
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "saved"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    source = open_source(write(tmp_path / name, ROWS))
    assert len(source) == 3
    assert list(source.scan()) == list(enumerate(ROWS))
    assert [source.read(row) for row in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "saved"])
def test_conversations_survive_every_format_that_can_hold_them(tmp_path, name):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": turns[:1]}]
    source = open_source(write(tmp_path / name, rows))
    assert [row for _, row in source.scan()] == rows
    assert source.read(1) == rows[1]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]),
        ("a.json", ["a.json:2", "a.json:6", "a.json:10"]),
        ("a.csv", ["a.csv:2", "a.csv:3", "a.csv:5"]),
        ("a.parquet", ["a.parquet, row 1", "a.parquet, row 2", "a.parquet, row 3"]),
    ],
)
def test_origins_name_the_line_a_row_starts_on(tmp_path, name, places):
    source = open_source(write(tmp_path / name, ROWS))
    assert [str(source.origin(row)).removeprefix(f"{tmp_path}/") for row in range(3)] == places


def test_blank_lines_and_byte_order_marks_are_not_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    source = open_jsonl(path)
    assert [source.read(row)["text"] for row in range(len(source))] == ["a", "b"]
    assert source.origin(1) == Origin(str(path), 4)
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\n\na\n\nb\n")
    assert list(open_csv(path).scan()) == [(0, {"text": "a"}), (1, {"text": "b"})]
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf [{"text": "\xc3\xa9"}, {"text": "b"}] ')
    assert list(open_json(path).scan()) == [(0, {"text": "é"}), (1, {"text": "b"})]


@given(
    st.lists(st.fixed_dictionaries({"text": st.text(), "label": st.text()}), min_size=1, max_size=8)
)
def test_any_text_survives_every_text_format(tmp_path_factory, rows):
    storable = [
        {k: v.encode("utf-8", "replace").decode().replace("\0", "") for k, v in row.items()}
        for row in rows
    ]
    directory = tmp_path_factory.mktemp("any")
    for name in ("a.jsonl", "a.json", "a.csv"):
        source = open_source(write(directory / name, storable))
        assert list(source.scan()) == list(enumerate(storable)), name


def test_splits_of_a_saved_dataset_are_named_after_a_hash_sign(tmp_path):
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert open_source(f"{tmp_path}/saved").read(0) == {"text": "train"}
    assert open_source(f"{tmp_path}/saved#test").read(0) == {"text": "test"}
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        open_source(f"{tmp_path}/saved#dev")


def test_parquet_leaves_no_temporary_file(tmp_path, monkeypatch):
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spool))
    source = open_source(write(tmp_path / "a.parquet", ROWS))
    assert list(spool.iterdir()) == []
    assert source.read(1) == ROWS[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "{path}: no rows; the file is empty or holds only a header"),
        ("blank.jsonl", "\n \n", "{path}: no rows; the file is empty or holds only a header"),
        ("empty.csv", "", "{path}: no rows; the file is empty or holds only a header"),
        ("header.csv", "text,label\n", "{path}: no rows; the file is empty or holds only a header"),
        ("empty.json", "[]", "{path}: no rows; the file is empty or holds only a header"),
        ("object.json", '\n{"text": "a"}', "{path}:2: a .json file must hold a list of objects"),
        ("broken.json", '[{"a": 1},\n {"a": }]', "{path}:2: bad JSON: Expecting value (column 8)"),
        (
            "comma.json",
            '[{"a": 1}\n{"a": 2}]',
            "{path}:2: bad JSON: expected ',' or ']' after an element",
        ),
        ("tail.json", '[{"a": 1}]\nx', "{path}:2: bad JSON: text after the closing ']'"),
        ("open.json", '[{"a": 1}', "{path}:1: bad JSON: expected ',' or ']' after an element"),
        ("twice.csv", "text,text\na,b\n", "{path}:1: the header names column 'text' twice"),
        ("quote.csv", 'text\n"a" b\n', "{path}:2: bad CSV: ',' expected after '\"'"),
        ("broken.parquet", "PAR1", "{path}: not a readable parquet file"),
        (
            "notes.txt",
            "a",
            "{path}: unknown file type '.txt'; give one of .jsonl, .json, .csv, .parquet",
        ),
    ],
)
def test_unreadable_files_are_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError) as error:
        open_source(str(path))
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


def test_missing_files_and_plain_directories(tmp_path):
    with pytest.raises(UserError, match=r"'gone\.jsonl': no such file; check the path"):
        open_source("gone.jsonl")
    with pytest.raises(UserError, match="no such file or directory"):
        open_source("./gone")
    with pytest.raises(UserError, match="is a directory but no saved dataset"):
        open_source(str(tmp_path))


def test_a_name_the_hub_does_not_give_says_what_else_to_do(monkeypatch):
    def unreachable(name):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as error:
        open_source("someone/some-data")
    assert str(error.value) == (
        "data source 'someone/some-data' is neither a local file nor a dataset that the hub gave "
        "us "
        "(Couldn't reach 'someone/some-data' on the Hub); check the spelling and the network, or "
        "give a .jsonl, .json, "
        ".csv or .parquet file"
    )
