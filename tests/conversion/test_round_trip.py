"""Any layout to any other and back is the same model, bit by bit; and it is the model that it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversion.open import open_checkpoint
from conversion.plan import Target
from conversion.source import Choices
from conversion.tensors import CannotConvert
from conversion.verify import differences
from engines.models.config import LlamaConfig
from tests.conversion.helpers import META_SCALING, assert_same_weights, convert, random_case, weights
from tests.models import GQA, MHA, ODD, Shape, make_llama


@pytest.mark.parametrize("seed", range(40))
def test_a_random_model_survives_a_tour_of_layouts(tmp_path: Path, seed: int) -> None:
    case = random_case(seed)
    first = current = make_llama(tmp_path / "first", case.shape, seed, case.dtype)
    for number, target in enumerate(case.targets):
        convert(current, tmp_path / str(number), target)
        current = tmp_path / str(number)
        assert not list(differences(open_checkpoint(first), open_checkpoint(current))), target
    assert_same_weights(first, current)
    assert LlamaConfig.load(first) == LlamaConfig.load(current)


def reference_meta(directory: Path, shape: Shape) -> dict[str, torch.Tensor]:
    """Meta's tensors of a Hugging Face model, by the formula of the reference converter, inverted."""

    def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
        split = weight.view(heads, 2, shape.head_dim // 2, *weight.shape[1:])
        return split.transpose(1, 2).reshape(weight.shape)

    named = weights(directory)
    result = {"norm.weight": named["model.norm.weight"], "output.weight": named["lm_head.weight"]}
    result["tok_embeddings.weight"] = named["model.embed_tokens.weight"]
    for i in range(shape.layers):
        hf, meta = f"model.layers.{i}.", f"layers.{i}."
        result[f"{meta}attention.wq.weight"] = permuted(named[f"{hf}self_attn.q_proj.weight"], shape.heads)
        result[f"{meta}attention.wk.weight"] = permuted(named[f"{hf}self_attn.k_proj.weight"], shape.kv_heads)
        for one, other in (
            ("attention.wv", "self_attn.v_proj"),
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            result[f"{meta}{one}.weight"] = named[f"{hf}{other}.weight"]
    return result


def params_of(shape: Shape, **extra: object) -> dict[str, object]:
    sizes = {"dim": shape.hidden, "n_layers": shape.layers, "n_heads": shape.heads}
    return {**sizes, "n_kv_heads": shape.kv_heads, "vocab_size": -1, "norm_eps": 1e-5, **extra}


def write_meta(
    directory: Path, tensors: dict[str, torch.Tensor], shards: int, params: dict[str, object], *, rows: bool
) -> Path:
    """A directory as Meta releases it, split with torch, saved with torch."""
    directory.mkdir()
    by_columns = ("wo.weight", "w2.weight") + (() if rows else ("tok_embeddings.weight",))
    for shard in range(shards):

        def piece(name: str, tensor: torch.Tensor, shard: int = shard) -> torch.Tensor:
            if name.endswith("norm.weight"):
                return tensor.clone()
            return tensor.chunk(shards, dim=1 if name.endswith(by_columns) else 0)[shard].clone()

        content = {name: piece(name, tensor) for name, tensor in tensors.items()}
        content["rope.freqs"] = torch.ones(shards)
        torch.save(content, directory / f"consolidated.{shard:02}.pth")
    (directory / "params.json").write_text(json.dumps(params))
    return directory


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_what_meta_releases_becomes_the_hugging_face_model(tmp_path: Path, shards: int, rows: bool) -> None:
    hf = make_llama(tmp_path / "hf", MHA, 3, torch.bfloat16)
    meta = write_meta(
        tmp_path / "meta", reference_meta(hf, MHA), shards, params_of(MHA, rope_theta=10000.0), rows=rows
    )
    convert(meta, tmp_path / "made", Target("hf"), choices=Choices(max_positions=2048))
    assert_same_weights(hf, tmp_path / "made")
    assert LlamaConfig.load(tmp_path / "made") == LlamaConfig.load(hf)


def test_written_for_meta_is_what_its_reference_makes(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 4, torch.float16)
    convert(hf, tmp_path / "meta", Target("meta"))
    written = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True, mmap=True)
    expected = reference_meta(hf, GQA)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
        assert written[name].data_ptr() % 8 == 0


def test_a_padded_vocabulary_is_what_params_json_says(tmp_path: Path) -> None:
    """301 rows over two shards are 302 of embedding and head: Meta's code makes both by vocab_size."""
    hf = make_llama(tmp_path / "hf", GQA, 4)
    convert(hf, tmp_path / "meta", Target("meta", shards=2))
    (tmp_path / "meta" / "manifest.json").unlink()
    alone = open_checkpoint(tmp_path / "meta", Choices(max_positions=99))
    assert alone.config.vocab_size == 302
    assert alone.tensors["model.embed_tokens.weight"].shape == alone.tensors["lm_head.weight"].shape
    with pytest.raises(CannotConvert, match="--embedding columns: the head's 301 rows over 2 shards"):
        convert(hf, tmp_path / "out", Target("meta", shards=2, embedding_by_rows=False))


def test_few_key_value_heads_go_to_the_ranks_that_read_them(tmp_path: Path) -> None:
    """Of two heads, four ranks hold 0, 0, 1, 1: not 0, 1, 0, 1."""
    hf = make_llama(tmp_path / "hf", GQA, 4)
    convert(hf, tmp_path / "s", Target("sluice", tp=4))
    from safetensors.torch import load_file

    whole = weights(hf)["model.layers.1.self_attn.v_proj.weight"].split(GQA.head_dim)
    for rank, head in enumerate((0, 0, 1, 1)):
        held = load_file(tmp_path / "s" / f"tp{rank}-of-4" / "pp0-of-1.safetensors")
        assert torch.equal(held["model.layers.1.self_attn.v_proj.weight"], whole[head])


@pytest.mark.parametrize("shape", [GQA, ODD])
def test_bin_files_are_read(tmp_path: Path, shape: Shape) -> None:
    hf = make_llama(tmp_path / "hf", shape, 5, torch.bfloat16)
    made = tmp_path / "bin"
    made.mkdir()
    (made / "config.json").write_bytes((hf / "config.json").read_bytes())
    tensors = weights(hf)
    halves = (dict(list(tensors.items())[:7]), dict(list(tensors.items())[7:]))
    weight_map = {}
    for number, half in enumerate(halves):
        torch.save(half, made / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(half, f"pytorch_model-{number}.bin")
    (made / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(made, tmp_path / "out", Target("hf"))
    assert_same_weights(hf, tmp_path / "out")


def test_another_dtype_is_only_given_when_asked_for(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, 6, torch.float32)
    convert(hf, tmp_path / "half", Target("hf", dtype="BF16"))
    for name, tensor in weights(tmp_path / "half").items():
        assert torch.equal(tensor, weights(hf)[name].bfloat16()), name
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_scaled_rope_is_known_or_asked_for(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", MHA, 3)
    params = params_of(MHA, rope_theta=500000.0, use_scaled_rope=True)
    meta = write_meta(tmp_path / "meta", reference_meta(hf, MHA), 1, params, rows=True)
    with pytest.raises(CannotConvert, match=r"params\.json: use_scaled_rope: .*--rope-scaling-factor"):
        open_checkpoint(meta)
    rope = open_checkpoint(meta, Choices(rope_scaling_factor=32.0)).config.rope
    assert rope.llama3 is not None
    assert (rope.theta, rope.llama3.factor, rope.llama3.original_max_positions) == (500000.0, 32.0, 8192)
    notes = "; ".join(open_checkpoint(meta, Choices(rope_scaling_factor=32.0)).notes)
    for assumed in (
        "low_freq_factor 1",
        "high_freq_factor 4",
        "8192 original",
        "max_position_embeddings 131072",
    ):
        assert assumed in notes
    assert "bos_token_id 1, eos_token_id 2: those of the tokenizer of Llama 1 and 2" in notes


def test_an_option_does_not_change_what_the_checkpoint_says(tmp_path: Path) -> None:
    shape = replace(MHA, extra={"rope_scaling": META_SCALING})
    hf = make_llama(tmp_path / "hf", shape, 3)
    said = params_of(MHA, rope_theta=500000.0, use_scaled_rope=True, rope_scaling_factor=8.0)
    meta = write_meta(tmp_path / "meta", reference_meta(hf, MHA), 1, said, rows=True)
    assert open_checkpoint(meta, Choices(rope_theta=500000.0, rope_scaling_factor=8.0)).config.rope.llama3
    for root, says in ((meta, r"params\.json says 8"), (hf, "hf says 8")):
        with pytest.raises(CannotConvert, match=f"--rope-scaling-factor 32: .*{says}: remove"):
            open_checkpoint(root, Choices(rope_scaling_factor=32.0))
    with pytest.raises(CannotConvert, match=r"--rope-theta 10000: .*params\.json says 500000: remove"):
        open_checkpoint(meta, Choices(rope_theta=10000.0))
    with pytest.raises(CannotConvert, match=r"--max-positions 99: .*hf says"):
        open_checkpoint(hf, Choices(max_positions=99))


@pytest.mark.parametrize(
    ("key", "value"), [("low_freq_factor", 2.0), ("original_max_position_embeddings", 4096)]
)
def test_scaling_that_meta_cannot_say_is_refused(tmp_path: Path, key: str, value: float) -> None:
    shape = replace(MHA, extra={"rope_scaling": {**META_SCALING, key: value}})
    hf = make_llama(tmp_path / "hf", shape, 3)
    with pytest.raises(CannotConvert, match=f"{key} {value:g} has no place in Meta's params.json"):
        convert(hf, tmp_path / "meta", Target("meta"))
    assert not (tmp_path / "meta").exists()
    convert(hf, tmp_path / "s", Target("sluice", tp=2))
    assert open_checkpoint(tmp_path / "s").config == LlamaConfig.load(hf)


def test_another_high_freq_factor_survives_meta(tmp_path: Path) -> None:
    shape = replace(MHA, extra={"rope_scaling": {**META_SCALING, "high_freq_factor": 6.0}})
    convert(make_llama(tmp_path / "hf", shape, 3), tmp_path / "meta", Target("meta"))
    (tmp_path / "meta" / "manifest.json").unlink()
    source = open_checkpoint(tmp_path / "meta")
    assert source.config.rope.llama3 is not None
    assert source.config.rope.llama3.high_freq_factor == 6.0
    assert not any("high_freq_factor" in note for note in source.notes)


def test_a_missing_rope_theta_is_not_guessed(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", MHA, 3)
    meta = write_meta(tmp_path / "meta", reference_meta(hf, MHA), 1, params_of(MHA), rows=True)
    with pytest.raises(CannotConvert, match="--rope-theta"):
        open_checkpoint(meta, Choices(max_positions=99))


def test_a_tied_model_of_meta_is_seen_to_be_tied(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", MHA, 3)
    tensors = reference_meta(hf, MHA)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    params = params_of(MHA, rope_theta=10000.0)
    meta = write_meta(tmp_path / "meta", tensors, 2, params, rows=False)
    source = open_checkpoint(meta, Choices(max_positions=99))
    assert source.config.tie_word_embeddings
    assert "lm_head.weight" not in source.tensors


def test_llama3_scaling_survives_meta(tmp_path: Path) -> None:
    shape = Shape(**{**vars(MHA), "extra": {"rope_scaling": META_SCALING}})
    hf = make_llama(tmp_path / "hf", shape, 3)
    convert(hf, tmp_path / "meta", Target("meta"))
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert (params["use_scaled_rope"], params["rope_scaling_factor"]) == (True, 8.0)
    assert open_checkpoint(tmp_path / "meta").config == LlamaConfig.load(hf)
