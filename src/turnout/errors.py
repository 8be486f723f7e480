"""Every error a user can cause: what happened, where, the legal values, the way out."""


class TurnoutError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(TurnoutError):
    """A setting is unknown, out of range, or does not fit another setting."""


class ShapeError(TurnoutError):
    """A tensor does not have the shape or dtype its name promises."""


class CapacityError(TurnoutError):
    """A capacity policy cannot be honoured."""


class TransportError(TurnoutError):
    """Ranks disagree, or a collective failed."""


class CheckpointError(TurnoutError):
    """A checkpoint is missing, incomplete, corrupt, or belongs to another model."""


class DataError(TurnoutError):
    """A corpus, tokenizer or token shard is missing, empty or unreadable."""


class NonFiniteError(TurnoutError):
    """A loss, gradient or weight is NaN or infinite; the text names layer and tensor."""


class RequestError(TurnoutError):
    """A generation or serving request asks for something that cannot be done."""
