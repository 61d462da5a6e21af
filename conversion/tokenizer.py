"""tokenizer.model, SentencePiece's (Llama 1, 2) or tiktoken's (Llama 3), to tokenizer.json."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from conversion.sentencepiece import Piece, PieceType, read_pieces
from conversion.source import Json
from conversion.tensors import CannotConvert
from engines.models.config import LlamaConfig

_MAX_BYTES = 64 << 20
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """The files that a Hugging Face directory has. `eos_ids` end a generation."""

    tokenizer_json: str
    tokenizer_config: Json
    bos_id: int
    eos_ids: tuple[int, ...]

    @property
    def generation_config(self) -> Json:
        ids = list(self.eos_ids)
        return {"bos_token_id": self.bos_id, "eos_token_id": ids if len(ids) > 1 else ids[0]}


def make_tokenizer(path: Path, config: LlamaConfig) -> MadeTokenizer:
    """Of the kind that the file's content shows. Raises CannotConvert."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"has {path.stat().st_size} bytes, no tokenizer is so large")
        data = path.read_bytes()
        made = _tiktoken(data, config) if _is_tiktoken(data) else _sentencepiece(read_pieces(data), config)
    except OSError as error:
        raise CannotConvert(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CannotConvert(f"{path}: {error}") from None
    return made


def _is_tiktoken(data: bytes) -> bool:
    token, _, rank = data.split(b"\n", 1)[0].partition(b" ")
    return bool(token) and rank.strip().isdigit()


def _check_size(num_tokens: int, config: LlamaConfig) -> None:
    if num_tokens > config.vocab_size:
        raise ValueError(f"has {num_tokens} tokens, the model {config.vocab_size}: it is another model's")


def _special(tokens: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def _starting_with(bos: str, bos_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )


# ---- tiktoken: Llama 3

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_SPECIAL = 256


def special_tokens(is_scaled: bool) -> list[str]:
    """The 256 that follow the ranks, in order. Llama 3.1 and later (`is_scaled`) name more of them."""
    start, end = "<|begin_of_text|>", "<|end_of_text|>"
    header = ["<|start_header_id|>", "<|end_header_id|>"]

    def reserved(*numbers: int) -> list[str]:
        return [f"<|reserved_special_token_{number}|>" for number in numbers]

    if is_scaled:
        named = [start, end, *reserved(0, 1), "<|finetune_right_pad_id|>", *reserved(2), *header]
        named += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
        return named + reserved(*range(3, 3 + _NUM_SPECIAL - len(named)))
    named = [start, end, *reserved(0, 1, 2, 3), *header, *reserved(4), "<|eot_id|>"]
    return named + reserved(*range(5, 5 + _NUM_SPECIAL - len(named)))


def _tiktoken(data: bytes, config: LlamaConfig) -> MadeTokenizer:
    ranks = _ranks(data)
    special = special_tokens(config.rope.llama3 is not None)
    _check_size(len(ranks) + len(special), config)
    letters = _byte_letters()
    vocab = {_spelled(token, letters): rank for token, rank in ranks.items()}
    merges = [(_spelled(left, letters), _spelled(right, letters)) for left, right in _tiktoken_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_special(special))
    ids = {token: len(ranks) + number for number, token in enumerate(special)}
    bos, eos = special[0], special[1]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _starting_with(bos, ids[bos])]
    )
    ends = [token for token in (eos, "<|eom_id|>", "<|eot_id|>") if token in ids]
    return MadeTokenizer(
        tokenizer.to_str(pretty=False),
        _config(bos, eos, LLAMA3_TEMPLATE, config),
        ids[bos],
        tuple(sorted(ids[token] for token in ends)),
    )


def _ranks(data: bytes) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank, the ranks 0, 1, 2 and so on."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise ValueError(f"line {number}: is not a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2 and so on, each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("lacks a token for some single byte")
    return ranks


def _tiktoken_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Which two tokens each token can be made of, in the order of the ranks."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _spelled(token: bytes, letters: Sequence[str]) -> str:
    return "".join(letters[byte] for byte in token)


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte: GPT-2's table."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


# ---- SentencePiece: Llama 1 and 2


def _sentencepiece(pieces: Sequence[Piece], config: LlamaConfig) -> MadeTokenizer:
    _check_size(len(pieces), config)
    texts = [piece.text for piece in pieces]
    if len(set(texts)) != len(texts):
        raise ValueError("has a piece twice")
    ids = {text: number for number, text in enumerate(texts)}
    unknown = next((p.text for p in pieces if p.type is PieceType.UNKNOWN), None)
    if unknown is None or "<s>" not in ids or "</s>" not in ids:
        raise ValueError("lacks one of the pieces <unk>, <s>, </s>")
    scores = {piece.text: piece.score for piece in pieces if piece.type is PieceType.NORMAL}
    has_bytes = any(piece.type is PieceType.BYTE for piece in pieces)
    tokenizer = Tokenizer(
        models.BPE(ids, _score_merges(ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    special = [piece.text for piece in pieces if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL)]
    tokenizer.add_special_tokens(_special(special))
    own = [piece.text for piece in pieces if piece.type is PieceType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in own])
    tokenizer.post_processor = _starting_with("<s>", ids["<s>"])
    return MadeTokenizer(
        tokenizer.to_str(pretty=False),
        {**_config("<s>", "</s>", LLAMA2_TEMPLATE, config), "unk_token": unknown},
        ids["<s>"],
        (ids["</s>"],),
    )


def _score_merges(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Which two pieces each piece can be made of, the best score first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for text, score in scores.items():
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(merges)]


# ---- both


def _config(bos: str, eos: str, template: str, config: LlamaConfig) -> Json:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
        "chat_template": template,
    }


LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, and so on') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
