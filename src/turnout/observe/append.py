"""A file that only grows, by whole records."""

import os
import warnings
from pathlib import Path


class AppendFile:
    """Buffered appends. A write that fails (full disk) loses records and says so; it never stops the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._pending = bytearray()
        self._warned = False

    def append(self, record: bytes) -> None:
        """Keep one record for the next flush."""
        self._pending += record

    def flush(self) -> None:
        """Hand the kept records to the operating system."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file.fileno(), self._pending)
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # no half record stays behind
            self._warn(error)
        self._pending.clear()

    def close(self) -> None:
        """Flush and close; closing twice does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            warnings.warn(f"cannot write {self.path}: {error}; records are lost until this is repaired", stacklevel=4)
        self._warned = True


def _write_all(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(bytes(data))
    while view:
        view = view[os.write(descriptor, view) :]
