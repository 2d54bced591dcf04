"""Files of records in the forms that people have; one bad record costs itself."""

import gzip
import io
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources.json_array import BLOCK, elements
from megatron_anyexperts.corpus.sources.record_files import form_of
from tests.corpus.raw import corpus_of, items, write

RECORDS = [{"text": f'Row {number}, [{{"quoted\\" \u00e9' + "x" * (number % 90)} for number in range(150)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def texts(root, path, **options):
    """What a text table gives: text, or the reason why not."""
    found = items(corpus_of(root, {"type": "text_table", "path": path}, **options))
    return [item.reason if isinstance(item, Rejected) else item.fields["text"] for item in found]


WANTED = [record["text"] for record in RECORDS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps(RECORDS, indent=2).encode()),
        ("a.json", b"\xef\xbb\xbf \n" + json.dumps(RECORDS).encode() + b"\n"),
        ("a.json", LINES),
        ("a.JSONL", LINES),
        ("a.Json.GZ", gzip.compress(json.dumps(RECORDS).encode())),
        ("a.json.gz", gzip.compress(LINES, mtime=0)),
        ("a.ndjson.zst", zstandard.compress(LINES[:999]) + zstandard.compress(LINES[999:])),
        ("a.csv.gz", gzip.compress(b"text\nplain\n", mtime=0)),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [500, 10**6])
def test_every_form_holds_the_same_records(tmp_path, name, content, chunk_bytes):
    write(tmp_path / "rows" / name, content)
    assert texts(tmp_path, "rows", chunk_bytes=chunk_bytes) == (["plain"] if "csv" in name else WANTED)


def test_zstandard_windows_of_any_size_and_truncation(tmp_path):
    long = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=long).compressobj()
    data = packed.compress(LINES) + packed.flush()
    assert zstandard.get_frame_parameters(data).window_size > 2**27
    write(tmp_path / "a.jsonl.zst", data)
    assert texts(tmp_path, "a.jsonl.zst") == WANTED
    write(tmp_path / "cut.jsonl.zst", data[: len(data) * 2 // 3])
    assert texts(tmp_path, "cut.jsonl.zst")[-1] == "damaged compressed file"


JSON = st.recursive(
    st.none() | st.floats(allow_nan=False) | st.text(st.sampled_from('a"\\[]{},\u00e9'), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


class Trickle(io.BytesIO):
    """A file that hands over a few bytes at a time, so that every border falls everywhere."""

    step = 3

    def read1(self, _size=-1):
        return super().read1(self.step)


@given(values=st.lists(JSON, min_size=1), indent=st.none() | st.integers(0, 2), step=st.integers(1, 5))
def test_elements_of_an_array_are_those_that_a_parser_finds(values, indent, step):
    document = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    file = Trickle(document)
    file.step = step
    file.seek(1)
    found = list(elements(file, 1, 10**6))
    assert [json.loads(element) for _, element in found] == values
    for (start, _), value in zip(found, values, strict=True):
        again = io.BytesIO(document)
        again.seek(start)
        assert json.loads(next(elements(again, start, 10**6))[1]) == value


def test_a_damaged_element_costs_itself_and_a_huge_one_no_memory(tmp_path):
    good = json.dumps({"text": "good"})
    parts = [good, '{"text": bad}', good, '"a text"', good, "}", good, json.dumps({"text": "x" * 3 * BLOCK}), good]
    write(tmp_path / "a.json", "[" + ",".join(parts) + "]")
    found = texts(tmp_path, "a.json", limits={"max_media_bytes": BLOCK})
    assert found.count("good") == 5 and found.count("too many bytes") == 1 and found.count("damaged JSON") >= 2
    assert found.count("JSON is not an object") == 1
    for cut in ("[" + good + ",", "[" + good + "," + good[:5], "[" + good):
        write(tmp_path / "a.json", cut)
        assert "damaged JSON" in texts(tmp_path, "a.json") and len(texts(tmp_path, "a.json")) <= 2


def test_one_object_over_several_lines_is_one_rejection_that_names_the_forms(tmp_path):
    for name, pack in {"a.json": bytes, "a.json.gz": gzip.compress}.items():
        write(tmp_path / name, pack(json.dumps({"text": "x", "more": [1, 2]}, indent=1).encode()))
        [item] = items(corpus_of(tmp_path, {"type": "text_table", "path": name}))
        assert item.reason == "one JSON object" and "array" in item.detail


def test_a_missing_field_names_those_there_are(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps({"instruction": "x", "output": "y"}))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["x"], "completion": ["y"]}), tmp_path / "a.parquet")
    for name, field in {"a.jsonl": "instruction", "a.parquet": "completion"}.items():
        [item] = items(corpus_of(tmp_path, {"type": "text_table", "path": name}))
        assert "'text' is missing" in item.detail and field in item.detail and "text_field" in item.detail


def broken_strings(values: list[bytes]) -> pyarrow.Array:
    """An Arrow array of text that is not all UTF-8."""
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers())


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([0, 2**62, 1], pyarrow.timestamp("us")),
        pyarrow.array([0, 2**31 - 1, 1], pyarrow.date32()),
        pyarrow.array([1, 2, 3], pyarrow.timestamp("ns")),
        pyarrow.array([1, 2, 3], pyarrow.timestamp("us", "Mars/Base")),
        pyarrow.array([1, 2, 3], pyarrow.time64("ns")),
        pyarrow.array([1, 2**62, 3], pyarrow.duration("s")),
        broken_strings([b"a", b"\xff", b"c"]),
    ],
    ids=lambda column: str(column.type),
)
def test_what_python_cannot_hold_costs_nothing_where_it_is_not_needed(tmp_path, column):
    table = pyarrow.table({"text": ["a", "b", "c"], "other": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path, "a.parquet") == ["a", "b", "c"]
    nested = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant", "user"]), column], ["role", "stamp"])
    rows = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3]), nested)
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "b.parquet")
    found = items(corpus_of(tmp_path, {"type": "chat", "path": "b.parquet"}))
    # Within a needed column times become numbers, and text that is none costs its row.
    expected = ["text is not UTF-8"] if pyarrow.types.is_string(column.type) else []
    assert [item.reason for item in found if item.reason != "turn without content"] == expected and len(found) == 3


def test_a_row_that_is_not_utf8_costs_itself(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"text": broken_strings([b"a", b"\xff\xfe", b"c"])}), tmp_path / "a.parquet"
    )
    assert texts(tmp_path, "a.parquet") == ["a", "text is not UTF-8", "c"]


def test_only_needed_columns_are_read(tmp_path):
    table = pyarrow.table({"text": ["a"] * 1000, "blob": [os.urandom(5000) for _ in range(1000)]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    # Garbage in the pages of the other column is never seen.
    data = bytearray(path.read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1).data_page_offset
    data[start : start + 100_000] = bytes(100_000)
    path.write_bytes(data)
    assert texts(tmp_path, "a.parquet") == ["a"] * 1000


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.JSON.GZ", ".json"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("a.TSV.zstd", ".tsv"),
    ],
)
def test_forms_are_told_by_suffix(name, form):
    assert form_of(name) == form
