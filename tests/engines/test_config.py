"""What a correct model-config.yaml comes to. The documents are TorchServe's documented ones, unchanged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engines.config import ModelConfig, load
from engines.config_errors import ConfigError

SCHEMA = """\
# frontend settings
minWorkers: 1
maxWorkers: 1
parallelType: "pp"     # Options: "pp", "tp", "pptp", "custom"
deviceType: "gpu"
torchrun:
    nproc-per-node: 4  # Number of GPUs / processes per worker
"""
LEVEL = """\
minWorkers: 1
maxWorkers: 1
parallelType: "tp"
deviceType: "gpu"
parallelLevel: 4        # Number of GPUs (mutually exclusive with nproc-per-node)
deviceIds: [2, 3, 4, 5] # Explicit GPU IDs (optional)
"""
PIPPY = """\
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 200
responseTimeout: 300
parallelType: "pp"
deviceType: "gpu"
torchrun:
    nproc-per-node: 4
pippy:
    rpc_timeout: 1800
    model_type: "HF"
    chunks: 1
    input_names: ["input_ids"]
handler:
    model_path: "/path/to/model"
    max_length: 50
"""
DEEPSPEED = """\
minWorkers: 1
maxWorkers: 1
maxBatchDelay: 100
responseTimeout: 120
parallelType: "tp"
deviceType: "gpu"
torchrun:
    nproc-per-node: 4
deepspeed:
    config: ds-config.json
handler:
    model_path: "/path/to/model"
    max_length: 80
