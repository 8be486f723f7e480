"""Memory that is used again for block after block of rows."""

import math
from typing import Any

from turnout.hme.space import CACHE_LINE, NUMPY, NumpySpace
from turnout.hme.tree import Floats


class Workspace:
    """Memory in which block after block of rows is worked on, so that its pages and cache lines stay warm.

    Arrays of one block never overlap; `clear` takes them all back, so no result may stand in one.
    """

    def __init__(self, space: NumpySpace = NUMPY) -> None:
        self.space, self._used = space, 0
        self._whole: Any = space.room(0)

    def clear(self) -> None:
        """Begins anew, with as much memory as was asked for since the last time."""
        if self._used > len(self._whole):
            self._whole = self.space.room(self._used)
        self._used = 0

    def room(self, *shape: int) -> Floats:
        """As `space.room` gives; from other memory what does not fit here yet."""
        start, size = self._used, math.prod(shape)
        self._used += -(-size // CACHE_LINE) * CACHE_LINE
        fits = self._used <= len(self._whole)
        return self._whole[start : start + size].reshape(shape) if fits else self.space.room(*shape)
