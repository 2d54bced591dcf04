import io
import tarfile
import time

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import ShardInfo

from megatron_anyexperts.data.shard_reader import DAMAGE, ShardReader, parse_members

NAME = st.text("abcdefgh0123", min_size=1, max_size=40)


def tar_bytes(members: list[tuple[str, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@given(
    st.lists(st.tuples(NAME, st.binary(max_size=1200)), max_size=5),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(["", "folder/", "a" * 120 + "/", "ü/"]),
)
def test_members_are_those_that_tarfile_sees(members, form, folder):
    members = [(f"{folder}{name}.bin", content) for name, content in members]
    assert parse_members(tar_bytes(members, form)) == members


@given(st.binary(min_size=512, max_size=2000))
def test_garbage_is_an_error_not_a_sample(garbage):
    if not any(garbage[:512]):
        return
    with pytest.raises((ValueError, tarfile.TarError)):
        assert parse_members(b"\1" + garbage[1:]) == []
        raise ValueError("nothing was read")


@pytest.fixture
def shards(tmp_path):
    """Two shards of 5 samples with an index."""
    names = ["shard-0.tar", "shard-1.tar"]
    for number, name in enumerate(names):
        with webdataset.TarWriter(str(tmp_path / name)) as tar:
            for index in range(5):
                tar.write({"__key__": f"s{number}{index}", "json": {"n": index}, "0.txt": "x" * 900})
    BaseWebdatasetFactory.prepare_dataset(tmp_path, names, split_parts_ratio=[("train", 1)], workers=1)
    return tmp_path


def reader(folder, **options) -> ShardReader:
    infos = [ShardInfo(name=f"shard-{n}.tar", path=EPath(folder / f"shard-{n}.tar"), count=5) for n in range(2)]
    return ShardReader(ShardInfosITarReader(EPath(folder), infos), **({"retries": 2, "backoff": 0.001} | options))


def test_samples_equal_those_of_energons_reader(shards):
    ours = reader(shards)
    for index in [7, 0, 9, 4, 5]:
        theirs = ours._inner[index]
        assert ours[index] == dict(theirs)


def test_a_truncated_shard_loses_only_its_end(shards):
    tar = shards / "shard-1.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    samples = [reader(shards)[index] for index in range(10)]
    lost = [index for index, sample in enumerate(samples) if DAMAGE in sample]
    assert lost and set(lost) < {5, 6, 7, 8, 9} and 5 not in lost
    assert samples[lost[0]]["__key__"] == f"shard-1.tar#{lost[0] - 5}"
    assert "shard-1.tar is unreadable" in samples[lost[0]][DAMAGE]


def test_a_garbage_header_loses_one_sample(shards):
    tar = shards / "shard-0.tar"
    content = bytearray(tar.read_bytes())
    offset = int.from_bytes((shards / "shard-0.tar.idx").read_bytes()[16:24], "little")
    content[offset : offset + 100] = b"\xff" * 100
    tar.write_bytes(content)
    assert [index for index in range(10) if DAMAGE in reader(shards)[index]] == [2]


def test_a_missing_shard_is_waited_for_once_and_found_when_it_returns(shards):
    hidden = (shards / "shard-0.tar").rename(shards / "away")
    shard_reader = reader(shards, retries=3, backoff=0.05)
    start = time.monotonic()
    assert "FileNotFoundError" in shard_reader[0][DAMAGE]
    waited = time.monotonic() - start
    assert waited > 0.05 + 0.1 + 0.2
    start = time.monotonic()
    assert DAMAGE in shard_reader[1]
    assert time.monotonic() - start < 0.05
    hidden.rename(shards / "shard-0.tar")
    assert DAMAGE not in shard_reader[2]


def test_an_index_of_another_shard_never_mixes_samples(shards):
    with webdataset.TarWriter(str(shards / "shard-0.tar")) as tar:
        for index in range(5):
            tar.write({"__key__": f"t{index}", "txt": "y"})
    samples = [reader(shards)[index] for index in range(5)]
    assert sum(DAMAGE in sample for sample in samples) >= 4
    assert all(DAMAGE in sample or sample["txt"] == b"y" for sample in samples)
