"""Functions that a decoder process is made to call."""

import os

from megatron_anyexperts.data.media_forms import MediaError


def refuse(reason: str, detail: str) -> None:
    raise MediaError(reason, detail)


def divide(a: int, b: int) -> float:
    return a / b


def die(number: int) -> None:
    os.kill(os.getpid(), number)
