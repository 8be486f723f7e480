"""The planner: what a model with experts does to network, memory, time and bill. Never imports torch."""

from turnout.plan.query import Query

# not lazily: whoever imports the module `turnout.plan.search` first would leave the module under the function's name
from turnout.plan.search import search

__all__ = ["Query", "search"]
