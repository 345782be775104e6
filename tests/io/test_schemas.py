"""Files against schemas: the first field that breaks a rule is named, in one line, whatever is wrong with the file."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, PositiveInt

from lowrank.io.schemas import Schema, check_schema, one_of, parse_json, read_json


class _Row(Schema):
    name: str
    rank: PositiveInt
    share: float | None = None
    kind: Annotated[str, one_of(["b", "a"])] = "a"
    inputs: PositiveInt = Field(1, alias="in")


class _File(Schema):
    rows: dict[str, _Row] = Field(min_length=1)


ROW = {"name": "x", "rank": 2}
WRONG: dict[str, tuple[Any, str]] = {
    "no object": ([1], r"`path` must be a valid .*, got \[1\] in 'f.json'\.$"),
    "null": (None, "got None in 'f.json'"),
    "no key": ({}, r"must have the key 'rows', got none in 'f.json'\.$"),
    "no key further in": ({"rows": {"q": {"rank": 1}}}, "must have the key 'name' in 'rows.q', got none"),
    "no row": ({"rows": {}}, r"must have at least 1 item at 'rows', got \{\}"),
    "text for a number": ({"rows": {"q": ROW | {"rank": "2"}}}, "must be a valid integer at 'rows.q.rank', got '2'"),
    "a fraction": ({"rows": {"q": ROW | {"rank": 2.5}}}, "must be a valid integer at 'rows.q.rank', got 2.5"),
    "true": ({"rows": {"q": ROW | {"rank": True}}}, "must be a valid integer at 'rows.q.rank', got True"),
    "zero": ({"rows": {"q": ROW | {"rank": 0}}}, "must be greater than 0 at 'rows.q.rank', got 0"),
    "NaN": ({"rows": {"q": ROW | {"share": float("nan")}}}, "must be a finite number at 'rows.q.share', got nan"),
    "unknown": ({"rows": {"q": ROW | {"kind": "c"}}}, r"must be one of \['a', 'b'\] at 'rows.q.kind', got 'c'"),
    "keyword": ({"rows": {"q": ROW | {"in": -1}}}, "must be greater than 0 at 'rows.q.in', got -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_field_that_breaks_the_schema_is_named_in_one_line(case: str) -> None:
    content, words = WRONG[case]
    with pytest.raises(ValueError, match=words) as caught:
        check_schema(content, _File, "path", "f.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_holds_comes_back_as_it_is_with_keys_of_no_field() -> None:
    content = {"rows": {"q": ROW | {"note": [1, 2], "share": 1}}, "version": 3}
    assert check_schema(content, _File, "path", "f.json") is content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "whole JSON"),
        ('{"rows": ', "whole JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' comes twice"),
        ("[" * 200_000, "some levels"),
        ('{"a":' * 200_000, "some levels"),
        ("1" * 5_000, "whole JSON"),
    ],
    ids=["empty", "torn", "doubled", "doubled below", "deep lists", "deep objects", "long number"],
)
def test_what_is_no_plain_json_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"`path` must be .*{words}"):
        parse_json(text, "path", "f.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"`path` must be a file written by save, got '{path}'"):
            read_json(path, "path", _File, "save")
    (binary := tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=f"`path` must be text in UTF-8, got '{binary}'"):
        read_json(binary, "path", _File)
    (whole := tmp_path / "whole.json").write_text(json.dumps({"rows": {"q": ROW}}), encoding="utf8")
    assert read_json(whole, "path", _File) == {"rows": {"q": ROW}}
