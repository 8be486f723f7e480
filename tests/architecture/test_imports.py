"""The house plan holds: layers, no cycles, and planning without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN_MAIN = """
import sys
from turnout.cli.main import main
sys.argv = ["turnout", *{args}]
try:
    main()
except SystemExit:
    pass
"""


def test_import_contracts_hold() -> None:
    command = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([command], capture_output=True, text=True, check=False)
    assert "Contracts:" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import turnout",
        "import turnout.plan, turnout.config, turnout.registry, turnout.errors, turnout.topology, turnout.strategy",
        "import turnout.clusters, turnout.alltoall, turnout.plan.explain, turnout.plan.validate, turnout.plan.predict",
        RUN_MAIN.format(args=["plan", "--help"]),
        RUN_MAIN.format(args=["--help"]),
    ],
)
def test_planning_never_reaches_torch(code: str) -> None:
    check = f"{code}\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
