"""Signs the manifests of checkpoints with a secret key, so that only its holders can make one that is loaded.

The key is a secret of the user, not a setting of a run: it comes from the environment, and neither command lines nor
logs nor checkpoints ever hold it. While there is a key, manifests are signed and unsigned ones refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from pathlib import Path
from typing import Any

KEY = "ANYEXPERTS_CHECKPOINT_KEY"
KEY_FILE = "ANYEXPERTS_CHECKPOINT_KEY_FILE"
_LEAST_BYTES = 16


class UnusableKey(ValueError):
    """There should be a key and is none; the message says what is wrong with it and never what it is."""


def signing_key() -> bytes | None:
    """The key of `ANYEXPERTS_CHECKPOINT_KEY_FILE`, a file, or of `ANYEXPERTS_CHECKPOINT_KEY`; None without both.

    White space around it does not count.

    Raises:
        UnusableKey: both are given, the key is shorter than 16 bytes, or others may read its file.
    """
    text, path = os.environ.get(KEY), os.environ.get(KEY_FILE)
    if text is not None and path is not None:
        raise UnusableKey(f"{KEY} and {KEY_FILE} are both set; unset one")
    if path is not None:
        text = _read(Path(path))
    if text is None:
        return None
    key = text.strip().encode()
    if len(key) < _LEAST_BYTES:
        source = f"{KEY_FILE}={path}" if path else KEY
        raise UnusableKey(f"{source}: a key of {len(key)} bytes; make one such as by `openssl rand -hex 32`")
    return key


def _read(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
            raise UnusableKey(f"{KEY_FILE}={path} is open to others (mode {mode:o}); chmod 600 {path}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableKey(f"{KEY_FILE}={path} cannot be read: {error}") from error


def signature(content: dict[str, Any], key: bytes) -> str:
    """HMAC-SHA256 over a manifest without its signature, in hex.

    Args:
        content: version, iteration and files with sizes and hashes.
        key: from `signing_key`.
    """
    message = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def is_signed(content: dict[str, Any], found: Any, key: bytes) -> bool:
    """Whether `found` is the manifest's signature."""
    return isinstance(found, str) and hmac.compare_digest(signature(content, key).encode(), found.encode())
