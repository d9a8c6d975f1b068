"""Data files: every value is learnt as the file has it, and what can't be read is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_support import learnt, load, write_rows
from datasets import Dataset, DatasetDict

from ds_agsel.errors import DataError
from launch.data import files, sources


def answers(dataset: str) -> list[str]:
    return [text.removesuffix("[end]") for _, text in learnt(dataset)]


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(count)]


# -- values


@pytest.mark.parametrize(
    "literal", ['"2024-05-01"', "7", "3.50", "1e5", "-0", "12345678901234567890123", "true", '"true"', "NaN", '" x\\n"']
)
def test_a_json_value_is_learnt_as_it_is_written(tmp_path: Path, literal: str) -> None:
    lines = [f'{{"question": "a", "answer": {value}}}' for value in (literal, "0.5", '"2024-05-02"', literal)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.json").write_text("[" + ",\n".join(lines) + "]")
    expected = json.loads(literal) if literal.startswith('"') else literal
    for name in ("a.jsonl", "b.json"):
        assert answers(str(tmp_path / name)) == [expected, "0.5", "2024-05-02", expected]


def test_a_csv_value_is_learnt_as_it_is_written(tmp_path: Path) -> None:
    values = ["01230", "0.50", "NA", "null", "2024-05-01", "a,b", 'say "x"', "two\nlines"]
    quoted = [f'q,"{value}"'.replace('say "x"', 'say ""x""') for value in values]
    (tmp_path / "a.csv").write_text("question,answer\n" + "\n".join(quoted) + "\n")
    assert sorted(answers(str(tmp_path / "a.csv"))) == sorted(values)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\na,1\nb,2\n", encoding="utf-8-sig")
    assert answers(str(tmp_path / "a.csv")) == ["1", "2"]


def test_text_that_looks_like_a_stored_list_stays_text(tmp_path: Path) -> None:
    dataset = write_rows(
        tmp_path / "a.jsonl", [{"question": "q", "answer": "\x1e[1]"}, {"question": "q", "answer": "b"}]
    )
    assert answers(dataset) == ["\x1e[1]", "b"]


def test_a_column_that_the_first_rows_do_not_have_is_read(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2", "level": "hard"}]
    assert set(load(write_rows(tmp_path / "a.jsonl", rows), validation_rows=0, test_rows=0).train["level"]) == {
        None,
        "hard",
    }


def test_rows_under_the_one_list_of_an_object_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", "data": rows_of(4)}, indent=1))
    assert answers(str(tmp_path / "a.json")) == [f"#### {i}" for i in range(4)]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    assert answers(write_rows(tmp_path / "a.jsonl", rows_of(3))) == ["#### 0", "#### 1", "#### 2"]
    assert answers(write_rows(tmp_path / "a.jsonl", rows_of(2))) == ["#### 0", "#### 1"]


# -- errors

GOOD = '{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("utf16.jsonl", (GOOD * 2).encode("utf-16"), "line 1: this is UTF-16. Save the file as UTF-8."),
        ("utf16.csv", "question,answer\na,1\n".encode("utf-16"), "line 1: this is UTF-16. Save the file as UTF-8."),
        ("utf32.json", GOOD.encode("utf-32"), "line 1: this is UTF-32"),
        ("bare16.jsonl", GOOD.encode("utf-16-le"), "line 1 has a zero byte, as UTF-16 has"),
        ("latin.jsonl", GOOD.encode() + '{"question": "é"}'.encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9"),
        ("latin.csv", "question,answer\na,1\né,2\n".encode("latin-1"), "line 3 is not UTF-8 (byte 0xe9"),
        ("deep.jsonl", GOOD.encode() + b"[" * 100_000, "line 2 has JSON that is nested too deep"),
        ("deep.json", b'[\n{"question": ' + b"[" * 100_000, "line 2 has JSON that is nested too deep"),
        ("comma.json", f"[\n{GOOD},\n{GOOD},\n]".encode(), "line 5 is no valid JSON (a comma before ']'"),
        ("missing.json", f"[\n{GOOD}{GOOD}]".encode(), "line 3 is no valid JSON ('{' where"),
        ("open.json", f"[\n{GOOD}".encode(), "line 3 is no valid JSON (the end where ',' or ']' belongs)"),
        ("inner.json", b'[\n{"question": "a",\n"answer": }]', "line 3 is no valid JSON (Expecting value"),
        ("half.jsonl", GOOD.encode() + b'{"question": "\\ud800", "answer": "1"}', "half a character"),
        ("number.json", b"[1]", "line 1 is str, not an object"),
        ("twice.csv", b"answer,answer\na,1\n", "line 1 names the column 'answer' twice"),
        ("quote.csv", b'question,answer\na,1\nb,"2\n', "the row that begins on line 3: unexpected end of data"),
    ],
)
def test_a_file_that_can_not_be_read_is_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / name))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / name} can't be read: ") and message in text and "\n" not in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_that_can_not_be_used_is_named_with_its_line(tmp_path: Path, name: str) -> None:
    rows = [{**row, "answer": "" if index == 4 else row["answer"]} for index, row in enumerate(rows_of(8))]
    if name == "a.csv":
        Dataset.from_list(rows).to_csv(tmp_path / name)
    elif name == "a.json":
        (tmp_path / name).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    else:
        write_rows(tmp_path / name, rows)
    line = 5 if name == "a.jsonl" else 6
    with pytest.raises(DataError, match=f"^Line {line} of {name} can't be used: its column 'answer' is empty"):
        learnt(str(tmp_path / name))


def test_a_row_of_a_parquet_file_is_counted_before_it_is_shuffled(tmp_path: Path) -> None:
    rows = [{**row, "answer": None if index == 4 else row["answer"]} for index, row in enumerate(rows_of(8))]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^Row 5 of the train split can't be used"):
        learnt(str(tmp_path / "a.parquet"))


# -- folders


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    Dataset.from_list(rows_of(6)).save_to_disk(tmp_path / "one")
    assert len(load(str(tmp_path / "one")).train) == 1
    both = {"train": Dataset.from_list(rows_of(6)), "dev": Dataset.from_list(rows_of(4))}
    DatasetDict(both).save_to_disk(tmp_path / "both")
    splits = load(str(tmp_path / "both"), test_rows=1)
    assert (len(splits.train), len(splits.validation)) == (5, 2)


def test_a_damaged_save_to_disk_folder_is_named(tmp_path: Path) -> None:
    Dataset.from_list(rows_of(6)).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="one can't be read as a save_to_disk folder"):
        load(str(tmp_path / "one"))


def test_the_shards_of_a_hub_clone_are_read(tmp_path: Path) -> None:
    data = tmp_path / "clone" / "data"
    data.mkdir(parents=True)
    for shard in range(2):
        Dataset.from_list(rows_of(5)).to_parquet(data / f"train-0000{shard}-of-00002.parquet")
    write_rows(data / "test-00000-of-00001.jsonl", rows_of(4))
    for folder in (data.parent, data):
        splits = load(str(folder))
        assert (len(splits.train), len(splits.test)) == (8, 3)


def test_the_configs_of_a_hub_clone_s_readme_are_followed(tmp_path: Path) -> None:
    for config in ("main", "other"):
        (tmp_path / config).mkdir()
        write_rows(tmp_path / config / "part.jsonl", [{"question": config, "answer": "012"}] * 6)
    configs = [f"- config_name: {name}\n  data_files: {name}/part.jsonl\n" for name in ("main", "other")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    splits = load(str(tmp_path), dataset_config="other")
    assert set(splits.train["question"]) == {"other"} and set(splits.train["answer"]) == {"012"}
    with pytest.raises(DataError, match=r"the configs of its README can't be used: .*(main|Config name)"):
        load(str(tmp_path))


def test_a_folder_without_a_file_for_training_says_what_it_holds(tmp_path: Path) -> None:
    write_rows(tmp_path / "alpaca.jsonl", rows_of(6))
    with pytest.raises(DataError, match=r"has no train file; it holds 'alpaca\.jsonl'\. Name one train\.json"):
        load(str(tmp_path))


def test_a_split_of_a_folder_can_be_named(tmp_path: Path) -> None:
    DatasetDict({"sft": Dataset.from_list(rows_of(6)), "train": Dataset.from_list(rows_of(9))}).save_to_disk(
        tmp_path / "d"
    )
    assert len(load(str(tmp_path / "d"), train_split="sft").train) == 1
    with pytest.raises(DataError, match=r"--train-split='dpo' is not in .* Its splits: "):
        load(str(tmp_path / "d"), train_split="dpo")


def test_test_problems_keep_their_order(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "a.jsonl", rows_of(9))
    part, _ = sources.load_test(sources.DataOptions(dataset, test_rows=3))
    assert part["answer"] == ["#### 0", "#### 1", "#### 2"] and part[files.PLACE][2] == "line 3 of a.jsonl"
