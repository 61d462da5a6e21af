"""`sluice check`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engines.config import load
from gateway import check, check_show, serve
from gateway.options import Options
from gateway.workers.placement import DoesNotFit
from tests.engines.test_config import LEVEL, PIPPY

NATIVE = """\
parallelType: tp
minWorkers: 2
deviceType: gpu
torchrun:
  nproc-per-node: 4
  OMP_NUMBER_THREADS: 2
"""


def write(home: Path, text: str) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    path = home / "model-config.yaml"
    path.write_text(text)
    return path


def make_model(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8}
    (home / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **sizes}))
    (home / "model.safetensors").touch()


def test_prints_configuration_devices_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run([write(tmp_path / "big", NATIVE)], gpus=8) == 0
    out, err = capsys.readouterr()
    lines = {line.strip() for line in out.splitlines()}
    assert {" ".join(line.split()) for line in lines} >= {
        "modelName big",
        "tensorParallel 4",
        "minWorkers 2",
        "torchrun.OMP_NUMBER_THREADS 2",
        "engine native",
        "chatTemplate -",
        "pooling -",
        "deviceIds -",
        "gpuMemoryShare 0.9",
        "big/0 0, 1, 2, 3",
        "big/1 4, 5, 6, 7",
    }
    assert {"CUDA_VISIBLE_DEVICES=4,5,6,7 \\", "OMP_NUM_THREADS=2 \\"} <= lines
    (command,) = (line for line in lines if line.endswith("-m engines.worker --run-dir RUN_DIR"))
    assert command.startswith(f"{sys.executable} -m torch.distributed.run --nnodes 1 --nproc-per-node 4 ")
    assert "kvCacheMemory" not in out  # that is for CPU
    assert "not checked with --gpus" in out
    assert err == ""


def test_sizes_are_shown_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.run([write(tmp_path, "deviceType: cpu\n")], gpus=0) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  kv" in line)
    assert shown["kvCacheMemory"] == "1 GiB per rank"
    assert [check_show.size(n) for n in (12, 1 << 20, 3 << 29)] == ["12 bytes", "1 MiB", "1.5 GiB"]


def test_devices_are_assigned_over_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / "a", NATIVE), write(tmp_path / "b", LEVEL)]
    assert check.run(files, gpus=12) == 0
    out = capsys.readouterr().out
    assert [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  b/0  ")] == [
        ["b/0", "2, 3, 4, 5"]
    ]
    assert check.run(files, gpus=8) == 2
    assert "a/1: needs 4 GPUs, 0 are free" in capsys.readouterr().err


def test_wrong_configurations_are_all_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / "a", "dtype: fp64\n"), write(tmp_path / "b", "parallelLevel: 2\nx: 1\n")]
    assert check.run(files, gpus=8) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in err] == [f"{files[0]}:1", f"{files[1]}:1", f"{files[1]}:2"]


def test_unknown_engine_is_a_wrong_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PIPPY.replace('parallelType: "pp"', 'parallelType: "pp"\nengine: absent_engine')
    assert check.run([write(tmp_path, text)], gpus=8) == 1
    assert "absent_engine" in capsys.readouterr().err


def test_documented_pipeline_resolves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from engines import registry

    code = check.run([write(tmp_path, PIPPY)], gpus=4)
    out, err = capsys.readouterr()
    assert "--nproc-per-node 4" in out
    assert code == (0 if "pipeline" in registry.names() else 2)
    assert (code == 2) == ("engine 'pipeline' is not in this version" in err)


def test_a_gpu_that_is_not_there_is_the_machines_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.config_devices.num_gpus_present", lambda: 0)
    make_model(tmp_path)
    assert check.run([write(tmp_path, "deviceType: gpu\n")], gpus=None) == 2
    assert "deviceType: cpu" in capsys.readouterr().err


def test_missing_model_is_the_machines_fault_unless_another_is_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "deviceType: cpu\nhandler: {model_path: absent}\nchatTemplate: absent.jinja\n")
    assert check.run([file], gpus=0) == 0
    capsys.readouterr()
    assert check.run([file], gpus=None) == 2
    err = capsys.readouterr().err
    assert f"no model at {tmp_path / 'absent'}" in err
    assert f"{tmp_path / 'absent.jinja'}: no such file" in err


def test_everything_wrong_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.config_devices.num_gpus_present", lambda: 0)
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    text = "deviceType: gpu\nparallelType: custom\nhandler: {model_path: absent}\n"
    assert check.run([write(tmp_path, text)], gpus=None) == 2
    err = capsys.readouterr().err
    assert "needs 1 GPU, 0 are free" in err
    assert "no model at" in err
    assert "pip install -e '.[accelerate]'" in err


def test_a_model_that_cannot_be_divided_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path)
    text = "deviceType: cpu\nparallelType: {}\nparallelLevel: 99\n"
    for kind, words in (("tp", "8 attention heads"), ("pp", "4 layers")):
        file = write(tmp_path, text.format(kind))
        assert check.run([file], gpus=None) == check.run([file], gpus=0) == 2
        err = capsys.readouterr().err.splitlines()
        assert [line.startswith(f"{file}:3: ") and words in line for line in err] == [True, True]


def test_what_the_engine_would_refuse_is_refused_by_check_and_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: name)
    make_model(tmp_path)
    (tmp_path / "ds.json").write_text('{"replace_with_kernel_inject": true}')
    file = write(tmp_path, "deviceType: cpu\ndeepspeed: {config: ds.json}\n")
    assert check.run([file], gpus=None) == 2
    words = capsys.readouterr().err
    assert words.startswith(
        f"{file}:2: kernel injection ({tmp_path / 'ds.json'}): deviceType ('cpu') has no injected kernels"
    )
    with pytest.raises(DoesNotFit) as refused:
        serve.run([load(file)], Options(port=0))
    assert str(refused.value) == words.strip()


def test_the_engine_that_serves_in_the_place_of_another_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: name)
    make_model(tmp_path)
    (tmp_path / "ds.json").write_text('{"replace_with_kernel_inject": true}')
    file = write(tmp_path, "deviceType: cpu\ndeepspeed:\n  config: ds.json\n  fallback: autotp\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert check.run([file], gpus=None) == 0
    out = capsys.readouterr().out
    assert re.search(r"engine +deepspeed_tp\n", out)
    assert "batchSize" not in out
    assert (
        f"warning: {file}:4: AutoTP serves instead of kernel injection ({tmp_path / 'ds.json'}): dev" in out
    )


@pytest.mark.parametrize(
    ("settings", "content"),
    [
        ("dtype: float16\n", "{}"),
        ("", '{"dtype": "torch.half"}'),
        ("", '{"dtype": "fp16", "replace_with_kernel_inject": true}'),
    ],
    ids=["yaml", "json", "fallback"],
)
def test_a_type_that_deepspeed_does_not_serve_on_cpus_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: str,
    content: str,
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: name)
    make_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "ds.json").write_text(content)
    file = write(tmp_path, f"{settings}deviceType: cpu\ndeepspeed: {{config: ds.json, fallback: autotp}}\n")
    assert check.run([file], gpus=None) == 2
    assert re.match(r"\S+:\d: DeepSpeed does not serve float16 on CPUs: set dtype", capsys.readouterr().err)


def test_a_missing_deepspeed_file_is_said_to_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: name)
    make_model(tmp_path)
    file = write(tmp_path, "deviceType: cpu\ndeepspeed: {config: no.json}\n")
    assert check.run([file], gpus=None) == 2
    out, err = capsys.readouterr()
    assert "warning" not in out
    assert err.startswith(f"{file}:2: {tmp_path / 'no.json'}: no such file; which engine serves, whether its")


def test_devices_that_are_not_there_have_their_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "deviceType: gpu\nmodelName: m\ndeviceIds: [5]\n")
    assert check.run([file], gpus=2) == 2
    assert capsys.readouterr().err.startswith(f"{file}:3: m/0: deviceIds names [5], but the machine has 2")


def test_a_directory_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path)
    assert check.run([tmp_path, tmp_path], gpus=0) == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}: is given twice; remedy: give it once")


def test_a_model_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.config_devices.num_gpus_present", lambda: 0)
    make_model(tmp_path)
    assert check.run([tmp_path], gpus=None) == 0


def test_names_may_not_clash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "deviceType: cpu\nmodelName: same\n"
    assert check.run([write(tmp_path / "a", text), write(tmp_path / "b", text)], gpus=0) == 1
    assert "'same' is also the name of" in capsys.readouterr().err


def test_needs_no_torch() -> None:
    code = "import sys; from gateway import check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_metas_checkpoint_is_answered_with_the_command_that_converts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "consolidated.00.pth").touch()
    assert check.run([tmp_path], gpus=None) == 2
    command = f"sluice convert {tmp_path} {tmp_path}-sluice --to sluice"
    assert f"run `{command}`, and serve {tmp_path}-sluice" in capsys.readouterr().err
