import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.config import validate
from dstrain.base.errors import DataError
from dstrain.base.protocols import IGNORED_LABEL
from dstrain.tasks.examples import Examples, read_task, split_by_hash
from dstrain.tasks.spec import TaskConfig

ROWS = [{"text": f"a sentence, number {i}", "label": ["neg", "pos"][i % 2]} for i in range(40)]


def write(path, rows):
    """Write rows in the format the name asks for."""
    names = list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".jsonl" in path.suffixes:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif ".tsv" in path.suffixes:
        text = "".join("\t".join(str(v) for v in values) + "\n" for values in [names, *(r.values() for r in rows)])
    else:
        quoted = [[f'"{v}"' for v in values] for values in [names, *(r.values() for r in rows)]]
        text = "".join(",".join(values) + "\n" for values in quoted)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def task(train, *, kind="classification", **changes):
    data = {"kind": kind, "train": str(train), **{k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}}
    return validate(TaskConfig, data, source="task")


def read_all(path, **changes):
    """Every example of one file, unsplit: the file is its own validation file."""
    return read_task(task(path, validation=path, **changes)).train


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.csv.gz", "t.tsv.gz", "t.jsonl.gz"])
def test_every_format_gives_the_same_examples(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    data = read_task(task(path, validation=path))
    assert data.labels == ("neg", "pos")
    assert data.num_outputs == 2
    assert data.train.texts == tuple(row["text"] for row in ROWS)
    assert data.train.labels.tolist() == [0, 1] * 20
    assert data.train.labels.dtype == np.int64
    assert data.train.pairs is None


def test_pairs_and_other_column_names(tmp_path):
    rows = [{"premise": "p", "hypothesis": f"h{i}", "gold": i % 3} for i in range(6)]
    examples = read_all(write(tmp_path / "t.jsonl", rows), text="premise", text_pair="hypothesis", label="gold")
    assert examples.pairs == ("h0", "h1", "h2", "h3", "h4", "h5")
    assert examples.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_quotes_are_letters_in_tsv_and_quoting_in_csv(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tlabel\n"so called\ta\nnot "good"\tb\n')
    (tmp_path / "t.csv").write_text('text,label\n"one, two\nlines",a\n"say ""no""",b\n')
    assert read_all(tmp_path / "t.tsv").texts == ('"so called', 'not "good"')
    assert read_all(tmp_path / "t.csv").texts == ("one, two\nlines", 'say "no"')


def test_rows_are_lines_of_the_file(tmp_path):
    assert read_all(write(tmp_path / "t.tsv", ROWS)).rows == tuple(range(2, 42))
    assert read_all(write(tmp_path / "t.jsonl", ROWS)).rows == tuple(range(1, 41))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        (["b", "a "], ("a", "b")),
        (["-1", "1"], ("-1", "1")),
    ],
)
def test_labels_are_sorted_and_spelled_one_way(tmp_path, values, names):
    path = write(tmp_path / "t.jsonl", [{"text": "x", "label": v} for v in values])
    assert read_task(task(path, validation=path)).labels == names


def test_given_labels_keep_their_order(tmp_path):
    path = write(tmp_path / "t.csv", ROWS)
    data = read_task(task(path, validation=path, labels=["pos", "neg"]))
    assert data.labels == ("pos", "neg")
    assert data.train.labels.tolist() == [1, 0] * 20


def test_a_regression_has_numbers_and_one_output(tmp_path):
    path = write(tmp_path / "t.tsv", [{"text": "x", "label": v} for v in ("1", "-2.5", "1e3")])
    data = read_task(task(path, kind="regression", validation=path))
    assert data.train.labels.tolist() == [1.0, -2.5, 1000.0]
    assert data.train.labels.dtype == np.float32
    assert (data.labels, data.num_outputs) == (None, 1)


def test_a_test_file_may_come_without_labels(tmp_path):
    path = write(tmp_path / "t.csv", ROWS)
    test = write(tmp_path / "test.csv", [{"text": "x"}])
    data = read_task(task(path, test=test))
    assert data.test.labels.tolist() == [IGNORED_LABEL]
    assert not data.test.has_labels
    assert data.train.has_labels


def test_without_a_validation_file_a_share_is_held_back(tmp_path):
    data = read_task(task(write(tmp_path / "t.csv", ROWS), validation_fraction=0.3))
    assert len(data.train) + len(data.validation) == 40
    assert 4 <= len(data.validation) <= 20
    assert not set(data.train.texts) & set(data.validation.texts)


