"""What a run did: the recorder that writes it down, and the report that shows it."""

from turnout.observe.recorder import Recorder
from turnout.observe.report import write_report
from turnout.observe.token_view import token_choices
from turnout.observe.trace import Trace, read_trace

__all__ = ["Recorder", "Trace", "read_trace", "token_choices", "write_report"]
