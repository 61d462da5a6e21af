"""Every soak, one after another: `python -m tests.soak [NAME ...]`. Ends with 1 if one of them failed.

A soak is a module here with a command line of its own; its figures go to results/NAME.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(names())}")
    chosen = parser.parse_args().names or names()
    if unknown := set(chosen) - set(names()):
        parser.error(f"no such soak: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    failed = [
        name
        for name in chosen
        if subprocess.run(
            [sys.executable, "-m", f"tests.soak.{name}", "--json", str(HERE / "results" / f"{name}.json")],
            check=False,
        ).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
