"""One table in every format: the same rows, and what is said of files that are damaged."""

import gzip
import json
import sys

import polars as pl
import pytest

from jaxsafety.formats import rows_file

ROWS = [
    {"prompt": 'Say "hi",\nthen ü', "turns": [{"role": "user", "content": "a"}], "flag": True},
    {"prompt": "b\u2028c", "turns": [{"role": "user", "content": "d", "name": "e"}], "flag": False},
]


def read(path):
    return list(rows_file.rows(path, what="examples", such="rows"))


def write(path, content):
    (path.write_bytes if isinstance(content, bytes) else path.write_text)(content)
    return path


def test_json_in_all_its_forms_is_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    files = {
        "a.jsonl": lines,
        "b.json": lines,
        "c.txt": "\ufeff" + lines.replace("\n", "\r\n\n"),
        "d.json": json.dumps(ROWS, indent=1),
        "e.jsonl": " \n" + json.dumps(ROWS),
        "f.jsonl.gz": gzip.compress(lines.encode()),
        "g.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    }
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        assert [row for row, _ in read(write(tmp_path / name, content))] == ROWS, name
    places = [where for _, where in read(tmp_path / "c.txt")] + [where for _, where in read(tmp_path / "d.json")]
    assert [place.rpartition(", ")[2] for place in places] == ["line 1", "line 3", "row 1", "row 2"]


def test_parquet_is_the_same_rows_without_the_fields_that_another_turn_has(tmp_path):
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "named_otherwise").write_bytes((tmp_path / "a.parquet").read_bytes())
    for name in ("a.parquet", "named_otherwise"):
        assert [row for row, _ in read(tmp_path / name)] == ROWS
    pl.DataFrame({"prompt": ["a", None]}).write_parquet(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[1] == ({"prompt": None}, f"{tmp_path / 'b.parquet'}, row 2")


def test_a_table_of_text_has_empty_cells(tmp_path):
    text = 'id,prompt,note\n1,"Say ""hi"",\nthen ü",\n\n2, b ,c\n'
    expected = [{"id": "1", "prompt": 'Say "hi",\nthen ü', "note": None}, {"id": "2", "prompt": " b ", "note": "c"}]
    for name, content in (("a.csv", text), ("b.CSV", "\ufeff" + text), ("c.tsv", text.replace(",", "\t"))):
        found = [row for row, _ in read(write(tmp_path / name, content))]
        assert [{key: value and value.replace("\t", ",") for key, value in row.items()} for row in found] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2,3\n", "a.csv, row 1 has 3 cells, expected 2 as its header"),
        ("a.csv", "a,a\n1,2\n", "a.csv has two columns 'a': expected each once"),
        ("a.csv", 'a,b\n1,2\n3,"4\n', "a.csv is not CSV behind row 1"),
        ("a.csv", "a,b\n", "a.csv holds no examples: expected rows"),
        ("a.csv", "", "a.csv holds no examples"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json is not JSON: Expecting ':' delimiter at line 2, character 7"),
        ("a.json", '[{"a": 1}, 2]', "a.json, row 2 must be an object of columns, such as prompt, got 2"),
        ("a.json", '[{"a": 1, "a": 2}]', "a.json is not JSON: an object has a twice, expected once"),
        ("a.json", "[]", "a.json holds no examples: expected rows"),
        ("a.jsonl", b'{"a": "\xff"}', "a.jsonl is not text in UTF-8: expected rows"),
        # Without the time, by which the two workers would tell two tests apart.
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 9, mtime=0)[:-9], "a.jsonl.gz is not whole: gzip says"),
        ("a.parquet", "a,b\n", "a.parquet is not Parquet: expected a file that begins with PAR1"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as Parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read(write(tmp_path / name, content))


def test_parquet_without_polars_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ImportError, match=r"a.parquet needs polars: pip install '.\[report\]' in a checkout"):
        read(write(tmp_path / "a.parquet", b"PAR1"))
