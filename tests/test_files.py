"""Rows of files as a data set: right rows whatever the blocks, and errors that name file and row."""

import bz2
import gzip
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headwater as hw
from headwater.data import Group, csv
from headwater.errors import ConfigurationError, DataError

RATINGS = "ml-100k.ratings.tsv.gz"

pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))  # the first one makes a pipe that stays with the process


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


@pytest.fixture
def numbers(tmp_path):
    """Three files of 10 rows: a counts from 0 to 29, b is its half, c its name."""
    for file in range(3):
        rows = [f"{n},{n / 2},n{n}" for n in range(10 * file, 10 * file + 10)]
        write(tmp_path / f"part{file}.csv", "\n".join(["a,b,c", *rows]) + "\n")
    return str(tmp_path / "part*.csv")


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_several_files_are_one_data_set_with_a_dtype_for_each_column(numbers):
    files = hw.Files(numbers, hw.Csv())
    assert (len(files), files.groups) == (30, (10, 10, 10))
    batch = files[np.array([29, 0, 10, 9])]
    assert {name: column.dtype.kind for name, column in batch.items()} == {"a": "i", "b": "f", "c": "O"}
    assert batch["a"].tolist() == [29, 0, 10, 9]
    assert batch["b"].tolist() == [14.5, 0.0, 5.0, 4.5]
    assert batch["c"].tolist() == ["n29", "n0", "n10", "n9"]
    assert files[11] == {"a": 11, "b": 5.5, "c": "n11"}
    with pytest.raises(IndexError, match="rows 30 to 30 of 30"):
        files[30]


def test_columns_names_types_and_delimiters_are_as_told(tmp_path):
    path = write(tmp_path / "plain.tsv", "1\t2\tx\n3\t4\ty\n")
    files = hw.Files(path, hw.Csv(("v", "u"), delimiter="\t", names=("u", "v", "w"), types={"v": "float32"}))
    batch = files[[0, 1]]
    assert list(batch) == ["v", "u"]
    assert (batch["v"].dtype, batch["v"].tolist()) == (np.float32, [2.0, 4.0])
    assert (batch["u"].dtype, batch["u"].tolist()) == (np.int64, [1, 3])


@given(st.lists(st.sampled_from(["7", "12", "", "\r"]), max_size=30), st.booleans(), st.integers(1, 40))
def test_lines_are_counted_and_read_alike_whatever_the_blocks(tmp_path_factory, lines, ended, block):
    """Empty lines are no rows, the last one needs no end, and a block may end anywhere."""
    path = tmp_path_factory.mktemp("lines") / "rows.csv"
    write(path, "a\n7\n" + "\n".join(lines) + ("\n" if ended and lines else ""))
    expected = [7, *(int(line) for line in lines if line.strip())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv, "_BLOCK", block)
        files = hw.Files(path, hw.Csv())
        assert len(files) == len(expected)
        assert files[np.arange(len(files))]["a"].tolist() == expected


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress)]
)
def test_compressed_files_are_read_as_others(tmp_path, ending, compress):
    path = tmp_path / f"rows.csv{ending}"
    path.write_bytes(compress(b"a,b\n1,2\n3,4\n"))
    assert hw.Files(path, hw.Csv())[[1]]["b"].tolist() == [4]


def test_parquet_keeps_types_vectors_and_row_groups(tmp_path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(20, dtype=np.float32)), 2)
    columns = {"id": np.arange(10), "v": vectors, "kind": pa.array(["x", "y"] * 5).dictionary_encode()}
    path = parquet(tmp_path / "rows.parquet", columns, row_group_size=4)
    files = hw.Files([path, path], hw.Parquet())
    assert files.groups == (4, 4, 2, 4, 4, 2)
    batch = files[[3, 4, 19]]
    assert batch["id"].tolist() == [3, 4, 9]
    assert (batch["v"].dtype, batch["v"].tolist()) == (np.float32, [[6, 7], [8, 9], [18, 19]])
    assert batch["kind"].tolist() == ["y", "x", "y"]
    assert list(hw.Files(path, hw.Parquet(columns=["v"]))[[0]]) == ["v"]


def test_a_missing_float_is_nan_and_a_missing_text_none(tmp_path):
    path = parquet(tmp_path / "rows.parquet", {"x": [1.0, None], "s": ["a", None]})
    batch = hw.Files(path, hw.Parquet())[[0, 1]]
    assert np.isnan(batch["x"]).tolist() == [False, True]
    assert batch["s"].tolist() == ["a", None]


