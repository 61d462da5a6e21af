"""Reads SentencePiece's tokenizer.model: a protocol buffer of pieces, and how they were trained.

Only what a tokenizer needs is decoded, by hand. Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

_PIECES, _TRAINER = 1, 2
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_MAX_PIECES = 1_000_000


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """A token; its place in the list is its id."""

    text: str
    score: float
    type: PieceType


def read_pieces(data: bytes) -> list[Piece]:
    """The pieces of a BPE model. Raises ValueError: no such file, or of another kind."""
    pieces: list[Piece] = []
    model_type = 1  # the field's default: unigram
    for field, value in _fields(data):
        if field == _PIECES and isinstance(value, bytes):
            pieces.append(_piece(value))
        if field == _TRAINER and isinstance(value, bytes):
            model_type = next((int(v) for f, v in _fields(value) if f == _MODEL_TYPE), model_type)
        if len(pieces) > _MAX_PIECES:
            raise ValueError("has more pieces than any tokenizer")
    if not pieces:
        raise ValueError("has no pieces: is not a SentencePiece model")
    if model_type != _BPE:
        raise ValueError("is not a BPE model, as Llama's are")
    return pieces


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score, kind = fields.get(_TEXT, b""), fields.get(_SCORE, 0.0), fields.get(_TYPE, 1)
    if not isinstance(text, bytes) or not isinstance(score, float) or not isinstance(kind, int):
        raise ValueError("has a piece that is not text, score and type")
    return Piece(text.decode("utf-8"), score, PieceType(kind))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of a message. Raises ValueError if it ends in the middle of one."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("is truncated, or not a SentencePiece model")
        content = data[at : at + size]
        at += size
        yield number, struct.unpack("<f", content)[0] if kind == 5 else content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError("is truncated, or not a SentencePiece model")
