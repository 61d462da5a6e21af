"""The accelerate engine: where it puts modules, offloading to disk, and a real group of one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines import accelerate_map
from engines.accelerate_map import AccelerateEngine
from engines.base import UnsupportedModel
from engines.config import ConfigError, ModelConfig, load
from engines.models import hf
from engines.models.checkpoint import read_header
from engines.models.hf_inspect import inspect_model
from engines.runtime.mesh import Mesh
from engines.wire import Generate, SamplingParams
from tests.engines.driver import generate
from tests.engines.harness import Group, StartFailed, running
from tests.engines.models.hf_models import make_hf
from tests.engines.reference import hf_pooled, pooled_of, vector_of
from tests.engines.runtime.in_process import InProcess

CPU = torch.device("cpu")
NUM_LAYERS, NUM_TOKENS = 4, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen3"
    return make_hf(directory, "qwen3", num_hidden_layers=NUM_LAYERS, tie_word_embeddings=True)


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(2, 131, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Greedy tokens of `generate` after each of prompts(16)."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    how = {"do_sample": False, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS, "eos_token_id": []}
    tokens = []
    for prompt in prompts(16):
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


def config_of(model: Path, **changes: object) -> ModelConfig:
    settings = {"model_name": "m", "served_model_names": ("m",), "model_path": str(model)}
    fixed = {"engine": "accelerate", "parallel_type": "custom", "dtype": "float32", "startup_timeout": 60}
    return ModelConfig(**settings | fixed | changes)


def engine_of(model: Path, **changes: object) -> AccelerateEngine:
    return AccelerateEngine(config_of(model, **changes), Mesh(0, 1, 1, CPU), lambda *_: None)


def size_of(model: Path) -> int:
    return (model / "model.safetensors").stat().st_size


def offloaded(engine: AccelerateEngine) -> set[str]:
    """Names of parameters that are not in memory between steps."""
    return {name for name, p in engine.model.named_parameters() if p.device.type == "meta"}


MAPS = {
    "disk": {"device_map": (("", "disk"),)},
    "one layer": {"device_map": (("model.layers.2", "disk"), ("", "cpu"))},
    "all but one layer": {"device_map": (("model.layers", "disk"), ("model.layers.0", "cpu"), ("", "cpu"))},
}


@pytest.mark.parametrize("changes", MAPS.values(), ids=MAPS)
def test_what_is_on_disk_is_read_each_step(
    changes: dict[str, object], model: Path, expected: list[list[int]]
) -> None:
    before = sorted(path.name for path in model.iterdir())
    engine = engine_of(model, **changes)
    assert offloaded(engine)
    assert generate(engine, prompts(16)[:4], NUM_TOKENS) == expected[:4]
    assert engine.kv_spec.devices == (CPU,) * NUM_LAYERS
    assert offloaded(engine)
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize("changes", [{}, *MAPS.values()], ids=["in memory", *MAPS])
def test_a_model_stored_without_its_head_is_pooled(
    changes: dict[str, object], model: Path, tmp_path: Path
) -> None:
    """As Qwen3-Embedding is: under the base model's names, the head being the embedding."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    reference.base_model.save_pretrained(tmp_path, max_shard_size="200KB")
    names = [name for file in tmp_path.glob("*.safetensors") for name in read_header(file)]
    assert "layers.0.self_attn.q_proj.weight" in names
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    prompt = prompts(4)[3]
    (ended,) = InProcess(engine_of(tmp_path, **changes)).run([pooled_of("a", prompt, "last")])
    found = vector_of(ended.embedding)
    assert (found - hf_pooled(reference, prompt, "last")).abs().max().item() < 1e-5


def test_only_the_named_layer_is_offloaded(model: Path) -> None:
    names = offloaded(engine_of(model, **MAPS["one layer"]))
    assert {name.rsplit(".", 3)[0] for name in names if "proj" in name} == {"model.layers.2"}


