"""In processes of their own: what is frozen stays so."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from engines.garbage import settle

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

gc.disable()
before, kept = cycle(), Node()
settle()
after = cycle()
gc.collect()
looked_at = gc.get_objects()
print(before() is None, after() is None, any(one is kept for one in looked_at), gc.get_threshold()[0] > 700)
"""


def test_what_was_there_is_looked_at_once_and_never_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "True"]
