"""What the HTTP side can be told. The command line fills it in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gateway.flags import flag

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
    api_keys: tuple[str, ...] = flag(
        (),
        "A key that clients must send; may be repeated. Without any, everybody may ask.",
        name="api_key",
        if_blank="give a key, or unset it to serve without keys",
    )
    api_key_file: Path | None = flag(
        None,
        "Keys that clients must send, with names and limits; `sluice key`.",
        if_blank="name a file, or unset it to serve without one",
    )
    cors_origins: tuple[str, ...] = flag(
        (), 'Web pages of this origin may ask ("*": of any); may be repeated.', name="cors_origin"
    )
    page: bool = flag(True, "The chat page at /.")
    access_log: bool = flag(False, "Log a line for each request.")
    queue_timeout: float = flag(60.0, "Seconds that a request may wait in the gateway; then 503.", low=0.1)
    max_body_bytes: int = flag(16 << 20, "Of a request; more is refused (413).", low=1)
    max_connections: int = flag(16_384, "Open at once; more are refused (503), but for probes.", low=1)
    idle_timeout: float = flag(75.0, "Seconds that a connection may be open without a request.", low=0.1)
    receive_timeout: float = flag(10.0, "Seconds from a request's first byte to its last.", low=0.1)
    send_timeout: float = flag(30.0, "Seconds that a client may leave an answer unread.", low=0.1)
    response_store_bytes: int = flag(
        64 << 20, "Memory for responses that previous_response_id may name; 0: none are kept.", low=0
    )
    ping_interval: float = 15.0  # seconds of silence after which a stream gets a comment line
    first_delta_wait: float = 10.0  # seconds for which a stream's status line waits for its first token

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.response_store_bytes < 0:
            raise ValueError(f"response_store_bytes must be 0 or more, not {self.response_store_bytes}")
        if any(not key.strip() for key in self.api_keys):
            raise ValueError("--api-key: is empty: give a key, or leave it out to serve without keys")
