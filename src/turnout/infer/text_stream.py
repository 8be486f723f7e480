"""Text of tokens as they come: no broken character, and nothing of a stop string, ever leaves."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Takes the bytes of one token at a time and gives back the text that is certain by then.

    Held back: the bytes of an unfinished character, and text that could be the beginning of a stop string.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string has come: whatever follows is dropped
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Text that no later token can take back; often empty. Bytes that are not UTF-8 become U+FFFD."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data)
        # (end, start): the first to be complete counts, so that it does not matter how text was cut into tokens
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string. An unfinished character is left out."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
