"""The commands: what they print, what they exit with, and that verify sees what shapes cannot show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conversion.numeric import logits
from conversion.open import open_checkpoint
from conversion.plan import Target
from engines.config import load
from gateway.cli import app
from tests.conversion.helpers import ODD_FOR_META, convert
from tests.models import GQA, MHA, Shape, make_llama


def sluice(*arguments: object, code: int = 0) -> str:
    """What the command prints; errors too."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_convert_verify_inspect(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", ODD_FOR_META)
    printed = sluice("convert", hf, tmp_path / "meta", "--to", "meta", "--shards", 2)
    assert re.search(r"meta: 510 kB in \d+\.\d s, [\d.]+ \w+/s$", printed.strip()), printed
    sluice("convert", tmp_path / "meta", tmp_path / "s", "--to", "sluice", "--tp", 2, "--pp", 2)
    printed = sluice("verify", hf, tmp_path / "s")
    assert "all 34 tensors are equal, bit by bit" in printed
    assert "agree: 2 layers in float32" in printed
    printed = sluice("inspect", tmp_path / "s")
    assert "tp=2 pp=2" in printed
    assert "1, 2, 4 (key/value heads are replicated at 2, 4)" in printed
    assert "100,504 (402 kB)" in printed


def test_the_model_config_that_comes_with_it_is_valid(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    for tp, pp, kind in ((1, 1, "tp"), (4, 1, "tp"), (1, 3, "pp"), (2, 2, "pptp")):
        out = tmp_path / f"{tp}-{pp}"
        sluice("convert", hf, out, "--to", "sluice", "--tp", tp, "--pp", pp)
        config = load(out / "model-config.yaml", num_gpus=0)
        assert (config.parallel_type, config.tp_size, config.pp_size) == (kind, tp, pp)
        assert config.model_path == str(out)
        assert config.stage_split == ("work" if pp == 1 else (2, 1) if pp == 2 else (1, 1, 1))
        shown = sluice("inspect", out).split("model-config.yaml:\n")[1]
        written = yaml.safe_load((out / "model-config.yaml").read_text())
        assert yaml.safe_load(shown) == written | {"modelPath": str(out)}


def test_inspect_says_how_to_serve_what_the_server_does_not_read(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    sluice("convert", hf, tmp_path / "m", "--to", "meta", "--tp", 2)
    assert sorted(path.name for path in (tmp_path / "m").glob("*.pth")) == [
        f"consolidated.0{i}.pth" for i in (0, 1)
    ]
    shown = json.loads(sluice("inspect", tmp_path / "m", "--json"))
    command = f"sluice convert {tmp_path}/m {tmp_path}/m-sluice --to sluice"
    assert f"run `{command}`, and serve {tmp_path}/m-sluice" in shown["model-config.yaml"]
    options = ["--max-positions", 2048, "--rope-theta", 10000.0, "--allow-extra"]
    shown = json.loads(sluice("inspect", tmp_path / "m", "--json", *options))
    assert f"`{command} --rope-theta 10000 --max-positions 2048 --allow-extra`" in shown["model-config.yaml"]
    assert shown["tp that fits"] == "1, 2, 4, 8 (key/value heads are replicated at 4, 8)"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    printed = sluice("convert", hf, tmp_path / "out", "--to", "sluice", "--tp", 2, "--dry-run")
    assert "tp1-of-2/pp0-of-1.safetensors" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    printed = sluice("convert", hf, tmp_path / "o", "--to", "hf", "--dry-run", "--json")
    plan = json.loads(printed.splitlines()[-1])
    convert(hf, tmp_path / "real", Target("hf"))
    header = 8 + int.from_bytes((tmp_path / "real" / "model.safetensors").read_bytes()[:8], "little")
    assert plan["bytes"] + header == (tmp_path / "real" / "model.safetensors").stat().st_size


def test_the_json_log(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    lines = sluice("convert", hf, tmp_path / "out", "--to", "sluice", "--tp", 2, "--json").splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events].count("finish") == 2
    assert events[0]["event"] == "source"
    assert {"event": "plan", "bytes": events[-1]["bytes"]} in events
    assert events[-1]["event"] == "done"
    assert events[-1]["not_finite"] == []


def test_the_json_log_tells_conclusions_and_what_is_left_out(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", MHA)
    convert(hf, tmp_path / "meta", Target("meta"))
    path = tmp_path / "meta" / "consolidated.00.pth"
    torch.save({**torch.load(path, weights_only=True), "odd": torch.ones(2)}, path)
    (tmp_path / "meta" / "manifest.json").unlink()
    arguments = [tmp_path / "meta", tmp_path / "out", "--to", "sluice", "--json", "--allow-extra"]
    printed = sluice("convert", *arguments, "--quantize", "int8")
    events = [json.loads(line) for line in printed.splitlines()]
    assert events[0]["left_out"] == ["odd"]
    assert "max_position_embeddings 4096: Llama 2, by its norm_eps" in events[0]["concluded"]
    assert len(events[-1]["quantization_errors"]) == 7 * MHA.layers


def test_an_error_is_an_event_of_the_json_log(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    file = hf / "model.safetensors"
    save_file({**load_file(file), "odd": torch.ones(2), "odder": torch.ones(2)}, file)
    result = CliRunner().invoke(app, ["convert", str(hf), str(tmp_path / "out"), "--to", "hf", "--json"])
    event = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, event["event"], event["exit_code"]) == (1, "error", 1)
    assert "tensor odd: unknown" in event["message"]
    assert [problem.split(": ")[1] for problem in event["problems"]] == ["tensor odd", "tensor odder"]
    assert result.stderr.startswith("sluice: error: ")
    command = ["convert", str(hf), str(tmp_path / "out"), "--to", "hf", "--json", "--max-memory", "much"]
    assert json.loads(CliRunner().invoke(app, command).stdout)["message"].startswith("'much' is not a size")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "sluice", "--tp", 3], "--tp 3: its 8 attention heads"),
        (["--to", "sluice", "--pp", 4], "--pp 4: a pipeline of 4 stages needs as many layers"),
        (["--to", "sluice", "--pp", 2, "--stage-split", "1,1"], "adds to 2, and the model has 3 layers"),
        (["--to", "sluice", "--stage-split", "most"], "--stage-split 'most'"),
        (["--to", "meta", "--shards", 5], "--shards 5: its 8 attention heads"),
        (["--to", "hf", "--quantize", "int8"], "--quantize: is for --to sluice: leave it out with --to hf"),
        (["--to", "hf", "--tp", 2], "--tp: is for --to sluice and --to meta"),
        (["--to", "meta", "--pp", 2], "--pp: is for --to sluice"),
        (["--to", "meta", "--tp", 2, "--shards", 4], "--tp 2: means as many shards, and --shards says 4"),
        (["--to", "sluice", "--shards", 2], "--shards: is for --to meta"),
        (["--to", "sluice", "--max-file-size", "1G"], "--max-file-size: is for --to hf"),
        (["--to", "hf", "--max-memory", "much"], "'much' is not a size"),
        (["--to", "hf", "--tokenizer", "/nonexistent/tokenizer.model"], "tokenizer.model"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, arguments: list[Any], message: str) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    printed = sluice("convert", hf, tmp_path / "out", *arguments, code=1)
    errors = [line for line in printed.splitlines() if line.startswith("sluice: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_inspect_lists_all_that_is_wrong(tmp_path: Path) -> None:
    file = make_llama(tmp_path / "hf", GQA) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors |= {"odd": torch.ones(2), "model.layers.0.mlp.up_proj.weight": torch.ones(2)}
    save_file(tensors, file)
    printed = sluice("inspect", tmp_path / "hf", code=1)
    lines = [line for line in printed.splitlines() if line.startswith("sluice: error: ")]
    assert [line.split("tensor ")[1].split(":")[0] for line in lines] == [
        "odd",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    for known in ("family", "tp that fits  1, 2, 4, 8", "F32 (28 tensors)", "one safetensors file"):
        assert known in printed
    assert "model-config.yaml" not in printed
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "hf"), "--json"])
    shown = json.loads(result.stdout)
    assert (result.exit_code, len(shown["problems"])) == (1, 3)
    assert (shown["pp that fits"], shown["model-config.yaml"]) == ("1 to 3", None)
    printed = sluice("convert", tmp_path / "hf", tmp_path / "out", "--to", "hf", code=1)
    assert "(and 2 more: sluice inspect lists them)" in printed


@pytest.mark.parametrize("has_manifest", [True, False])
def test_inspect_lists_all_that_is_wrong_with_metas_too(tmp_path: Path, has_manifest: bool) -> None:
    convert(make_llama(tmp_path / "hf", MHA), tmp_path / "meta", Target("meta", shards=2))
    path = tmp_path / "meta" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    for name in ("norm.weight", "layers.0.attention.wq.weight"):
        del tensors[name]
    tensors |= {"odd": torch.ones(2), "layers.1.feed_forward.w2.weight": torch.ones(2, 2)}
    torch.save(tensors, path)
    if not has_manifest:
        (tmp_path / "meta" / "manifest.json").unlink()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "meta"), "--json"])
    shown = json.loads(result.stdout)
    assert [problem.split("tensor ")[1].split(":")[0] for problem in shown["problems"]] == [
        "odd",
        "layers.0.attention.wq.weight",
        "layers.1.feed_forward.w2.weight",
        "norm.weight",
    ]
    assert (result.exit_code, shown["format"], shown["tp that fits"]) == (
        1,
        "meta: 2 consolidated shard(s)",
        "1, 2, 4",
    )