def test_a_limit_on_main_memory_sends_the_rest_to_disk(model: Path, expected: list[list[int]]) -> None:
    engine = engine_of(model, max_memory=(("cpu", size_of(model) * 3 // 4),))
    names = offloaded(engine)
    in_memory = {name for name, _ in engine.model.named_parameters()} - names
    assert names, "the limit is below the model's size"
    assert in_memory, "the limit holds more than one layer"
    assert generate(engine, prompts(16)[:4], NUM_TOKENS) == expected[:4]


def test_without_limits_all_is_in_memory(model: Path) -> None:
    for policy in ("auto", "balanced", "balanced_low_0", "sequential"):
        assert not offloaded(engine_of(model, device_map=policy))
    assert not offloaded(engine_of(model, max_memory=(("cpu", 1 << 30),)))


def test_weights_are_converted_as_they_come_from_disk(model: Path) -> None:
    engine = engine_of(model, dtype="bfloat16", **MAPS["disk"])
    assert engine.kv_spec.dtype == torch.bfloat16
    in_memory = engine_of(model, dtype="bfloat16")
    batch = prompts(16)[:2]
    assert generate(engine, batch, 2) == generate(in_memory, batch, 2)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ((("model.layer", "cpu"), ("", "cpu")), r"deviceMap: model\.layer: .*no such module.*model\.layers"),
        ((("model.layers", "cpu"),), r"deviceMap: model\.embed_tokens\.weight: no entry covers it"),
        ((("", "cuda:99"),), r"deviceMap: .*cuda:99 is not there"),
    ],
)
def test_a_wrong_map_is_refused(device_map: object, message: str, model: Path) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        engine_of(model, device_map=device_map)


def test_a_limit_for_a_device_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"maxMemory: cuda:99 is not there"):
        engine_of(model, max_memory=(("cuda:99", 1 << 30),))


class FakeCuda:
    """The part of torch.cuda that placement asks: two devices of so many bytes."""

    def __init__(self, total_memory: int) -> None:
        self.total_memory = total_memory

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, _: int) -> FakeCuda:
        return self


def layers_by_device(model: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> dict[int | str, int]:
    """How many layers each of two devices gets."""
    found = inspect_model(model, None)
    made = hf.build_empty(found, torch.float32)
    total = int(size_of(model) / 0.9 / 0.75)  # after both shares, the whole model fits on one
    monkeypatch.setattr(accelerate_map.torch, "cuda", FakeCuda(total))
    device_map = accelerate_map.place(made, config_of(model, device="cuda", **changes))
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(NUM_LAYERS)]
    return Counter(accelerate_map._lookup(device_map, name) for name in names)


def test_policies_place_over_several_devices(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    balanced = layers_by_device(model, monkeypatch, device_map="auto")
    assert set(balanced) == {0, 1}
    sequential = layers_by_device(model, monkeypatch, device_map="sequential")
    assert sequential[0] > balanced[0]
    low = layers_by_device(model, monkeypatch, device_map="balanced_low_0")
    assert low[0] <= balanced[0]
    tight = layers_by_device(model, monkeypatch, max_memory=(("cuda:0", 150_000), ("cuda:1", 150_000)))
    assert tight["cpu"] > 0, "what the devices do not hold stays in main memory"


def test_a_missing_package_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate_map, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModel, match=r"pip install -e '\.\[accelerate\]'"):
        engine_of(model)


def test_it_is_one_process(model: Path) -> None:
    with pytest.raises(UnsupportedModel, match="parallelType: custom"):
        AccelerateEngine(config_of(model, tp_size=2), Mesh(0, 2, 1, CPU), lambda *_: None)


def test_a_layers_keys_and_values_are_where_it_computes() -> None:
    """Hooks of Accelerate decide, the nearest first; without one, the parameters do."""
    outer = torch.nn.Module()
    outer.block = torch.nn.Module()
    outer.block.attention = torch.nn.Linear(2, 2, device="meta")
    assert hf.execution_device(outer, "block.attention") == torch.device("meta")
    outer.block._hf_hook = FakeHook(1)
    assert hf.execution_device(outer, "block.attention") == torch.device("cuda", 1)
    outer.block.attention._hf_hook = FakeHooks(FakeHook(None), FakeHook("cpu"))
    assert hf.execution_device(outer, "block.attention") == CPU


class FakeHook:
    """The part of AlignDevicesHook that is read."""

    def __init__(self, execution_device: int | str | None) -> None:
        self.execution_device = execution_device


class FakeHooks:
    """As Accelerate's SequentialHook holds several."""

    def __init__(self, *hooks: FakeHook) -> None:
        self.hooks = hooks


