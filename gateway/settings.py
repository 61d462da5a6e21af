"""What the HTTP side can be told. The command line fills it in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ABOVE_ZERO = (
    "queue_timeout",
    "max_body_bytes",
    "max_connections",
    "idle_timeout",
    "receive_timeout",
    "ping_interval",
    "send_timeout",
    "first_delta_wait",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    api_keys: tuple[str, ...] = ()  # these and those of the file; none: everybody may ask
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()  # web pages of these origins may ask; "*": all
    queue_timeout: float = 60.0  # seconds that a sequence may wait for a place in a group
    access_log: bool = False
    page: bool = True  # the chat page at /
    max_body_bytes: int = 16 << 20
    response_store_bytes: int = 64 << 20  # of responses that later ones may go on with; 0: none are kept
    max_connections: int = 16_384
    idle_timeout: float = 75.0  # seconds that a connection may stay open without a request
    receive_timeout: float = 10.0  # seconds from a request's first byte to its last
    ping_interval: float = 15.0  # seconds of silence after which a stream gets a comment line
    send_timeout: float = 30.0  # seconds that a client may leave an answer unread
    first_delta_wait: float = 10.0  # seconds for which a stream's status line waits for its first token

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.response_store_bytes < 0:
            raise ValueError(f"response_store_bytes must be 0 or more, not {self.response_store_bytes}")
        if any(not key for key in self.api_keys):
            raise ValueError("an API key must not be empty")
