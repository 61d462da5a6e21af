"""The whole suite, `python -m tests`: two halves at the same time, each in a process of its own.

Plain processes, not pytest-xdist's workers: tests of processes and signals want one for themselves. The first
half is shown as it goes, the second once the first has ended.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

FIRST = ("tests/gateway", "tests/e2e")
"""About half of the time. Everything else is the second half, also what is new."""


def main() -> int:
    """pytest's exit status, of the half that fared worse."""
    pytest = (sys.executable, "-m", "pytest", "--durations", "10", *sys.argv[1:])
    with tempfile.TemporaryFile() as words:
        second = subprocess.Popen(
            [*pytest, "-p", "no:cacheprovider", *(f"--ignore={path}" for path in FIRST)],
            stdout=words,
            stderr=subprocess.STDOUT,
        )
        try:
            first = subprocess.run([*pytest, *FIRST], check=False)
        except BaseException:
            second.send_signal(signal.SIGINT)  # it ends its servers
            raise
        finally:
            second.wait()
        words.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(words.read())
    return max(first.returncode, second.returncode)


if __name__ == "__main__":
    sys.exit(main())