def test_the_yaml_of_custom_drives_it(tmp_path: Path) -> None:
    file = tmp_path / "model-config.yaml"
    file.write_text(
        "parallelType: custom\n"
        "parallelLevel: 2\n"
        "maxMemory: {cpu: 8GiB, 'cuda:1': 3GB}\n"
        "handler:\n"
        "  model_path: m\n"
        "  device_map: {model.layers.0: cuda:0, model: cuda:1, lm_head: disk}\n"
        "  low_cpu_mem_usage: true\n"
        "  max_length: 50\n"
    )
    config = load(file, num_gpus=2)
    assert (config.engine, config.custom_devices, config.world_size) == ("accelerate", 2, 1)
    assert config.device_map == (("model.layers.0", "cuda:0"), ("model", "cuda:1"), ("lm_head", "disk"))
    assert config.max_memory == (("cpu", 8 << 30), ("cuda:1", 3_000_000_000))
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    assert [warning.split(": ")[1] for warning in config.warnings] == [
        "maxMemory",  # beside a map that says all
        "handler.low_cpu_mem_usage",
        "handler.max_length",
    ]


def test_hugging_faces_own_spelling_of_devices_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model-config.yaml"
    file.write_text(
        "parallelType: custom\nmaxMemory: {0: 10GB, '1': 1GB, cpu: 1GB}\n"
        "deviceMap: {model: 1, lm_head: '0'}\n"
    )
    config = load(file, num_gpus=2)
    assert config.max_memory == (("cuda:0", 10_000_000_000), ("cuda:1", 10**9), ("cpu", 10**9))
    assert config.device_map == (("model", "cuda:1"), ("lm_head", "cuda:0"))
    file.write_text("parallelType: custom\nhandler: {device_map: 0}\n")
    assert load(file, num_gpus=2).device_map == (("", "cuda:0"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("deviceMap: balance", r":2: deviceMap: is the text 'balance'; did you mean 'balanced'\?"),
        ("deviceMap: [cpu]", r":2: deviceMap: is a list; allowed: auto, balanced"),
        ("deviceMap: {model: gpu}", r":2: deviceMap\.model: is the text 'gpu'; allowed: cpu, disk, cuda:0"),
        ("maxMemory: 8GiB", r":2: maxMemory: is the text '8GiB'; allowed: a mapping"),
        ("maxMemory: {disk: 8GiB}", r":2: maxMemory\.disk: is not a device whose memory"),
        ("maxMemory: {1000: 8GiB}", r":2: maxMemory\.1000: is not a device whose memory.*cuda:0 \(or 0\)"),
        ("maxMemory: {0: 8GiB, 'cuda:0': 8GiB}", r":2: maxMemory: names a device twice"),
        ("deviceMap: {model: true}", r":2: deviceMap\.model: is the boolean true; allowed: cpu"),
        ("maxMemory: {cpu: lots}", r":2: maxMemory\.cpu: is the text 'lots'; allowed: bytes"),
        ("maxMemory: {cpu: {a: 1}}", r":2: maxMemory\.cpu: is a mapping"),
    ],
)
def test_a_mistake_names_its_line_and_what_is_allowed(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model-config.yaml"
    file.write_text(f"parallelType: custom\n{line}\n")
    with pytest.raises(ConfigError, match=rf"{file}{message}"):
        load(file, num_gpus=0)


@pytest.fixture(scope="module")
def group(model: Path) -> Iterator[Group]:
    """A real one, half of it on disk, with K/V for few of the sequences at a time."""
    config = config_of(
        model,
        device_map=(("model.layers.1", "disk"), ("model.layers.3", "disk"), ("", "cpu")),
        max_num_batched_tokens=64,
        kv_cache_memory=24 * 16 * 2 * NUM_LAYERS * 2 * 16 * 4,
    )
    with running(config) as group:
        yield group


def test_a_group_with_layers_on_disk(group: Group, expected: list[list[int]]) -> None:
    greedy = SamplingParams(temperature=0.0)
    requests = [
        Generate(id=str(i), prompt_ids=prompt, max_tokens=NUM_TOKENS, sampling=greedy, ignore_eos=True)
        for i, prompt in enumerate(prompts(16))
    ]
    assert [ended.token_ids for ended in group.run(requests)] == expected
    assert group.info.engine == "accelerate"
    assert group.info.num_blocks == 24


def test_an_unsupported_model_ends_the_group_for_good(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with (
        pytest.raises(
            StartFailed, match=r"config\.json: model_type \('mamba'\) keeps a recurrent"
        ) as failure,
        running(config_of(tmp_path)),
    ):
        pass
    assert failure.value.is_permanent
