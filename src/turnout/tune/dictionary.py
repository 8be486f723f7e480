"""What was learned, key by key, as a file that the next run begins with: JSON, nothing else."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from turnout.errors import ConfigError
from turnout.topology import Link
from turnout.tune.choice import Choice, Key
from turnout.tune.predict import Hardware
from turnout.tune.search import Entry, Predicted, Rules, Trial, choose, observed

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """Key -> what is known of its steps; with the machine that its predictions are for.

    Source: Hwang et al. 2022, Tutel, arXiv:2206.03382, section 4.3.
    """

    hardware: Hardware
    rules: Rules = Rules()
    entries: Mapping[Key, Entry] = field(default_factory=dict)

    def choose(self, key: Key, predicted: Predicted) -> Choice:
        """What a step of this key should take."""
        return choose(self.entries.get(key, Entry()), predicted, self.rules)

    def observed(self, key: Key, choice: Choice, predicted: Predicted, seconds: float) -> "Dictionary":
        """The dictionary after such a step."""
        entry = observed(self.entries.get(key, Entry()), choice, predicted, seconds, self.rules)
        return replace(self, entries={**self.entries, key: entry})

    def to_json(self) -> str:
        """The file's text."""
        entries = [{"key": asdict(key)} | _entry_to_json(entry) for key, entry in sorted(self.entries.items())]
        whole = {
            "version": VERSION,
            "hardware": asdict(self.hardware),
            "rules": asdict(self.rules),
            "entries": entries,
        }
        return json.dumps(whole, indent=1)

    @classmethod
    def from_json(cls, text: str, name: str) -> "Dictionary":
        """Raises: ConfigError if the text is not that of a dictionary of this version; `name` says whose it is."""
        try:
            whole = json.loads(text)
            if whole["version"] != VERSION:
                raise ConfigError(f"{name} has version {whole['version']}; this turnout reads version {VERSION}")
            intra, inter = (Link(**whole["hardware"].pop(tier)) for tier in ("intra", "inter"))
            return cls(
                hardware=Hardware(**whole["hardware"], intra=intra, inter=inter),
                rules=Rules(**whole["rules"]),
                entries={Key(**each["key"]): _entry_of_json(each) for each in whole["entries"]},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{name} is no dictionary of strategies ({type(error).__name__}: {error}); "
                "write one: turnout tune RECIPE"
            ) from error


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    candidates = [
        {"choice": asdict(choice), "predicted_s": predicted_s, "measured_s": entry.times(entry.predicted).get(choice)}
        | (asdict(entry.trials[choice]) if choice in entry.trials else {})
        for choice, predicted_s in entry.predicted.items()
    ]
    return {"searches": entry.searches, "off": entry.off, "candidates": candidates}


def _entry_of_json(each: Mapping[str, Any]) -> Entry:
    predicted, trials = {}, {}
    for candidate in each["candidates"]:
        choice = Choice(**candidate["choice"])
        predicted[choice] = float(candidate["predicted_s"])
        if "ratios" in candidate:
            trials[choice] = Trial(ratios=tuple(map(float, candidate["ratios"])), steps=int(candidate["steps"]))
    return Entry(trials=trials, predicted=predicted, off=int(each["off"]), searches=int(each["searches"]))
