"""A taste of a large text, spread over all of it."""

from collections.abc import Iterable

_CHUNK_CHARS = 4096


def spread_excerpt(texts: Iterable[str], max_chars: int) -> list[str]:
    """Evenly spaced chunks of the texts, in order: everything if it fits, else about half of `max_chars` or more.

    One pass, at most `max_chars` in memory, and no chance: the same texts give the same excerpt.
    """
    kept: list[str] = []
    stride, chars = 1, 0
    for number, chunk in enumerate(_chunks(texts)):
        if number % stride:
            continue
        kept.append(chunk)
        chars += len(chunk)
        while chars > max_chars and len(kept) > 1:
            # kept[i] is chunk i * stride, so every second one is what twice the stride would have kept
            kept, stride = kept[::2], stride * 2
            chars = sum(map(len, kept))
    return kept


def _chunks(texts: Iterable[str]) -> Iterable[str]:
    return (text[at : at + _CHUNK_CHARS] for text in texts for at in range(0, len(text), _CHUNK_CHARS))
