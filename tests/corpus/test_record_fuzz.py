"""Thousands of mutated records of every form: no crash, no hang, counts add up."""

import base64
import csv
import gzip
import io
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_anyexperts.corpus.scan import scan_chunk
from megatron_anyexperts.corpus.unforeseen import UNFORESEEN
from tests.corpus.raw import corpus_of, data_url, png, write

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
PARTS = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}, {"type": "image"}]
ASKED = {"role": "user", "content": "Hi"}
SAID = {"role": "assistant", "content": "Ho", "weight": 1}

CHATS = [
    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}], "image": "0.png"},
    {"messages": [ASKED | {"content": PARTS}, SAID], "images": ["1.png", data_url(png(2))]},
    {"messages": [ASKED, SAID | {"content": None, "tool_calls": [CALL]}, SAID], "tools": [CALL], "system": "Be brief."},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": [ASKED], "completion": [SAID]},
    {"prompt": "Hi", "completion": "Ho", "language": "en"},
]
DOCUMENTS = [
    {"segments": [{"type": "text", "text": "Before"}, {"type": "image", "media": "0.png"}]},
    {"texts": ["Before", None], "images": [None, "1.png"]},
    {"text_list": ["Before"], "image_info": [{"image_name": "0.png", "matched_text_index": 0}]},
]
TABLE = [
    {"image": "0.png", "caption": "A caption.", "language": "en"},
    {"image": {"bytes": None, "path": "1.png"}, "caption": "B"},
    {"image": {"data": base64.b64encode(png(3)).decode()}, "caption": "C"},
]
FORMS = {
    "chat": (CHATS, {}),
    "interleaved": (DOCUMENTS, {}),
    "media_table": (TABLE, {"media_field": "image", "text_field": "caption"}),
    "text_table": ([{"text": "One."}, {"text": 'Two, "quoted"\t\n lines', "language": "en"}], {}),
}
ODD = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    float("nan"),
    "",
    "\ud800",
    "x" * 500,
    "<image>",
    "../0.png",
    [],
    {},
    [[]],
    [None],
]
KEYS = ["role", "from", "content", "value", "weight", "train", "type", "text", "image", "images", "media", "tool_calls"]


def mutated(value, chance, draw: random.Random):
    """A record with values replaced, dropped, repeated or moved to other keys."""
    if draw.random() < chance:
        return draw.choice(ODD)
    if isinstance(value, dict):
        content = {
            draw.choice(KEYS) if draw.random() < chance else key: mutated(inner, chance, draw)
            for key, inner in value.items()
            if draw.random() > chance / 2
        }
        return content | ({draw.choice(KEYS): draw.choice(ODD)} if draw.random() < chance else {})
    if isinstance(value, list):
        kept = [mutated(inner, chance, draw) for inner in value if draw.random() > chance / 2]
        return kept * 2 if draw.random() < chance / 4 else kept
    if isinstance(value, str) and draw.random() < chance:
        place = draw.randrange(len(value) + 1)
        return value[:place] + draw.choice(['"', "\n", "<video>", "\x00", "\t", "é"]) + value[place:]
    return value


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes with some changed, cut out or doubled."""
    for _ in range(draw.randrange(4)):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice([1, 1, 5, 40]))
        new = draw.choice([b"", draw.randbytes(stop - start), data[start:stop] * 2, b'"', b"}", b"[", b"\xff", b"\r"])
        data = data[:start] + new + data[stop:]
    return data


def written(form: str, records: list, draw: random.Random) -> bytes:
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if form in ("json", "json.gz"):
        array = json.dumps(records, indent=draw.choice([None, 1])).encode()
        return gzip.compress(array) if form == "json.gz" else array
    if form in ("csv", "tsv"):
        buffer = io.StringIO()
        names = sorted({str(key) for record in records if isinstance(record, dict) for key in record}) or ["a"]
        writer = csv.DictWriter(buffer, names, delimiter="\t" if form == "tsv" else ",", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(record for record in records if isinstance(record, dict))
        return buffer.getvalue().encode("utf-8", "surrogatepass")
    if form == "parquet":
        buffer = io.BytesIO()
        try:
            table = pyarrow.Table.from_pylist([record for record in records if isinstance(record, dict)])
            pyarrow.parquet.write_table(table, buffer)
        except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
            # Records that do not fit together: as text in a column.
            pyarrow.parquet.write_table(pyarrow.table({"text": [repr(record) for record in records]}), buffer)
        return buffer.getvalue()
    return {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstandard.compress(lines)}[form]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", FORMS)
def test_mutated_records_are_read_or_rejected_and_counted(tmp_path, kind):
    records, options = FORMS[kind]
    for number in range(2):
        write(tmp_path / f"{number}.png", png(number))
    good = tried = 0
    for seed in range(500):
        draw = random.Random(f"{kind} {seed}")
        chance = draw.choice([0, 0.03, 0.1])
        batch = [mutated(draw.choice(records), chance, draw) for _ in range(8)]
        form = draw.choice(["jsonl", "json", "json.gz", "jsonl.gz", "jsonl.zst", "parquet", "csv", "tsv"])
        data = written(form, batch, draw)
        whole = draw.random() < 0.5
        write(tmp_path / f"a.{form}", data if whole else damaged(data, draw))
        source = {"type": kind, "path": f"a.{form}"} | options
        corpus = corpus_of(tmp_path, source, chunk_bytes=draw.choice([7, 200, 10**6]))
        found = 0
        for chunk in corpus.sources[0].chunks(0, 8, corpus.chunk_bytes):
            scan = scan_chunk(corpus, {"source": 0, **chunk})
            assert not [line for line in scan.rejected if line["reason"] == UNFORESEEN], scan.rejected
            positions = scan.accepted["position"].tolist()
            again = dict(corpus.sources[0].read(chunk, frozenset(positions), 10**9))
            # Damage of the file itself, at -1, is met again.
            assert again.keys() - {-1} == set(positions) and len(positions) == len(scan.facts)
            found += scan.items
            good += len(positions)
        if whole and form in ("jsonl", "json", "json.gz", "jsonl.gz", "jsonl.zst"):
            assert found == len(batch), (form, seed)
        tried += len(batch)
    assert tried == 4000 and good > 500
