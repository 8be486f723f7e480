"""Asking a run to stop or to save, by signal: a flag that the loop reads between steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is gone; not on Windows
_STOP = (signal.SIGTERM, signal.SIGINT, *((_HANGUP,) if _HANGUP is not None else ()))
_SAVE = getattr(signal, "SIGUSR1", None)  # not on Windows


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGHUP ask the run to save and end, and SIGUSR1 to save and go on.

    The handlers only set flags: the loop reads `requested` at each step boundary, inside evaluation and while it
    waits for data (with a timeout: Python resumes an interrupted wait). A second SIGINT raises KeyboardInterrupt
    at once. The handlers found on entry are put back on exit. Signals belong to the main thread: entered in
    another one, it installs nothing, `is_active` is false and the flags stay down.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._interrupted = False
        self._save = False
        self._previous: dict[int, Any] = {}

    @property
    def is_active(self) -> bool:
        """Whether the handlers are installed."""
        return bool(self._previous)

    @property
    def requested(self) -> bool:
        """Whether the run should save and end."""
        return self._received is not None

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that asked for the end; by convention a process then exits with 128 + its number."""
        return self._received

    def save_requested(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # who ignores SIGHUP was started by nohup, to outlive its terminal
            for number in _STOP:
                if number != _HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_stop)
            if _SAVE is not None:
                self._previous[_SAVE] = signal.signal(_SAVE, self._on_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True
