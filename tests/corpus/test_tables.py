"""CSV and TSV: no row swallows another, no bad row costs a good one."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.corpus.sample import Rejected
from megatron_anyexperts.corpus.sources.tables import table_rows
from tests.corpus.raw import corpus_of, items, write


def read(content: str | bytes, separator="\t", quotes="auto", max_bytes=10**8):
    data = content if isinstance(content, bytes) else content.encode()
    rows = table_rows(io.BytesIO(data), separator, quotes, max_bytes)
    return [row.reason if isinstance(row, Rejected) else row for row in rows]


COMMON_VOICE = (
    'path\tsentence\na.mp3\t"Open quote only, he said\nb.mp3\tsecond sentence\nc.mp3\tthird "quoted" one\n'
    'd.mp3\tends with a quote"\ne.mp3\tfifth\nf.mp3\t"All of it quoted."\n'
)


def test_quotes_of_a_tsv_are_text():
    sentences = [row["sentence"] for row in read(COMMON_VOICE)]
    assert sentences == [line.split("\t")[1] for line in COMMON_VOICE.splitlines()[1:]]


TEXT = st.text(st.sampled_from('ab "\t\n,'), max_size=12)


@given(rows=st.lists(st.tuples(TEXT, TEXT, TEXT).filter(any), min_size=1), separator=st.sampled_from("\t,"))
def test_what_the_csv_module_writes_with_a_quoted_header_is_read_back(rows, separator):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("x", "y", "z"), *rows])
    quotes = "auto" if separator == "\t" else "csv"
    assert read(buffer.getvalue(), separator, quotes) == [dict(zip("xyz", row, strict=True)) for row in rows]


@given(rows=st.lists(st.tuples(*[st.text(st.sampled_from('ab "'), max_size=9).filter(lambda t: '""' not in t)] * 2)))
def test_every_line_of_an_unquoted_tsv_is_a_row(rows):
    rows = [("k" + key, text) for key, text in rows]
    assert [tuple(row.values()) for row in read("key\ttext\n" + "".join(f"{k}\t{t}\n" for k, t in rows))] == rows


def test_fields_that_can_only_have_been_quoted_are_unquoted():
    content = 'n\ttext\n1\t"say ""b"""\n2\t"two\nlines"\n3\t"a\tb"\n4\tplain\n'
    assert [row["text"] for row in read(content)] == ['say "b"', "two\nlines", "a\tb", "plain"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a,b\n1,2\n\xff,3\n4,5\n", [{"a": "1", "b": "2"}, "text is not UTF-8", {"a": "4", "b": "5"}]),
        (b"a,b\n1,2\n1,2,3\n4,5\n", [{"a": "1", "b": "2"}, "row does not fit the header", {"a": "4", "b": "5"}]),
        (b'a,b\n1,"2\n3,"4" 5"\n4,5\n', ["damaged row", "damaged row", {"a": "4", "b": "5"}]),
        (b'a,b\n1,"never closed\n4,5\n', ["damaged row", {"a": "4", "b": "5"}]),
        (b"a,a\n1,2\n", ["damaged table"]),
    ],
)
def test_a_bad_row_costs_itself(content, expected):
    assert read(content, ",", "csv") == expected


def test_a_field_may_be_as_long_as_the_limit_and_a_longer_one_costs_its_row():
    content = f"a,b\n1,{'x' * 200_000}\n2,{'y' * 400_000}\n3,z\n"
    assert [row if isinstance(row, str) else row["a"] for row in read(content, ",", "csv", 300_000)] == [
        "1",
        "too many bytes",
        "3",
    ]


def test_quotes_that_never_close_end_in_time():
    """Every line opens a quote that swallows all that follow: reading again from each would take for ever."""
    content = "a,b\n" + 'y","""\n' * 200_000
    assert "damaged table" in [item.reason for item in read_all(content) if isinstance(item, Rejected)]


def read_all(content: str):
    try:
        yield from table_rows(io.BytesIO(content.encode()), ",", "csv", 10**8)
    except Rejected as rejected:
        yield rejected


def test_the_option_settles_what_quotes_mean(tmp_path):
    write(tmp_path / "a.tsv", 'text\n"quoted"\n')
    for quotes, text in {"auto": '"quoted"', "text": '"quoted"', "csv": "quoted"}.items():
        [item] = items(corpus_of(tmp_path, {"type": "text_table", "path": "a.tsv", "quotes": quotes}))
        assert item.fields["text"] == text