"""
DOCUMENTED = {"schema": SCHEMA, "level": LEVEL, "pippy": PIPPY, "deepspeed": DEEPSPEED}
CONFIGS = Path(__file__).parents[2] / "configs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model-config.yaml"
    path.write_text(text)
    return path


def loaded(tmp_path: Path, text: str, **flags: object) -> ModelConfig:
    return load(write(tmp_path, text), flags, num_gpus=0)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_example_loads_unchanged(tmp_path: Path, name: str) -> None:
    config = loaded(tmp_path, DOCUMENTED[name])
    assert config.device == "cuda"
    assert config.world_size == config.devices_per_group == 4
    assert config.num_replicas == 1


def test_documented_examples_resolve(tmp_path: Path) -> None:
    pippy = loaded(tmp_path, PIPPY)
    assert (pippy.engine, pippy.pp_size, pippy.tp_size, pippy.pipeline_chunks) == ("pipeline", 4, 1, 1)
    assert (pippy.response_timeout, pippy.max_batch_delay, pippy.model_path) == (300.0, 0.2, "/path/to/model")
    idle = "pippy.chunks: is 1, so 3 of 4 stages have no work at any time: remove it, or set it to 4"
    assert any(idle in line for line in pippy.warnings)
    enough = loaded(tmp_path, PIPPY.replace("chunks: 1", "chunks: 4"))
    assert len(enough.warnings) == len(pippy.warnings) - 1
    level = loaded(tmp_path, LEVEL)
    assert (level.engine, level.tp_size, level.device_ids) == ("native", 4, (2, 3, 4, 5))
    deepspeed = loaded(tmp_path, DEEPSPEED)
    assert deepspeed.engine == "deepspeed_tp"
    assert deepspeed.deepspeed
    assert deepspeed.deepspeed.config == str(tmp_path / "ds-config.json")


def test_blocks_that_flash_attention_cannot_read_are_warned_of(tmp_path: Path) -> None:
    for size, device, is_warned in ((16, "gpu", True), (512, "gpu", False), (16, "cpu", False)):
        text = f"kvBlockSize: {size}\ndeviceType: {device}\n"
        warnings = load(write(tmp_path, text), num_gpus=1).warnings
        assert [":1: kvBlockSize: is 16, no multiple of 256" in line for line in warnings] == [
            True
        ] * is_warned


def test_keys_without_effect_are_listed_with_place_and_reason(tmp_path: Path) -> None:
    warnings = loaded(tmp_path, PIPPY.replace("chunks: 1", "chunks: 4")).warnings
    keys = [re.match(r".*model-config\.yaml:\d+: ([\w.]+): has no effect: .+", line) for line in warnings]
    assert [match[1] for match in keys if match] == [
        "maxBatchDelay",
        "pippy.rpc_timeout",
        "pippy.model_type",
        "pippy.input_names",
        "handler.max_length",
    ]
    assert len(warnings) == 5


@pytest.mark.parametrize("name", DOCUMENTED)
def test_json_round_trip(tmp_path: Path, name: str) -> None:
    config = loaded(tmp_path, DOCUMENTED[name])
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_loads_without_a_warning(path: Path) -> None:
    config = load(path, num_gpus=0)
    assert config.warnings == ()
    assert config.model_path == str(CONFIGS.parent / "gateway" / "demo_model")


def test_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, "modelName: m\n")
    assert (config.model_name, config.served_model_names, config.model_path) == ("m", ("m",), str(tmp_path))
    assert (config.engine, config.parallel_type, config.world_size, config.device) == (
        "native",
        "tp",
        1,
        "cpu",
    )
    assert (config.response_timeout, config.startup_timeout, config.job_queue_size) == (120.0, 120.0, 100)
    assert (config.max_num_seqs, config.kv_cache_memory, config.prefix_cache) == (256, 1 << 30, True)


def test_model_is_named_after_its_directory(tmp_path: Path) -> None:
    home = tmp_path / "my model"
    home.mkdir()
    assert loaded(home, "dtype: auto\n").model_name == "my-model"


def test_device_is_what_the_machine_has_unless_said(tmp_path: Path) -> None:
    path = write(tmp_path, "modelName: m\n")
    assert load(path, num_gpus=2).device == "cuda"
    assert load(path, num_gpus=0).device == "cpu"
    assert load(write(tmp_path, "deviceType: cpu\n"), num_gpus=2).device == "cpu"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("parallelType: TP\nparallelLevel: 4\n", ("tp", 4, 1, 4)),
        ("parallelType: tp\ntorchrun: {nproc-per-node: 4}\n", ("tp", 4, 1, 4)),
        ("parallelType: tp\ntensorParallel: 4\n", ("tp", 4, 1, 4)),
        ("parallelType: tp\ntorchrun: {OMP_NUMBER_THREADS: 2}\n", ("tp", 1, 1, 1)),
        ("parallelType: pp\nparallelLevel: 4\n", ("pp", 1, 4, 4)),
        ("parallelType: pptp\nparallelLevel: 8\ntensorParallel: 2\n", ("pptp", 2, 4, 8)),
        ("parallelType: pptp\nparallelLevel: 8\npipelineParallel: 2\n", ("pptp", 4, 2, 8)),
        ("parallelType: pptp\ntensorParallel: 2\npipelineParallel: 2\n", ("pptp", 2, 2, 4)),
        ("parallelType: custom\nparallelLevel: 4\n", ("custom", 1, 1, 4)),
        ("parallelType: custom\ntorchrun: {nproc-per-node: 4}\n", ("custom", 1, 1, 4)),
        ("parallelType: custom\ndeviceIds: [1, 2, 3]\n", ("custom", 1, 1, 3)),
        ("parallelType: custom\nparallelLevel: 2\nasyncCommunication: true\n", ("custom", 1, 1, 2)),
    ],
)
def test_sizes(tmp_path: Path, text: str, sizes: tuple[str, int, int, int]) -> None:
    config = loaded(tmp_path, text)
    assert (config.parallel_type, config.tp_size, config.pp_size, config.devices_per_group) == sizes
    assert config.world_size == (1 if sizes[0] == "custom" else sizes[3])


def test_custom_takes_all_the_machine_has_between_its_replicas(tmp_path: Path) -> None:
    path = write(tmp_path, "parallelType: custom\nminWorkers: 2\n")
    assert load(path, num_gpus=8).devices_per_group == 4


@pytest.mark.parametrize(
    ("content", "engine"),
    [
        ({"replace_with_kernel_inject": True, "tensor_parallel": {"tp_size": 2}}, "deepspeed_inject"),
        ({"kernel_inject": True, "mp_size": 2}, "deepspeed_inject"),
        ({"replace_with_kernel_inject": False}, "deepspeed_tp"),
        ({}, "deepspeed_tp"),
    ],
)
def test_deepspeed_file_chooses_the_engine(tmp_path: Path, content: dict[str, object], engine: str) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    text = "parallelType: tp\nparallelLevel: 2\ndeepspeed: {config: ds.json}\n"
    assert loaded(tmp_path, text).engine == engine
    assert loaded(tmp_path, text + "engine: native\n").engine == "native"


@pytest.mark.parametrize(
    ("written", "size"), [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("2GB", 2 * 10**9), (4 << 20, 4 << 20)]
)
def test_memory_sizes(tmp_path: Path, written: object, size: int) -> None:
    assert loaded(tmp_path, f"kvCacheMemory: {written}\n").kv_cache_memory == size


def test_threads_are_the_cores_divided_by_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert loaded(tmp_path, "parallelType: tp\nparallelLevel: 2\nminWorkers: 2\n").omp_threads == 4
    assert loaded(tmp_path, "parallelType: tp\ntorchrun: {OMP_NUMBER_THREADS: 3}\n").omp_threads == 3
    assert loaded(tmp_path, "parallelType: tp\nparallelLevel: 64\n").omp_threads == 1
    assert not loaded(tmp_path, "modelName: m\n").is_omp_stated


def test_a_job_ticket_means_that_nothing_waits(tmp_path: Path) -> None:
    assert loaded(tmp_path, "useJobTicket: true\njobQueueSize: 7\n").job_queue_size == 0
    assert loaded(tmp_path, "jobQueueSize: 7\n").job_queue_size == 7
    assert loaded(tmp_path, "jobQueueSize: 0\n").job_queue_size == 100  # TorchServe's 0 is its default


def test_handler_keys_that_act(tmp_path: Path) -> None:
    text = "handler: {model_path: m, max_seq_len: 512, max_batch_size: 8, chat_template: t.jinja}\n"
    config = loaded(tmp_path, text)
    assert (config.model_path, config.chat_template) == (str(tmp_path / "m"), str(tmp_path / "t.jinja"))
    assert (config.max_model_len, config.max_num_seqs, config.warnings) == (512, 8, ())


def test_unknown_handler_key_warns_with_the_nearest(tmp_path: Path) -> None:
    (warning,) = loaded(tmp_path, "modelName: m\nhandler:\n  model_dir_path: x\n").warnings
    assert "model-config.yaml:3: handler.model_dir_path" in warning
    assert "did you mean 'model_path'?" in warning


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_dtype_of_the_handler_is_told_where_it_acts(tmp_path: Path, key: str) -> None:
    config = loaded(tmp_path, f"modelName: m\nhandler:\n  {key}: bfloat16\n")
    (warning,) = config.warnings
    assert f":3: handler.{key}: has no effect: write dtype: at the top level" in warning
    assert config.dtype == "auto"


def test_ranks_that_become_devices_of_one_process_are_warned_of(tmp_path: Path) -> None:
    text = "deviceType: gpu\nparallelType: custom\n{}: {}\n"
    (warning,) = loaded(tmp_path, text.format("torchrun", "{nproc-per-node: 2}")).warnings
    assert ":3: torchrun.nproc-per-node: is 2, which for parallelType custom means one process" in warning
    assert loaded(tmp_path, text.format("torchrun", "{nproc-per-node: 1}")).warnings == ()
    assert loaded(tmp_path, text.format("parallelLevel", "2")).warnings == ()


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    text = "parallelType: pp\ntorchrun: {nproc-per-node: 4}\ndtype: float32\nhandler: {model_path: a}\n"
    config = loaded(tmp_path, text, tp=2, dtype="bf16", max_model_len=64, model_name=None, modelPath="/b")
    assert (config.parallel_type, config.tp_size, config.pp_size) == ("tp", 2, 1)
    assert (config.dtype, config.max_model_len, config.model_path) == ("bfloat16", 64, "/b")
    assert loaded(tmp_path, text, tp=2, pp=2).parallel_type == "pptp"
    assert loaded(tmp_path, text, pp=2).pp_size == 2
    assert loaded(tmp_path, text, tp=1).world_size == 1
    assert loaded(tmp_path, "maxWorkers: 1\n", min_workers=3).num_replicas == 3
    assert loaded(tmp_path, text, **{"torchrun.nproc-per-node": 3}).pp_size == 3


def test_directory_needs_no_file(tmp_path: Path) -> None:
    config = ModelConfig.for_directory(tmp_path, num_gpus=0, tp=2, served_model_names=["a", "b"])
    assert (config.model_path, config.model_name) == (str(tmp_path), tmp_path.name)
    assert (config.tp_size, config.served_model_names, config.source) == (2, ("a", "b"), "")


def test_directory_with_a_file_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path, "modelName: named\n")
    config = ModelConfig.for_directory(tmp_path, num_gpus=0, dtype="float32")
    assert (config.model_name, config.dtype, config.source) == ("named", "float32", str(path))


def test_an_alias_stands_for_its_value(tmp_path: Path) -> None:
    assert loaded(tmp_path, "modelName: &n m\nservedModelNames: [*n, o]\n").served_model_names == ("m", "o")


def test_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        loaded(tmp_path, "modelName: m\n").model_name = "n"  # type: ignore[misc]


def test_a_pipeline_divides_its_layers_as_told_and_takes_prompts_in_smaller_pieces(tmp_path: Path) -> None:
    by_default = loaded(tmp_path, "parallelType: pp\nparallelLevel: 2\ndeviceType: cpu\n")
    assert (by_default.stage_split, by_default.max_num_batched_tokens) == ("work", 256)
    told = loaded(
        tmp_path, "parallelType: pp\nparallelLevel: 2\nstageSplit: [7, 7]\nmaxNumBatchedTokens: 9\n"
    )
    assert (told.stage_split, told.max_num_batched_tokens) == ((7, 7), 9)
    assert loaded(tmp_path, "parallelType: pp\nparallelLevel: 2\nstageSplit: BYTES\n").stage_split == "bytes"
    many = loaded(tmp_path, "parallelType: pp\nparallelLevel: 2\nmaxNumSeqs: 1000\ndeviceType: cpu\n")
    assert many.max_num_batched_tokens == 628
    (warning,) = loaded(tmp_path, "parallelType: tp\nparallelLevel: 2\nstageSplit: work\n").warnings
    assert "stageSplit: has no effect" in warning


def test_a_deepspeed_section_without_effect_has_none_on_the_type(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"dtype": "fp16"}')
    file = tmp_path / "model-config.yaml"
    file.write_text("parallelType: pp\nparallelLevel: 2\ndeepspeed: {config: ds.json}\n")
    config = load(file, num_gpus=0)
    assert (config.engine, config.dtype) == ("pipeline", "auto")


def test_embeddings_are_served_where_a_pooling_is_named(tmp_path: Path) -> None:
    assert loaded(tmp_path, "modelName: a\n").pooling is None
    assert loaded(tmp_path, "pooling: Mean\n").pooling == "mean"
    assert ModelConfig.for_directory(tmp_path / "no-file", num_gpus=0, pooling="last").pooling == "last"


def test_a_size_may_be_said_twice(tmp_path: Path) -> None:
    file = tmp_path / "model-config.yaml"
    file.write_text("parallelType: tp\nparallelLevel: 4\ntorchrun: {nproc-per-node: 4}\n")
    assert load(file, num_gpus=0).tp_size == 4


def test_rows_in_8_bits_are_the_default_and_named_where_they_are_not(tmp_path: Path) -> None:
    assert loaded(tmp_path, "modelName: it\n").int8_activations
    config = loaded(tmp_path, "int8Activations: false\ndeviceType: cpu\n")
    assert (config.int8_activations, config.warnings) == (False, ())
    for beside in ("deviceType: gpu", "engine: accelerate\nparallelType: custom", "deterministic: true"):
        device = "" if "deviceType" in beside else "\ndeviceType: cpu"
        warnings = loaded(tmp_path, f"int8Activations: true\n{beside}{device}\n").warnings
        assert any("int8Activations: has no effect" in warning for warning in warnings), beside


def test_prompts_may_double_a_step_on_a_cpu_and_what_is_told_elsewhere(tmp_path: Path) -> None:
    assert loaded(tmp_path, "deviceType: cpu\n").max_prompt_slowdown == 2
    assert loaded(tmp_path, "deviceType: gpu\n").max_prompt_slowdown is None
    assert loaded(tmp_path, "deviceType: gpu\nmaxPromptSlowdown: 1.5\n").max_prompt_slowdown == 1.5
    with pytest.raises(ConfigError, match=r"maxPromptSlowdown.*above 1"):
        loaded(tmp_path, "maxPromptSlowdown: 1\n")
    pipeline = "parallelType: pp\nparallelLevel: 2\nmaxPromptSlowdown: 3\n"
    (warning,) = loaded(tmp_path, pipeline).warnings
    assert "maxPromptSlowdown: has no effect" in warning
