"""What the HTTP side can be told. The command line fills it in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    max_body_bytes: int = 16 << 20
    ping_interval: float = 15.0  # seconds of silence after which a stream gets a comment line
    send_timeout: float = 30.0  # seconds that a client may leave a stream unread
    first_delta_wait: float = 10.0  # seconds for which a stream's status line waits for its first token

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "ping_interval", "send_timeout", "first_delta_wait"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if any(not key for key in self.api_keys):
            raise ValueError("an API key must not be empty")
