"""Where the command `minimoe` begins and ends. Whatever stops it is one line on stderr, from the first import to the last word.

This module imports nothing slow, so that it can answer Ctrl-C while torch and pandas are imported.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

STOPPED, UNREAD = 128 + signal.SIGINT, 141  # exit codes, as a shell reports Ctrl-C and a closed pipe (128 + SIGPIPE)
LONG_NUMBER = re.compile(r"\d{40,}")
OF_TORCH = re.compile(r"\[enforce fail at [^\]]*\]\s*|Exception raised from .*", flags=re.DOTALL)  # places in its C++ files
FORESEEN = (ValueError, TypeError, KeyError, OSError, RuntimeError, MemoryError, ArithmeticError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 2: it cannot be done, and stderr says why in one line. 1: a fault of minimoe's own, in one line, too; `python
    -X dev -m minimoe ...` shows its traceback. 130: Ctrl-C. 141, without a word: the reader of the output has gone, as
    `head` does.
    """
    alone = arguments is None and _ctrl_c_is_ours()  # not called by a test or another program
    try:
        return _code(arguments, alone)
    finally:
        if alone:
            signal.signal(signal.SIGINT, _end_at_once)  # while the interpreter cleans up


def _ctrl_c_is_ours() -> bool:
    """Whether Ctrl-C raises KeyboardInterrupt here; in the background of a script it is ignored."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _end_at_once(_number, _frame) -> None:
    os.write(2, b"\nminimoe: stopped\n")
    os._exit(STOPPED)


def _code(arguments: list[str] | None, alone: bool) -> int:
    """The exit code of the command."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without the letter shows its number
    try:
        run = _imported_run(alone)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                run(arguments)
            finally:
                _flush()  # what was printed before an error stands before it
    except KeyboardInterrupt as stop:
        return _said(str(stop) or "stopped", STOPPED, before="\n")
    except BrokenPipeError:
        _into_nothing(sys.stdout)  # so that no more is said of it
        return UNREAD
    except FORESEEN as error:
        return _said(_words(error), 2)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        advice = "python -X dev -m minimoe shows where"
        return _said(f"a fault of minimoe itself, {type(error).__name__}: {_words(error)} ({advice})", 1)
    return 0


def _imported_run(alone: bool) -> Callable:
    """`__main__.run`; importing it takes seconds."""
    if alone:
        signal.signal(signal.SIGINT, _end_at_once)  # an exception would pass through other people's half-imported modules
    from .__main__ import run

    if alone:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run


def _said(message: str, code: int, before: str = "") -> int:
    """The code, after the message as one line on stderr."""
    with suppress(OSError):  # where nobody reads stderr either
        print(f"{before}minimoe: {message}", file=sys.stderr)
    return code


def _words(error: BaseException) -> str:
    """What an error says, as one line: without the places in torch's files, and without numbers of a whole screen."""
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    said = " ".join(OF_TORCH.sub("", said).split())
    said = LONG_NUMBER.sub(lambda digits: f"{digits[0][:12]}... ({len(digits[0])} digits)", said)
    if isinstance(error, OSError) and error.errno and error.filename is None:  # as on a full disk
        return f"the output or a file cannot be read or written: {said}"
    if isinstance(error, MemoryError):
        return f"not enough memory: {said or 'give smaller sizes or a smaller corpus'}"
    return said or type(error).__name__


def _show_warning(message, *_where) -> None:
    """A warning as one line, without the line of code that gave it."""
    _said(f"warning: {_words(message)}", 0)


def _flush() -> None:
    """Raise OSError if the output cannot be written."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        _into_nothing(sys.stdout)
        raise


def _into_nothing(stream) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