def test_files_travel_to_other_processes_without_what_they_keep(numbers):
    files = hw.Files(numbers, hw.Csv())
    assert files[0]["a"] == 0
    again = pickle.loads(pickle.dumps(files))
    assert again[[29]]["a"].tolist() == [29]
    assert len(pickle.dumps(files)) < 10_000


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_read_every_row_of_files_once(numbers, mode, shuffle):
    files = hw.Files(numbers, hw.Csv(["a"]))

    def work(worker):
        read = [n for b in worker.batches((files, np.arange(30)), 4, shuffle=shuffle) for n in b[0]["a"]]
        return [int(n) for n in read]

    values = hw.run(work, workers=2, engine="inline", sync=mode, patience=5, deadline=60).values
    assert sorted(values[0] + values[1]) == list(range(30))
    if mode == "sync":
        assert len(values[0]) == 15  # a stretch of the order, so that two of three files are touched
        assert len({n // 10 for n in values[0]}) == 2
        assert (values[0] == list(range(15))) is not shuffle


class Squares:
    """A reader of one's own: a file holds a number n and has n rows."""

    def reader(self, path):
        return self

    def groups(self, path):
        return [Group(int(Path(path).read_text()), 0, 0, 0)]

    def read(self, path, group):
        if group.rows == 13:
            raise RuntimeError("row 5 is bad")
        return {"square": np.arange(group.rows if group.rows != 14 else 1) ** 2}


def test_a_reader_of_ones_own_is_an_object_with_three_methods(tmp_path):
    paths = [write(tmp_path / str(n), str(n)) for n in (3, 0, 2)]
    files = hw.Files(paths, Squares())
    assert files[np.arange(5)]["square"].tolist() == [0, 1, 4, 0, 1]


# ── what can be wrong ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rows", "text"), [(13, "rows 1–13: the reader failed with RuntimeError: row 5"), (14, "gave 1 values")]
)
def test_a_reader_that_fails_is_told_with_file_and_rows(tmp_path, rows, text):
    files = hw.Files(write(tmp_path / "x", str(rows)), Squares())
    with pytest.raises(DataError, match=f"x, .*{text}"):
        files[0]


def test_no_file_no_path_and_unknown_columns_are_refused(tmp_path, numbers):
    with pytest.raises(ConfigurationError, match="no paths were given"):
        hw.Files([], hw.Csv())
    with pytest.raises(ConfigurationError, match=r"no file matches .*nothing\*"):
        hw.Files(tmp_path / "nothing*", hw.Csv())
    for reader in (hw.Csv(["a", "z"]), hw.Csv(types={"z": "int64"})):
        with pytest.raises(ConfigurationError, match="has no column 'z': choose from a, b, c"):
            len(hw.Files(numbers, reader))
    with pytest.raises(ConfigurationError, match="has the type 'number'"):
        len(hw.Files(numbers, hw.Csv(types={"a": "number"})))
    with pytest.raises(ConfigurationError, match="one character"):
        hw.Csv(delimiter="::")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        len(hw.Files("nowhere://x", hw.Csv()))
    path = parquet(tmp_path / "rows.parquet", {"x": [1]})
    with pytest.raises(ConfigurationError, match="has no column 'z': choose from x"):
        len(hw.Files(path, hw.Parquet(["z"])))


def test_files_that_cannot_be_read_are_named(tmp_path):
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"a\n" + b"1234\n" * 10_000)[:40])
    text = write(tmp_path / "text", "no columns here")
    for path, reader in ((tmp_path / "none", hw.Csv()), (tmp_path, hw.Csv()), (cut, hw.Csv())):
        with pytest.raises(DataError, match=f"cannot read .*{path.name}"):
            len(hw.Files(path, reader))
    for reader in (hw.Parquet(), hw.Parquet(["a"])):
        with pytest.raises(DataError, match=r"cannot read .*text"):
            len(hw.Files(text, reader))
    with pytest.raises(DataError, match="begins with an empty line"):
        len(hw.Files(write(tmp_path / "empty", ""), hw.Csv()))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("7", "row 25: 1 values, expected 2: '7'"),
        ("7,8,9", "row 25: 3 values, expected 2"),
        ("7,x", "row 25: column 'b' is b'x', expected int64"),
        ("7,", "row 25: column 'b' has no value, expected int64"),
        ('7,"8', "quoted value with a line break|row 25"),
    ],
)
@pytest.mark.parametrize("block", [30, 1 << 20])
def test_a_row_that_cannot_be_read_is_named(tmp_path, monkeypatch, row, text, block):
    monkeypatch.setattr(csv, "_BLOCK", block)
    monkeypatch.setattr(csv, "_HEAD", 40)
    rows = [f"{n},{n}" for n in range(40)]
    rows[24] = row
    good = write(tmp_path / "good.csv", "a,b\n1,2\n")
    bad = write(tmp_path / "bad.csv", "a,b\n" + "\n".join(rows) + "\n")
    files = hw.Files([good, bad], hw.Csv())
    with pytest.raises(DataError, match=f"bad.csv, .*({text})"):
        files[np.arange(len(files))]


