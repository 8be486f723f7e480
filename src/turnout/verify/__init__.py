"""The conformance suite: what every Mixture-of-Experts layer should keep, run on ours or on another's."""

from turnout.verify.check import CHECKS, Outcome, Result
from turnout.verify.run import verify
from turnout.verify.subject import Layer, NotApplicable, Sizes, Subject

__all__ = ["CHECKS", "Layer", "NotApplicable", "Outcome", "Result", "Sizes", "Subject", "verify"]
