"""The command line. Each command is a function of its own module, imported when it is called.

Exit codes: 0; 2 for whatever the user can mend, said in one line on stderr; 130 for a run that was stopped.
``REFIMPL_DEBUG=1`` shows the traceback as well.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module

from refimpl.cli.arguments import make_parser
from refimpl.extras import MissingExtraError

FAILED = 2
STOPPED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; by default those of the process.
    """
    try:
        arguments = make_parser().parse_args(argv)
        _show_warnings()
        _note_interrupts()
        command = getattr(import_module(f"refimpl.cli.{arguments.module}"), arguments.function)
        return int(command(arguments))
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say_error("interrupted")
        return STOPPED
    except Exception as error:
        if not _mendable(error) or os.environ.get("REFIMPL_DEBUG"):
            traceback.print_exc()
            if not _mendable(error):
                return 1
        say_error(f"error: {_sentence(error)}")
        return FAILED


_interrupted = False


def _note_interrupts() -> None:
    """Remember Ctrl-C: raised inside a callback of a library that is being imported, it would be lost."""
    global _interrupted
    _interrupted = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed since the command began."""
    if _interrupted:
        raise KeyboardInterrupt


def say_error(text: str) -> None:
    """Write one line to stderr."""
    print(f"refimpl: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _mendable(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError | MemoryError | MissingExtraError):
        return True
    # Only who has imported the trainer can have met its error; importing it here would slow every command.
    trainer = sys.modules.get("refimpl.training.trainer")
    return trainer is not None and isinstance(error, trainer.NonFiniteLossError)


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory ({error}); choose a smaller model, batch or bptt, or a higher sparsity"
    return str(error) or type(error).__name__


class _ToStderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at that moment, below a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if getattr(record, "notice", False) else f"{record.levelname.lower()}: "
        say_error(f"{level}{record.getMessage()}")


def _show_warnings() -> None:
    """Show warnings, and what is said before kernels are compiled, for nothing else happens meanwhile."""
    log = logging.getLogger("refimpl")
    if not any(isinstance(handler, _ToStderr) for handler in log.handlers):
        log.addHandler(_ToStderr())
        logging.getLogger("refimpl.kernels").setLevel(logging.INFO)
