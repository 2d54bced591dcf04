"""What a person sees of a process: this project's own lines, and warnings and errors of anybody.

Megatron prints a thousand lines around them. All of them go to the log of the rank; the screen gets them with
``--verbose`` only. `say` prints to the screen in either case.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO

FALSE_ALARMS = (
    ("No CUDA runtime is found", "said at every import without a GPU; doctor says what is missing"),
    ("one_logger package is required", "a package that only NVIDIA has"),
    ("Please specify --split", "shards are split when they are built"),
    ("It is recommended to use a ModelConfig", "Megatron's classes know no encoders; see docs/model.md"),
    ("full scope is deprecated", "a default of Megatron's own, which draws no graph"),
    ("MimoModelConfig is experimental", "a class that is imported and not used"),
    ("'pin_memory' argument is set as true but no accelerator", "Energon sets it always; nothing is pinned on a CPU"),
    ("attribute of a Tensor that is not a leaf Tensor", "Megatron looks for it on purpose"),
    ("Overwriting old incomplete / corrupted checkpoint", "the data state is written first, into the same folder"),
    ("async save is deprecated", "a synchronous save goes through the same code"),
    ("could not find the metadata file", "no checkpoint yet, which the first lines say"),
    ("will not load any checkpoints and will start from random", "likewise"),
    ("This DataLoader will create", "--data-streams decides on the number of workers, not the number of cores"),
    ("torch.distributed is disabled, unavailable or uninitialized", "a part of a checkpoint that a rank reads alone"),
    ("The argument order of load has been changed", "Megatron names them"),
    ("RerunStateMachine initialized in mode", "a mode, not a finding"),
    ("Setting RerunStateMachine mode", "likewise, at every evaluation"),
    ("Result validation enabled", "likewise"),
)
"""Text of lines that look like a warning and are none here, and why; the log has them."""

_FUTURE = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
"""Warnings to those who write libraries; versions are pinned."""

_ALARM = re.compile(r"\W*(WARNING|ERROR|CRITICAL|FATAL|error|warning)\b")
_NEVER_HIDDEN = re.compile(r"number of (skipped|nan) iterations: +[1-9]|tokens that are NaN or Inf")
_BAR = "Filling reading buffer"


class Losses(Protocol):
    """Counts what a full disk loses; see `survival.lost_writes.LostWrites`."""

    def lost(self, error: BaseException) -> None: ...

    def wrote(self) -> None: ...


class Log:
    """Takes every line of a process: kept in memory until it has a file, which a refused command never gets."""

    def __init__(self) -> None:
        self._pending: list[str] = []
        self._descriptor: int | None = None
        self._losses: Losses | None = None

    def begin(self, path: Path, losses: Losses) -> None:
        """Append to `path` from now on, beginning with what was kept."""
        self._losses = losses
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            losses.lost(error)
        pending, self._pending = self._pending, []
        self.add("".join(pending))

    def add(self, text: str) -> None:
        """Append text, with one system call, so that lines of worker processes stay whole."""
        if self._losses is None:
            self._pending.append(text)
        elif self._descriptor is not None:
            try:
                os.write(self._descriptor, text.encode(errors="replace"))
            except OSError as error:
                self._losses.lost(error)
            else:
                self._losses.wrote()


class Filtered:
    """A text stream whose whole lines go to the log, and to the screen where `shown` says so.

    Args:
        screen: the stream in whose place it is put.
        log: shared by the streams of a process.
        shown: whether the screen gets a line.
    """

    def __init__(self, screen: TextIO, log: Log, shown: Callable[[str], bool]):
        self.screen, self.log, self.shown = screen, log, shown
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._pass(line + "\n")
        return len(text)

    def _pass(self, line: str) -> None:
        self.log.add(line)
        if self.shown(line):
            self.screen.write(line)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.screen.flush()

    def finish(self) -> None:
        """Pass what ends without an end of line."""
        if self._line:
            line, self._line = self._line, ""
            self._pass(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)


def is_false_alarm(text: str) -> bool:
    """Whether a line, or the text of a warning, is known to mean nothing here."""
    return any(known in text for known, _ in FALSE_ALARMS)


def shown_of_output(line: str) -> bool:
    """Which lines of standard output are warnings, errors, or steps that went wrong."""
    return bool(_NEVER_HIDDEN.search(line) or _ALARM.match(line) and not is_false_alarm(line))


def shown_of_errors(line: str) -> bool:
    """Which lines of standard error are no false alarm."""
    return not is_false_alarm(line) and _BAR not in line


def say(text: str) -> None:
    """Print a line to the screen, and to the log where there is one."""
    stream = sys.stdout
    if isinstance(stream, Filtered):
        stream.log.add(text + "\n")
        stream = stream.screen
    if stream.isatty():
        text = f"\r\x1b[K{text}"  # over a progress bar, which is drawn again
    print(text, file=stream, flush=True)


class Parser(argparse.ArgumentParser):
    """A parser whose help is one of the command's own lines."""

    def print_help(self, file: Any = None) -> None:
        """See `argparse.ArgumentParser.print_help`."""
        if file is None:
            say(self.format_help().rstrip("\n"))
        else:
            super().print_help(file)


