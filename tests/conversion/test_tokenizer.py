"""tokenizer.json made of Meta's files gives the ids that the algorithms of those files give."""

from __future__ import annotations

import base64
import json
import random
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Reference

from conversion.plan import Target
from conversion.sentencepiece import read_pieces
from conversion.tensors import CannotConvert
from conversion.tokenizer import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, make_tokenizer, special_tokens
from engines.models.config import LlamaConfig
from gateway.prompt.conversation import Conversation
from gateway.prompt.template import ChatTemplate
from tests.conversion.helpers import convert
from tests.models import LLAMA3_SCALING, Shape, make_llama

TEXT = Path(__file__).read_text(encoding="utf-8")
TEXTS = (
    "Hello world",
    " two  spaces\n\nand lines",
    "déjà vu, naïve, 漢字 \U0001f600",
    "x = 12345678 + don't they'll",
    "<|eot_id|>",
)


def config_of(vocab: int, *, scaled: bool = False) -> LlamaConfig:
    extra = {"rope_scaling": LLAMA3_SCALING} if scaled else {}
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=vocab, extra=extra)
    return LlamaConfig.parse(shape.config_json(torch.float32), "config.json")


def learnt_ranks(num_merges: int) -> dict[bytes, int]:
    """Byte pairs as training would find them, cheaply: the commonest pair of this file, again and again."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in re.findall(r" ?\w+|\W", TEXT)[:3000]]
    for _ in range(num_merges):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        words = [merged_at(word, best) for word in words]
    return ranks


def merged_at(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def byte_pair_ids(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: join the neighbours whose token has the lowest rank, until none has one."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not pairs or min(pairs)[0] == 1 << 30:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def tiktoken_file(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


def test_tiktoken_ids_are_those_of_its_algorithm(tmp_path: Path) -> None:
    ranks = learnt_ranks(150)
    path = tiktoken_file(tmp_path / "tokenizer.model", ranks)
    made = Reference.from_str(make_tokenizer(path, config_of(1000, scaled=True)).tokenizer_json)
    rng = random.Random(1)
    letters = [*"abcdefor theimnst_().=", "é", "漢"]
    words = ["".join(rng.choice(letters[:14]) for _ in range(rng.randint(1, 12))) for _ in range(200)]
    for word in (w.replace(" ", "") for w in words):
        if word:
            assert made.encode(word, add_special_tokens=False).ids == byte_pair_ids(word.encode(), ranks), (
                word
            )
    for text in TEXTS[:4]:
        encoded = made.encode(text, add_special_tokens=False)
        assert made.decode(encoded.ids) == text


@pytest.mark.parametrize(("scaled", "eot", "ends"), [(False, 9, (1, 9)), (True, 9, (1, 8, 9))])
def test_llama3s_special_tokens(tmp_path: Path, scaled: bool, eot: int, ends: tuple[int, ...]) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    path = tiktoken_file(tmp_path / "tokenizer.model", ranks)
    made = make_tokenizer(path, config_of(600, scaled=scaled))
    tokenizer = Reference.from_str(made.tokenizer_json)
    assert tokenizer.token_to_id("<|begin_of_text|>") == 256 == made.bos_id
    assert tokenizer.token_to_id("<|eot_id|>") == 256 + eot
    assert tokenizer.token_to_id("<|start_header_id|>") == 256 + 6
    assert tokenizer.get_vocab_size() == 512
    assert made.eos_ids == tuple(256 + end for end in ends)
    assert tokenizer.encode("a").ids == [256, ord("a")]
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False).ids == [256 + eot]
    names = special_tokens(scaled)
    assert len(set(names)) == len(names) == 256


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def sentencepiece_file(path: Path, words: Sequence[str], model_type: int = 2) -> Path:
    """<unk>, <s>, </s>, 256 bytes, then the words with falling scores."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(word, -float(number), 1) for number, word in enumerate(words)]
    data = b""
    for text, score, kind in pieces:
        body = message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        data += message(1, body + (varint(3 << 3) + varint(kind) if kind != 1 else b""))
    path.write_bytes(data + message(2, varint(3 << 3) + varint(model_type)))
    return path