def test_verify_finds_one_changed_value(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, dtype=torch.bfloat16)
    convert(hf, tmp_path / "s", Target("sluice", tp=2))
    file = hf / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 99] += 1
    save_file(tensors, file)
    printed = sluice("verify", hf, tmp_path / "s", "--no-numeric", code=1)
    assert printed.splitlines()[2:] == [
        "differs: model.layers.1.mlp.down_proj.weight: values differ",
        "of 30 tensors 29 are equal, bit by bit, 1 differ",
    ]


def test_verify_finds_a_damaged_file_by_its_hash(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    convert(hf, tmp_path / "s", Target("sluice", tp=2))
    assert "are what manifest.json says" in sluice("verify", tmp_path / "s")
    path = tmp_path / "s" / "tp1-of-2" / "pp0-of-1.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    printed = sluice("verify", tmp_path / "s", code=1)
    assert "tp1-of-2/pp0-of-1.safetensors: tensor model.layers.2.mlp.down_proj.weight: is damaged" in printed


@pytest.mark.parametrize(
    ("how", "has_manifest"),
    [
        (Target("sluice", tp=2), True),
        (Target("hf"), True),
        (Target("meta", shards=2), True),
        (Target("hf"), False),
        (Target("meta", shards=2), False),
    ],
)
def test_a_flipped_bit_is_not_converted_where_checksums_tell(
    tmp_path: Path, how: Target, has_manifest: bool
) -> None:
    source = tmp_path / "source"
    convert(make_llama(tmp_path / "first", MHA), source, how)
    if not has_manifest:
        (source / "manifest.json").unlink()
    path = max(source.rglob("*.pth" if how.format == "meta" else "*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-20_000] ^= 1
    path.write_bytes(data)
    plain = how.format == "hf" and not has_manifest
    printed = sluice("convert", source, tmp_path / "out", "--to", "hf", code=0 if plain else 1)
    if plain:
        assert "checked: headers only" in printed
        assert "nothing says" in sluice(
            "convert", source, tmp_path / "o", "--to", "hf", "--check-source", code=1
        )
    else:
        why = "its sha256" if has_manifest else "is damaged: its checksum"
        assert f"{path.name}: " in printed
        assert why in printed
        assert not (tmp_path / "out").exists()
        sluice("convert", source, tmp_path / "out", "--to", "hf", "--no-check-source")


def test_a_manifest_whose_config_was_changed_is_not_converted(tmp_path: Path) -> None:
    convert(make_llama(tmp_path / "hf", MHA), tmp_path / "s", Target("sluice"))
    path = tmp_path / "s" / "manifest.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    printed = sluice("convert", tmp_path / "s", tmp_path / "out", "--to", "hf", code=1)
    assert "manifest.json: config: is not what config.json says" in printed


@pytest.mark.parametrize("shape", [MHA, GQA, ODD_FOR_META])
def test_the_numeric_check_sees_a_wrong_order_of_rows(tmp_path: Path, shape: Shape) -> None:
    """A missing permutation keeps every shape, and the text that comes out is plausible for a while."""
    hf = make_llama(tmp_path / "hf", shape)
    convert(hf, tmp_path / "meta", Target("meta"))
    right = logits(open_checkpoint(hf), 2, "hf")
    for by in ("hf", "meta"):
        assert torch.allclose(logits(open_checkpoint(tmp_path / "meta"), 2, by), right, atol=1e-5)
    path = tmp_path / "meta" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    key = tensors["layers.0.attention.wk.weight"]
    half = key.view(shape.kv_heads, shape.head_dim // 2, 2, -1).transpose(1, 2)
    tensors["layers.0.attention.wk.weight"] = half.reshape(key.shape)
    torch.save(tensors, path)
    for by in ("hf", "meta"):
        wrong = logits(open_checkpoint(tmp_path / "meta"), 2, by)
        assert not torch.allclose(wrong, right, atol=1e-3)


def test_verify_runs_meta_checkpoints_by_hugging_face_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides Meta's: a wrong idea of their order, the same on both, would show."""
    hf = make_llama(tmp_path / "hf", GQA)
    for shards in (1, 2):
        convert(hf, tmp_path / f"m{shards}", Target("meta", shards=shards))
    lines = sluice("verify", tmp_path / "m1", tmp_path / "m2").splitlines()[-4:-1]
    assert [line.split(": ")[0] for line in lines] == ["agree"] * 3
    assert [line.split(": ")[2] for line in lines] == [
        f"{tmp_path}/m1 by Meta's arithmetic",
        f"{tmp_path}/m2 by Meta's arithmetic",
        f"{tmp_path}/m2 by Hugging Face's transformers",
    ]
    monkeypatch.setattr("conversion.tensors.stored_order", lambda rows, head_dim: rows)
    lines = sluice("verify", tmp_path / "m1", tmp_path / "m2", code=1).splitlines()[-4:-1]
    assert [line.split(": ")[0] for line in lines] == ["differs", "differs", "agree"]


def test_differences_come_in_the_models_order(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_llama(tmp_path / str(seed), GQA, seed)
    lines = sluice("verify", tmp_path / "1", tmp_path / "2", "--no-numeric", code=1).splitlines()
    differing = [line.split(": ")[1] for line in lines if line.startswith("differs: ")]
    order = list(open_checkpoint(tmp_path / "1").tensors)
    assert len(differing) > 20
    assert differing == [name for name in order if name in differing]


def test_private_memory_is_bounded_by_the_flag(tmp_path: Path) -> None:
    """A model of 150 MB through 8 MB of buffers: the peak beyond what starting took is a fraction of it."""
    shape = Shape(hidden=512, layers=2, heads=8, kv_heads=8, head_dim=64, ffn=2048, vocab=32000)
    make_llama(tmp_path / "hf", shape)
    make_llama(tmp_path / "small", MHA)
    program = (
        "import sys, resource, re\n"
        "from pathlib import Path\n"
        "from conversion.plan import Target\n"
        "from conversion.job import Options\n"
        "from tests.conversion.helpers import convert\n"
        "def private():\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', text)[1]) // 1024\n"
        "class Watch:\n"
        "    peak = 0\n"
        "    def start(self, *_): pass\n"
        "    def finish(self, *_): pass\n"
        "    def advance(self, *_): self.peak = max(self.peak, private())\n"
        "root = Path(sys.argv[1])\n"
        "for how in ('sluice', 'meta'):\n"
        "    options = Options(max_memory=8 << 20, jobs=2)\n"
        "    convert(root / 'small', root / f'warm-{how}', Target(how, tp=2, shards=2), options)\n"
        "    before, watch = private(), Watch()\n"
        "    convert(root / 'hf', root / how, Target(how, tp=2, shards=2), options, progress=watch)\n"
        "    print(watch.peak - before)\n"
    )
    run = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    grown = [int(line) for line in result.stdout.split()]
    assert len(grown) == 2
    assert max(grown) < 32, f"MB of private memory: {grown}"


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("missing", [(1,), (3,), (0, 2, 3)])
def test_inspect_names_the_shards_that_are_missing(
    tmp_path: Path, has_manifest: bool, missing: tuple[int, ...]
) -> None:
    convert(make_llama(tmp_path / "hf", MHA), tmp_path / "m", Target("meta", shards=4))
    names = [f"consolidated.{number:02}.pth" for number in missing]
    for name in [*names, *([] if has_manifest else ["manifest.json"])]:
        (tmp_path / "m" / name).unlink()
    printed = sluice("inspect", tmp_path / "m", code=1)
    listed = ", ".join([f"{tmp_path}/m/{names[0]}", *names[1:]])
    assert printed.startswith(
        f"sluice: error: {listed}: missing: the model is in 4 shards, 00 to 03: copy or"
    )


def test_all_files_that_an_index_or_a_manifest_names_are_missed(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA, shard_bytes=200_000)
    convert(hf, tmp_path / "s", Target("sluice", tp=2, pp=2))
    gone = sorted(hf.glob("model-*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    assert f"{gone[0]}, {gone[1].name}: missing: model.safetensors.index.json names" in sluice(
        "inspect", hf, code=1
    )
    for path in (tmp_path / "s" / "tp1-of-2").iterdir():
        path.unlink()
    printed = sluice("inspect", tmp_path / "s", code=1)
    assert "s/tp1-of-2/pp0-of-2.safetensors, tp1-of-2/pp1-of-2.safetensors: missing: manifest.json" in printed


def test_a_missing_params_json_is_asked_for_with_what_else_is_missing(tmp_path: Path) -> None:
    convert(make_llama(tmp_path / "hf", MHA), tmp_path / "m", Target("meta", shards=2))
    (tmp_path / "m" / "params.json").unlink()
    printed = sluice("inspect", tmp_path / "m", code=1)
    assert f"{tmp_path}/m/params.json: missing: " in printed
    assert "copy or download it, and tokenizer.model with it, from where consolidated.*.pth are" in printed
    (tmp_path / "m" / "tokenizer.model").touch()
    printed = sluice("inspect", tmp_path / "m", code=1)
    assert "copy or download it, from where consolidated.*.pth are from" in printed


def test_convert_says_how_to_serve_or_what_is_missing_for_it(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    printed = sluice("convert", hf, tmp_path / "one", "--to", "sluice")
    assert "warning: there is neither tokenizer.json nor tokenizer.model" in printed
    assert "serve it with" not in printed
    (hf / "tokenizer.json").write_text("{}")
    printed = sluice("convert", hf, tmp_path / "two", "--to", "sluice")
    assert printed.endswith(f"serve it with: sluice serve {tmp_path}/two\n")
    assert "warning" not in printed
    printed = sluice("convert", hf, tmp_path / "three", "--to", "meta")
    assert "serve it with" not in printed


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", GQA)
    printed = sluice("inspect", hf / "model.safetensors", code=1)
    assert "model.safetensors: is a file: give the directory that it lies in" in printed


@pytest.mark.parametrize(
    "command", [["inspect", "x"], ["verify", "x", "y"], ["convert", "x", "y", "--to", "hf"]]
)
def test_interrupted_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("examine", "open_checkpoint"):
        monkeypatch.setattr(f"conversion.main.{name}", interrupted)
    assert sluice(*command, code=130) == "sluice: error: interrupted, and nothing was written\n"


def test_a_target_that_is_there_is_refused_before_checksums_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(make_llama(tmp_path / "hf", MHA), tmp_path / "m", Target("meta"))
    monkeypatch.setattr("conversion.main.check_source", lambda *_: pytest.fail("has read it all"))
    assert "hf: is there already" in sluice("convert", tmp_path / "m", tmp_path / "hf", "--to", "hf", code=1)
