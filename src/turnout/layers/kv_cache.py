"""What attention remembers of the tokens seen so far."""

from torch import Tensor

from turnout.errors import RequestError


class KVCache:
    """Buffers of the tokens seen so far, a tuple of them a layer: keys and values, or whatever the layer stores."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._layers: list[tuple[Tensor, ...] | None] = [None] * num_layers

    def append(self, layer: int, *new_BHSX: Tensor) -> tuple[Tensor, ...]:
        """Store what the layer computed for new tokens; all of it so far comes back.

        `length` counts tokens that every layer has stored: the model moves it on at the end of a pass.
        Shapes: each (B, H, S, X), with heads and width of its own; returns (B, H, length + S, X) each.
        Raises: RequestError past max_length.
        """
        end = self.length + new_BHSX[0].shape[2]
        if end > self.max_length:
            raise RequestError(f"{end} tokens do not fit the key-value cache of max_length={self.max_length}")
        buffers = self._layers[layer]
        if buffers is None:
            buffers = tuple(x.new_empty(*x.shape[:2], self.max_length, x.shape[3]) for x in new_BHSX)
            self._layers[layer] = buffers
        for buffer, new in zip(buffers, new_BHSX, strict=True):
            buffer[:, :, self.length : end] = new
        return tuple(buffer[:, :, :end] for buffer in buffers)
