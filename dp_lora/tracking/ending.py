"""How an exception, or the exit of a process, ends a run: its state, and the recorded error."""

import signal

from dp_lora.errors import InputError
from dp_lora.tracking.process import Paused
from dp_lora.tracking.store import ERROR_LENGTH, first_line

STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL}


def end_status(error: BaseException) -> str:
    """The state in which an exception leaves a run: FINISHED, FAILED, KILLED, or SCHEDULED where it goes on later."""
    cause: BaseException | None = error
    while cause is not None:
        # some libraries turn Ctrl-C into SystemExit
        if isinstance(cause, KeyboardInterrupt):
            return "SCHEDULED" if isinstance(cause, Paused) else "KILLED"
        cause = cause.__cause__ or cause.__context__
    return "FINISHED" if isinstance(error, SystemExit) and not error.code else "FAILED"


def recorded_error(error: BaseException, reads_private: bool) -> str:
    """The tag `error` of a run that an exception stopped; it names nothing private.

    An InputError gives its public text, an OSError its type and the system's words. Any other exception of a stage that
    reads private pictures may quote a file or its name: it gives its type alone.
    """
    if isinstance(error, InputError):
        return first_line(error.public)[:ERROR_LENGTH]
    kind = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{kind}: {error.strerror}"
    if reads_private and not isinstance(error, KeyboardInterrupt):
        return kind
    return f"{kind}: {first_line(error)}"[:ERROR_LENGTH]


def ended_by(code: int) -> tuple[str, str]:
    """The state of a run and the reason, by the exit status of its command."""
    if code == 0:
        return "FINISHED", ""
    # a shell reports a signal as 128 + its number, Python as minus its number
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        return "KILLED" if number in STOPPING else "FAILED", f"ended by {signal.Signals(number).name}"
    return "FAILED", f"exit status {code}"