def test_a_later_file_with_other_columns_is_refused(tmp_path):
    one = write(tmp_path / "one.csv", "a,b\n1,2\n")
    two = write(tmp_path / "two.csv", "b,a\n1,2\n")
    with pytest.raises(DataError, match=r"two\.csv has the columns b, a, but the first file a, b"):
        len(hw.Files([one, two], hw.Csv()))
    one = parquet(tmp_path / "one.parquet", {"x": [1]})
    for columns, found in (({"x": ["1"]}, "string"), ({"y": [1]}, "none")):
        two = parquet(tmp_path / "two.parquet", columns)
        with pytest.raises(DataError, match=f"two.parquet: column 'x' is {found}, but int64 in the first"):
            len(hw.Files([one, two], hw.Parquet()))


def test_missing_numbers_and_vectors_are_named_by_row(tmp_path):
    vectors = pa.array([[1.0, 2.0], [3.0, None]], pa.list_(pa.float32(), 2))
    for values, text in (
        (pa.array([1, None]), "row 2: column 'x' has no value"),
        (vectors, "row 2: column 'x' has a vec"),
    ):
        path = parquet(tmp_path / "rows.parquet", {"x": values})
        with pytest.raises(DataError, match=text):
            hw.Files(path, hw.Parquet())[0]


def test_a_damaged_row_group_is_named(tmp_path):
    path = Path(
        parquet(tmp_path / "rows.parquet", {"x": np.arange(1000)}, use_dictionary=False, compression="gzip")
    )
    data = bytearray(path.read_bytes())
    data[40:300] = bytes(260)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.parquet, rows 1–1000"):
        hw.Files(path, hw.Parquet())[0]


def test_an_error_in_a_file_reaches_the_training_function(tmp_path):
    path = write(tmp_path / "bad.csv", "a\n1\n2\n")
    files = hw.Files(path, hw.Csv(types={"a": "int64"}))
    assert len(files) == 2
    write(Path(path), "a\n1\nx\n")

    def work(worker):
        with pytest.raises(DataError, match=r"bad\.csv, row 2: column 'a'"):
            list(worker.batches(files, 1))
        return "went on"

    assert hw.run(work, workers=1, engine="inline", sync="async", deadline=30).values == ["went on"]


# ── real data ───────────────────────────────────────────────────────────────────────────────────


def _shared(name):
    for folder in Path(__file__).resolve().parents:
        if (folder / "shared" / "data" / name).exists():
            return folder / "shared" / "data" / name
    return None


@pytest.mark.skipif(_shared(RATINGS) is None, reason=f"{RATINGS} is in no folder shared/data above the tests")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_movielens_is_read_once_by_all_workers(tmp_path, mode):
    names = ("user", "item", "rating", "time")
    ratings = hw.Files(_shared(RATINGS), hw.Csv(("user", "rating"), delimiter="\t", names=names))

    def work(worker):
        count = total = 0
        for batch in worker.batches(ratings, 512, shuffle=True):
            count, total = count + len(batch["user"]), total + int(batch["rating"].sum())
        return worker.sum(count=count, total=total)

    result = hw.run(work, workers=2, engine="inline", sync=mode, deadline=60)
    with gzip.open(_shared(RATINGS), "rt") as lines:
        total = sum(int(line.split("\t")[2]) for line in lines)
    assert result.values == [{"count": 100_000.0, "total": float(total)}] * 2
