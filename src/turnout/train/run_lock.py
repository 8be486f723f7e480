"""One writer a run: a lock on RUN/lock, which the kernel takes back however its holder ends."""

import os
from pathlib import Path

from turnout.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = "lock"


class RunLock:
    """Held from construction to `release`, or to the end of the process."""

    def __init__(self, run: Path) -> None:
        """Raises: ConfigError if another holds it."""
        run.mkdir(parents=True, exist_ok=True)
        self._file = (run / LOCK_NAME).open("a+b", buffering=0)
        if not self._acquired():
            holder = self._holder()
            self._file.close()
            raise ConfigError(
                f"{run} is being written by another process{holder and f', {holder}'}; wait for its end, stop it, or "
                "choose another --out"
            )
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())

    def release(self) -> None:
        """Let others write; releasing twice does nothing."""
        self._file.close()

    def _acquired(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # a file system that knows no locks is no reason not to train
            return not isinstance(error, BlockingIOError)
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        return self._file.read().decode(errors="replace")
