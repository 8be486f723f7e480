"""Runs every command and every Python example the README shows, in a folder of its own.

`python -m tests.readme_commands`. A block after the comment `<!-- not run: reason -->` is left out, and said so.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]*) -->\n)?```(?P<kind>bash|python)\n(?P<code>.*?)```", re.DOTALL)


def main() -> int:
    """Exit code 1 at the first block that fails."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    num_run = 0
    with tempfile.TemporaryDirectory() as folder:
        for match in BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
            first_line = match["code"].strip().splitlines()[0]
            if match["reason"]:
                print(f"left out ({match['reason']}): {first_line}")
                continue
            runner = ["bash", "-euc"] if match["kind"] == "bash" else [sys.executable, "-c"]
            num_run += 1
            started = time.perf_counter()
            code = subprocess.run([*runner, match["code"]], cwd=folder, env=environment, check=False).returncode
            print(f"exit {code} after {time.perf_counter() - started:.0f} s: {first_line}", flush=True)
            if code:
                return 1
    print(f"{num_run} blocks ran")
    return 0 if num_run else 1


if __name__ == "__main__":
    sys.exit(main())
