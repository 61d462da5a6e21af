"""What fails in a request's own work fails that request, not its batch-mates and not the group.

Own work is what is done for one sequence on rank 0: taking it in, its penalties and biases, its draft, its
prefix, what is made of its tokens. Anything else that raises ends the group, which is then started again.
"""

from __future__ import annotations

import logging

from engines.runtime.grammar import GrammarFailed
from engines.wire import RequestError

log = logging.getLogger("sluice.engine")


def failed(work: str, error: Exception) -> RequestError:
    """Why a sequence fails whose `work` raised, from within the except clause: the log gets all of it, but
    for grammars, which tell what the request said."""
    if isinstance(error, GrammarFailed):
        log.warning("a sequence fails: its grammar cannot be followed")
        return RequestError("invalid_request", f"the grammar cannot be followed: {error}")
    log.exception("a sequence fails: %s", work)
    return RequestError("internal", f"{work} failed: {type(error).__name__}")