def learnt_words(num_merges: int) -> list[str]:
    """Merges first, as BPE training ranks them; then the letters."""
    ranks = learnt_ranks(num_merges)
    merged = [token.decode().replace(" ", "\u2581") for token in list(ranks)[256:] if token.isascii()]
    letters = sorted({*TEXT.replace(" ", "\u2581"), *"\u2581"} - {"\n", "漢", "字", "é", "à", "ï"})
    return merged + [letter for letter in letters if letter.isascii() or letter == "\u2581"]


def sentencepiece_ids(text: str, words: Sequence[str]) -> list[int]:
    """Its algorithm: join the neighbours whose piece has the best score, the leftmost; the rest in bytes."""
    ids = {word: 259 + number for number, word in enumerate(words)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [(ids.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not pairs or min(pairs)[0] == 1 << 30:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + b for b in part.encode()])]


def test_sentencepiece_ids_are_those_of_its_algorithm(tmp_path: Path) -> None:
    words = learnt_words(150)
    path = sentencepiece_file(tmp_path / "tokenizer.model", words)
    made = make_tokenizer(path, config_of(259 + len(words)))
    tokenizer = Reference.from_str(made.tokenizer_json)
    for text in (*TEXTS, *TEXT.splitlines()[:40]):
        if not text.strip():
            continue
        encoded = tokenizer.encode(text)
        assert encoded.ids == [1, *sentencepiece_ids(text, words)], text
        assert tokenizer.decode(encoded.ids) == text
    assert (made.bos_id, made.eos_ids) == (1, (2,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no pieces"),
        (b"\x0a\xff\xff\x03abc", "is truncated"),
        (b"YQ== 0\nYg== x\n", "line 2: is not a token"),
        (b"YQ== 0\nYg== 5\n", "its ranks are not 0, 1, 2"),
        (b"YQ== 0\nYg== 1\n", "lacks a token for some single byte"),
        (random.Random(0).randbytes(300), "is truncated|no pieces|not a|is not"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CannotConvert, match=rf"tokenizer\.model: ({message})"):
        make_tokenizer(path, config_of(1000))


def test_other_kinds_and_other_models_are_refused(tmp_path: Path) -> None:
    words = learnt_words(20)
    unigram = sentencepiece_file(tmp_path / "unigram.model", words, model_type=1)
    with pytest.raises(ValueError, match="not a BPE model"):
        read_pieces(unigram.read_bytes())
    bpe = sentencepiece_file(tmp_path / "bpe.model", words)
    with pytest.raises(CannotConvert, match=r"has \d+ tokens, the model 100"):
        make_tokenizer(bpe, config_of(100))


def test_a_converted_model_has_a_tokenizer_that_serves(tmp_path: Path) -> None:
    words = learnt_words(30)
    vocab = 259 + len(words)
    shape = Shape(hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn=16, vocab=vocab)
    hf = make_llama(tmp_path / "hf", shape)
    convert(hf, tmp_path / "meta", Target("meta", shards=2))
    sentencepiece_file(tmp_path / "meta" / "tokenizer.model", words)
    convert(tmp_path / "meta", tmp_path / "out", Target("sluice", tp=2))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    tokenizer = Reference.from_file(str(tmp_path / "out" / "tokenizer.json"))
    template = ChatTemplate(settings["chat_template"], {"bos_token": "<s>", "eos_token": "</s>"})
    prompt = template.render(Conversation(messages=[{"role": "user", "content": "the"}]))
    assert prompt == "<s>[INST] the [/INST]"
    assert tokenizer.encode(prompt, add_special_tokens=False).ids[0] == 1
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_templates(tmp_path: Path) -> None:
    three = ChatTemplate(LLAMA3_TEMPLATE, {"bos_token": "<|begin_of_text|>"})
    said = [{"role": "system", "content": " s "}, {"role": "user", "content": "u"}]
    assert three.render(Conversation(messages=said)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    two = ChatTemplate(LLAMA2_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"})
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    assert two.render(Conversation(messages=[{"role": role, "content": text} for role, text in turns])) == (
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST] a </s><s>[INST] v [/INST]"
    )
