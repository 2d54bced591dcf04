"""What the exit code of a training rank says; the launcher judges an attempt by it."""

import enum


class ExitCode(enum.IntEnum):
    """Codes of our own; Megatron adds 16 and 17 (its rerun state machine), signals 128 and above."""

    DONE = 0
    """Trained to the end and saved, or asked to stop and saved."""

    FAILED = 1
    """A failure that is explained in the last lines, or an uncaught exception."""

    USAGE = 2
    """The command cannot be carried out, now or by trying again; nothing was written."""

    NOT_SAVED = 3
    """The last steps are in no checkpoint, because saving failed. Starting again goes on from the newest one."""