class Console:
    """Puts `Filtered` streams in the place of standard output and error while a command runs."""

    def __init__(self) -> None:
        self.log = Log()

    def __enter__(self) -> Console:
        self._before = sys.stdout, sys.stderr, warnings.showwarning
        self._output = sys.stdout = Filtered(sys.stdout, self.log, shown_of_output)
        self._errors = sys.stderr = Filtered(sys.stderr, self.log, shown_of_errors)
        warnings.showwarning = self._warn
        self._take_handlers()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._output.finish()
        self._errors.finish()
        sys.stdout, sys.stderr, warnings.showwarning = self._before
        if error is not None and not isinstance(error, SystemExit):
            self.log.add("".join(traceback.format_exception(error)))

    def show_all(self) -> None:
        """Let the screen have everything, and what was kept from it so far."""
        self._output.screen.write("".join(self.log._pending))
        self._output.shown = self._errors.shown = lambda _line: True

    def _take_handlers(self) -> None:
        """Handlers that were made before hold the streams that are replaced."""
        for name in (None, "torch"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.FileHandler or not isinstance(handler, logging.StreamHandler):
                    continue
                stream = {1: self._output, 2: self._errors}.get(_descriptor(handler.stream))
                if stream is not None:
                    handler.setStream(stream)

    def _warn(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno)
        if is_false_alarm(text) or issubclass(category, _FUTURE):
            self.log.add(text)
            if self._errors.shown(""):
                return
        sys.stderr.write(text)


def _descriptor(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (OSError, AttributeError, ValueError):
        return None


def quiet_imports() -> None:
    """Call it before Megatron and torch are imported: what they lack, which doctor says, they say at every import."""
    warnings.filterwarnings("ignore", message=".*(Apex|[Tt]ransformer.[Ee]ngine|Could not determine rank).*")
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: not is_false_alarm(record.getMessage()))


_CONSOLES: list[Console] = []


def own_lines_only(main: Callable[..., int]) -> Callable[..., int]:
    """Let the entry point of a command show what `say` prints, warnings and errors."""

    @functools.wraps(main)
    def wrapper(*arguments: Any, **keywords: Any) -> int:
        with Console() as console:
            _CONSOLES.append(console)
            try:
                return main(*arguments, **keywords)
            finally:
                _CONSOLES.pop()

    return wrapper


def begin(verbose: bool, log: Path | None = None, losses: Losses | None = None) -> None:
    """Tell the console of this command, if it has one, what the command line says.

    Args:
        verbose: show everything.
        log: where every line goes; None: nowhere.
        losses: counts what cannot be written there.
    """
    for console in _CONSOLES[-1:]:
        if verbose:
            console.show_all()
        if log is not None:
            console.log.begin(log, losses)
