"""A user's file of measurements in the schema of published_cases.json."""

import json
from pathlib import Path
from typing import Any

from turnout.errors import ConfigError


def read_cases(path: Path) -> dict[str, Any]:
    """The document of a file: `rows`, and `models` where rows name unknown ones; a bare list is its rows.

    Rows are not looked at: what cannot be answered is refused row by row.
    Raises: ConfigError if the file cannot be read, is not JSON, or has no list `rows`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give a file of cases") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if isinstance(document, list):
        document = {"rows": document}
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ConfigError(f"{path} has no list `rows`; it needs the schema of published_cases.json")
    models = document.get("models") or {}
    if not isinstance(models, dict):
        raise ConfigError(f"{path}: models={models!r} must be an object of name: dimensions")
    return document | {"models": models}
