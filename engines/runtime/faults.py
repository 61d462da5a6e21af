"""What fails in a request's own work fails that request, not its batch-mates and not the group.

Own work is what is done for one sequence on rank 0: taking it in, its penalties and biases, its draft, its
prefix, what is made of its tokens. Anything else that raises ends the group, which is then started again.
"""

from __future__ import annotations

import logging

from engines.wire import RequestError

log = logging.getLogger("sluice.engine")


def describe(work: str, error: Exception) -> str:
    """Why a sequence fails whose `work` raised, from within the except clause: the log gets all of it."""
    log.exception("a sequence fails: %s", work)
    return f"{work} failed: {type(error).__name__}"


def failed(work: str, error: Exception) -> RequestError:
    return RequestError("internal", describe(work, error))
