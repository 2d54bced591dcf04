import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_anyexperts.survival.manifest import MANIFEST, UNFINISHED, seal, verify
from megatron_anyexperts.survival.signing import KEY, KEY_FILE, UnusableKey, is_signed, signature, signing_key

SECRET = "0123456789abcdef-secret"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    return SECRET


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "iter_0000004"
    (folder / "sub").mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"names")
    (folder / "sub/weights").write_bytes(b"weights")
    return folder


def change(checkpoint, **entries) -> None:
    path = checkpoint / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_signed_checkpoint_verifies_with_its_key_and_without(checkpoint, key, monkeypatch):
    seal(checkpoint)
    assert verify(checkpoint) == []
    assert SECRET not in (checkpoint / MANIFEST).read_text()
    monkeypatch.delenv(KEY)
    assert verify(checkpoint) == []


def test_an_unsigned_one_is_refused_once_there_is_a_key(checkpoint, monkeypatch):
    seal(checkpoint)
    monkeypatch.setenv(KEY, SECRET)
    [problem] = verify(checkpoint)
    assert "not signed, and a key is set" in problem and "survival seal" in problem
    seal(checkpoint)
    assert verify(checkpoint) == []


def test_another_key_is_no_key(checkpoint, key, monkeypatch):
    seal(checkpoint)
    monkeypatch.setenv(KEY, "another-key-of-16-bytes")
    assert "signed with another key, or changed since" in verify(checkpoint)[0]


def test_who_changes_a_file_cannot_change_its_manifest(checkpoint, key, monkeypatch):
    seal(checkpoint)
    signed = json.loads((checkpoint / MANIFEST).read_text())["signature"]
    (checkpoint / "sub/weights").write_bytes(b"changed")
    assert verify(checkpoint) == ["sub/weights has other content than when it was saved"]
    monkeypatch.delenv(KEY)
    seal(checkpoint)
    monkeypatch.setenv(KEY, key)
    change(checkpoint, signature=signed)
    assert "changed since" in verify(checkpoint)[0]


def test_a_file_beside_the_signed_ones_is_refused(checkpoint, key):
    seal(checkpoint)
    (checkpoint / "common.pt").write_bytes(b"more")
    assert verify(checkpoint) == ["common.pt is not in its signed manifest"]
    (checkpoint / "common.pt").unlink()
    (checkpoint / UNFINISHED).touch()
    assert verify(checkpoint) == []


def test_a_checkpoint_under_another_iteration_is_refused(checkpoint, key):
    seal(checkpoint)
    moved = checkpoint.rename(checkpoint.with_name("iter_0000009"))
    assert "renamed or swapped" in verify(moved)[0]
    change(moved, iteration=9)
    assert "changed since" in verify(moved)[0]


@pytest.mark.parametrize("value", [None, 3, "", "\u00e9", [], "0" * 64])
def test_what_is_no_signature_is_refused_and_not_an_error(checkpoint, key, value):
    seal(checkpoint)
    change(checkpoint, signature=value)
    assert len(verify(checkpoint)) == 1


@given(st.dictionaries(st.text(), st.integers() | st.text()), st.binary(min_size=16), st.binary(min_size=16))
def test_a_signature_is_of_one_content_and_one_key(content, key, other):
    signed = signature(content, key)
    assert is_signed(content, signed, key)
    assert not is_signed(content | {"\x00": 1}, signed, key)
    assert is_signed(content, signed, other) == (key == other)


def test_a_key_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    monkeypatch.setenv(KEY_FILE, str(path))
    assert signing_key() == SECRET.encode()


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("short", 0o600, "a key of 5 bytes"),
        ("  \n", 0o600, "a key of 0 bytes"),
        (SECRET, 0o604, "open to others .mode 604.; chmod 600"),
        (SECRET, 0o620, "open to others"),
    ],
)
def test_an_unusable_key_file_is_refused_without_its_content(tmp_path, monkeypatch, text, mode, message):
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(mode)
    monkeypatch.setenv(KEY_FILE, str(path))
    with pytest.raises(UnusableKey, match=message) as refused:
        signing_key()
    assert SECRET not in str(refused.value)


def test_a_missing_file_or_two_keys_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "none"))
    with pytest.raises(UnusableKey, match="none cannot be read"):
        signing_key()
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(UnusableKey, match="both set"):
        signing_key()


def test_without_a_key_nothing_is_signed(checkpoint):
    assert KEY not in os.environ and signing_key() is None
    seal(checkpoint)
    assert "signature" not in json.loads((checkpoint / MANIFEST).read_text())
