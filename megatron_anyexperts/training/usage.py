"""The error of a command line that cannot be carried out."""

import linecache
import re
import traceback


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""


def reason(error: BaseException) -> str:
    """What an error says; of a bare assertion on Megatron's arguments, the condition and the values."""
    if (text := str(error).strip()) or error.__traceback__ is None:
        return text or type(error).__name__
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    condition = linecache.getline(frame.f_code.co_filename, number).strip().removeprefix("assert ")
    args = frame.f_locals.get("args")
    flags = [
        f"--{name.replace('_', '-')} {getattr(args, name, None)}" for name in re.findall(r"\bargs\.(\w+)", condition)
    ]
    return f"Megatron requires {condition}" + (f" (here {', '.join(flags)})" if flags else "")