def examples(texts):
    n = len(texts)
    return Examples(texts=tuple(texts), pairs=None, labels=np.zeros(n, dtype=np.int64), rows=tuple(range(n)))


@given(st.permutations([f"text {i}" for i in range(60)]))
def test_the_side_of_an_example_does_not_depend_on_the_order(texts):
    kept, held = split_by_hash(examples(texts), fraction=0.2, source=Path("t.csv"))
    expected = split_by_hash(examples(sorted(texts)), fraction=0.2, source=Path("t.csv"))
    assert (set(kept.texts), set(held.texts)) == (set(expected[0].texts), set(expected[1].texts))


def test_equal_texts_stay_on_one_side():
    kept, held = split_by_hash(examples([f"text {i % 30}" for i in range(90)]), fraction=0.3, source=Path("t.csv"))
    assert not set(kept.texts) & set(held.texts)
    assert len(kept) + len(held) == 90


def test_a_split_with_an_empty_side_says_what_to_do(tmp_path):
    path = write(tmp_path / "t.csv", ROWS[:2])
    with pytest.raises(DataError, match=r"t\.csv: its 2 examples cannot be split .*task\.validation"):
        read_task(task(path, validation_fraction=0.000001))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "no examples"),
        ("t.csv", b"text,label\n", "no examples"),
        ("t.csv", b"text,label\nx,a,b\n", r":2|line 2"),
        ("t.csv", b"text,label\nx,a\n\xff\xfe,b\n", r"3.*UTF-8"),
        ("t.csv", b"sentence,label\nx,a\n", r"row 2 has no column 'text'; it has 'sentence', 'label'"),
        (
            "t.tsv",
            b"text,label\nx,a\n",
            r"it has 'text,label'\. The columns seem to be separated by ',': name the file \.csv",
        ),
        ("t.csv", b"text,lable\nx,a\n", r"no column 'label'; it has 'text', 'lable'\. Did you mean 'lable'"),
        ("t.csv", b"text,label\nx,a\ny,\n", r"row 3: column 'label' is empty"),
        ("t.csv", b"text,label\n,a\n", r"row 2: column 'text' is empty"),
        ("t.csv", b"text,label\nx,a\ny,a\n", r"every example has the label 'a'"),
        ("t.jsonl", b'{"text": 5, "label": "a"}\n', r"row 1: column 'text' is not text but int"),
        ("t.jsonl", b'{"text": "x", "label": "a"}\n{"text": \n', r"2.*JSON"),
        ("t.jsonl", b"[1, 2]\n", "JSON object"),
        ("t.jsonl", b'{"text": "x", "label": null}\n', "column 'label' is empty"),
        ("t.jsonl.gz", b"not gzip", r"t\.jsonl\.gz"),
        ("t.parquet", b"not parquet", r"t\.parquet"),
        ("t.xlsx", b"", "format"),
    ],
)
def test_a_bad_file_gets_one_message_naming_it_and_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_all(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_gzip_file_is_refused(tmp_path):
    path = write(tmp_path / "t.csv.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"t\.csv\.gz"):
        read_all(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: no such"):
        read_all(tmp_path / "nowhere.csv")


def test_an_unknown_label_in_validation_is_refused_with_the_known_ones(tmp_path):
    train = write(tmp_path / "train.csv", ROWS)
    validation = write(tmp_path / "dev.csv", [{"text": "x", "label": "pos"}, {"text": "y", "label": "neutral"}])
    with pytest.raises(DataError, match=r"dev\.csv: row 3: .*'neutral'.*train\.csv: 'neg', 'pos'"):
        read_task(task(train, validation=validation))


@pytest.mark.parametrize("value", ["four", "nan", "inf"])
def test_a_label_that_is_no_number_is_refused_in_a_regression(tmp_path, value):
    path = write(tmp_path / "t.csv", [{"text": "x", "label": "1.5"}, {"text": "y", "label": value}])
    with pytest.raises(DataError, match=rf"row 3: column 'label' is '{value}', not a finite number"):
        read_all(path, kind="regression")


def test_numbers_taken_for_classes_are_pointed_out(tmp_path):
    path = write(tmp_path / "t.csv", [{"text": "x", "label": i / 7} for i in range(1200)])
    with pytest.raises(DataError, match=r"1200 different labels.*task\.kind=regression"):
        read_all(path)
