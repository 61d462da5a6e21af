"""What crosses between the gateway and a worker group: msgpack frames over one unix socket.

A frame is a 4-byte big-endian length and a msgpack body of that many bytes; the body is one of the
structs below, told apart by its `type` field. Text never crosses, only token ids. Neither side unpickles.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct(">I")


class FrameTooLarge(ValueError):  # noqa: N818
    """A message that no frame holds: bound what it says."""


FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How one sequence is sampled. The draws depend on (seed, choice, position) and on nothing else."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: dict[int, float] = {}
    seed: int = 0  # the gateway draws one when the client gives none; 64 bits, not negative
    logprobs: int | None = None  # None: none; k: the sampled token's and those of the k likeliest


PoolingMethod = Literal["mean", "last"]


class Pooling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the hidden states of a prompt, after the model's last norm, become one vector of length 1."""

    method: PoolingMethod  # over all its tokens, or its last one's
    dimensions: int = 0  # that many of its first numbers; 0: all


class Generate(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag="generate"):
    """One sequence to generate. The n choices of a request are n of these with one `group`."""

    id: str
    prompt_ids: list[int]
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: list[int] = []  # in addition to the model's own end tokens
    ignore_eos: bool = False
    sampling: SamplingParams = SamplingParams()
    choice: int = 0
    group: str = ""  # sequences of one group share a prompt: its K/V is computed once
    resume_token_ids: list[int] = []  # already delivered by a group that died; never sent again
    prompt_logprobs: int | None = (
        None  # of the prompt's tokens: None: none; k: each one's own and the k likeliest
    )
    grammar: str = ""  # of llguidance: what may be generated; empty: anything
    cache_salt: bytes = b""  # prefix blocks are shared only between equal salts
    pooling: Pooling | None = None  # its prompt becomes a vector, and nothing is generated: max_tokens is 0


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a sequence and free its blocks. Unknown ids are ignored: it may just have finished."""

    id: str


ToWorker = Generate | Abort


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of a token, and those of the likeliest at the same place, best first.

    They are of the distribution that the model gave, before temperature and truncation, after
    nothing; natural logarithms.
    """

    logprob: float
    top: list[tuple[int, float]] = []


class RequestError(msgspec.Struct, frozen=True):
    """Why one sequence failed while the group goes on."""

    code: Literal["invalid_request", "too_long", "internal"]
    message: str


class TokenDelta(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """What one step added to one sequence. The last one of a sequence has finish_reason or error."""

    id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []  # one for each of token_ids, when asked for
    finish_reason: FinishReason | None = None
    is_stop_token: bool = False  # the last of token_ids ended the sequence: count it, do not show it
    num_cached_tokens: int | None = None  # on the first delta: prompt tokens read from the prefix cache
    prompt_logprobs: list[TokenLogprob | None] = []  # of the next prompt tokens, the very first's is None;
    # as they are computed, all of them before or with the first generated token
    embedding: bytes = b""  # what was pooled, with the finish reason: float32, little-endian
    error: RequestError | None = None


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """Everything that one step produced, in one frame."""

    deltas: list[TokenDelta]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far loading is: `fraction` of `phase` (connect, compile, load, allocate, warmup), 0 to 1."""

    phase: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The group has loaded and warmed up. Sent once."""

    engine: str
    dtype: str
    device: str
    tp_size: int
    pp_size: int
    max_model_len: int  # prompt and generated tokens of one sequence
    max_num_seqs: int
    vocab_size: int  # ids that may be sent or biased: 0 .. vocab_size - 1
    hidden_size: int  # numbers in an embedding
    num_blocks: int
    block_size: int
    eos_token_ids: list[int]
    fingerprint: str
    load_seconds: float
    pids: list[int]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The group cannot start, or is about to end. `permanent`: a restart would end the same way."""

    reason: str
    permanent: bool


class Stats(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag="stats"):
    """The group's heartbeat, twice a second from the leader's own loop: counters since start, and gauges.

    `num_steps` counts finished steps and idle rounds: by it the gateway knows a group that hangs
    (gateway/workers/hang.py). The I/O thread sends it, but does not count.
    """

    num_steps: int
    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_blocks_free: int = 0
    num_account_faults: int = 0  # times that blocks or slots were found lost, and taken back
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up
    num_prefix_hits: int = 0  # of them found
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafted_tokens: int = 0  # guessed, for a step to check
    num_accepted_tokens: int = 0  # of them, those that the model gave as well
    num_computed_tokens: int = 0  # by finished steps: prompts, again what was preempted, and what was drawn
    num_step_tokens: int = 0  # of the largest plan in flight: how much the step in progress computes
    num_active_steps: int = 0  # of num_steps, those with plans in flight
    active_seconds: float = 0.0  # that they took
    stage_busy_seconds: list[float] = []  # of each pipeline stage, first to last; empty without stages


FromWorker = Tokens | Progress | Ready | Failed | Stats

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
from_worker_decoder = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """A whole frame, its length in front. Raises FrameTooLarge."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frame bodies. Raises FrameTooLarge at a length over MAX_FRAME_BYTES."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete now that `data` has arrived."""
        self._pending += data
        bodies, start = [], 0
        while len(self._pending) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending, start)
            if length > MAX_FRAME_BYTES:
                raise FrameTooLarge(f"frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = start + _LENGTH.size + length
            if len(self._pending) < end:
                break
            bodies.append(bytes(self._pending[start + _LENGTH.size : end]))
            start = end
        del self._pending[:start]
        return bodies
