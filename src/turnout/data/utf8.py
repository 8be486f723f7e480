"""Bytes of a corpus -> text, or an error that says where they are not UTF-8 and how to go on."""

from typing import Literal

from turnout.errors import DataError

InvalidUtf8 = Literal["error", "skip", "replace"]


def decode_utf8(raw: bytes, where: str, invalid: InvalidUtf8 = "error") -> str:
    """The text of `raw`, without a byte order mark; "" for a document that `invalid="skip"` leaves out.

    Raises: DataError naming `where` and the byte offset, if `invalid` is "error" and the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if invalid == "error":
            raise DataError(
                f"{where}: byte {raw[error.start]:#04x} at offset {error.start} is not UTF-8; "
                'set data.invalid_utf8 to "replace" (puts U+FFFD there) or "skip" (leaves the document out)'
            ) from error
    return "" if invalid == "skip" else raw.decode("utf-8", "replace").removeprefix("\ufeff")


def require_encodable(text: str, where: str, invalid: InvalidUtf8 = "error") -> str:
    """`text`, which must have a UTF-8 form: JSON escapes can smuggle in half of a surrogate pair.

    Raises: DataError naming `where` and the character, if `invalid` is "error" and there is a lone surrogate.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        if invalid == "error":
            raise DataError(
                f"{where}: lone surrogate {text[error.start]!a} at character {error.start} is not Unicode text; "
                'set data.invalid_utf8 to "replace" or "skip"'
            ) from error
    return "" if invalid == "skip" else text.encode("utf-8", "replace").decode("utf-8")
