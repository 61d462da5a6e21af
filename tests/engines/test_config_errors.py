"""Every mistake is named: file and line, key, what is allowed, the nearest match, the remedy; all at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.config import ConfigError, ModelConfig, Problem, load
from engines.config_schema import SECTIONS, TOP, Kind
from tests.engines.test_config import DOCUMENTED

PLACE = re.compile(r"^.*model-config\.yaml:\d+: ", re.DOTALL)


def refused(tmp_path: Path, text: str | bytes) -> list[str]:
    """The messages of the ConfigError that the document gives, each without its directory."""
    path = tmp_path / "model-config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, num_gpus=8)
    assert all(PLACE.match(str(problem)) for problem in caught.value.problems)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


FOOTGUNS = {
    "nproc without parallelType": (
        "minWorkers: 1\ntorchrun:\n  nproc-per-node: 4\n",
        ["model-config.yaml:3: torchrun.nproc-per-node", "without parallelType", "add parallelType: tp"],
    ),
    "a pooling that there is not": (
        "modelName: a\npooling: first\n",
        ["model-config.yaml:2: pooling", "'first'", "mean, last"],
    ),
    "parallelLevel without parallelType": (
        "parallelLevel: 4\n",
        ["model-config.yaml:1: parallelLevel", "pp, tp, pptp, custom", "add parallelType: tp"],
    ),
    "parallelLevel and nproc": (
        "parallelType: tp\nparallelLevel: 2\ntorchrun:\n  nproc-per-node: 4\n",
        [":2: parallelLevel", "torchrun.nproc-per-node", ":4", "remedy: keep"],
    ),
    "parallelType without a size": ("parallelType: pp\n", [":1: parallelType", "add parallelLevel: 2"]),
    "pptp without its division": (
        "parallelType: pptp\nparallelLevel: 4\n",
        [":1: parallelType", "4 ranks", "tensorParallel:"],
    ),
    "pptp with another product": (
        "parallelType: pptp\nparallelLevel: 8\ntensorParallel: 2\npipelineParallel: 2\n",
        ["tensorParallel 2 x pipelineParallel 2 = 4", "8 ranks"],
    ),
    "pptp that does not divide": (
        "parallelType: pptp\nparallelLevel: 4\ntensorParallel: 3\n",
        ["tensorParallel 3 x pipelineParallel 1 = 3", "4 ranks"],
    ),
    "pptp with more than there are": (
        "parallelType: pptp\nparallelLevel: 4\ntensorParallel: 8\n",
        ["exceeds the 4 ranks"],
    ),
    "tp of another size": (
        "parallelType: tp\nparallelLevel: 4\ntensorParallel: 2\n",
        [":3: tensorParallel", "parallelLevel (", ":2) is 4", "remove one"],
    ),
    "tp with stages": (
        "parallelType: tp\nparallelLevel: 4\npipelineParallel: 2\n",
        ["pipelineParallel", "write parallelType: pptp"],
    ),
    "unknown parallelType": ("parallelType: tpp\nparallelLevel: 2\n", ["did you mean 'tp'?", "pp, tp, pptp"]),
    "neuron": ("deviceType: neuron\n", [":1: deviceType", "remedy: give one of cpu, gpu"]),
    "several nodes": ("parallelType: tp\ntorchrun:\n  nnodes: 2\n", [":3: torchrun.nnodes", "several nodes"]),
    "deviceIds with a text": ("deviceIds: [0, one]\n", [":1: deviceIds", "the text 'one'"]),
    "deviceIds with a boolean": ("deviceIds: [0, true]\n", [":1: deviceIds", "the boolean true"]),
    "deviceIds twice": ("deviceIds: [1, 1]\n", ["names one twice"]),
    "negative deviceIds": ("deviceIds: [-1]\n", ["the integer -1, out of bounds", "0 or more"]),
    "too few deviceIds": (
        "parallelType: tp\nparallelLevel: 2\nminWorkers: 2\ndeviceIds: [2, 3, 4]\n",
        [":4: deviceIds", "2 workers x 2 devices = 4, but deviceIds names 3"],
    ),
    "deviceIds on a CPU": ("deviceType: cpu\ndeviceIds: [0]\n", ["deviceType is cpu"]),
    "fewer at most than at least": ("minWorkers: 2\nmaxWorkers: 1\n", [":2: maxWorkers", "minWorkers 2"]),
    "boolean for an integer": ("minWorkers: yes\n", ["the boolean true", "an integer, 1 to 1024"]),
    "text for an integer": ('minWorkers: "1"\n', ["the text '1'", "an integer"]),
    "number for an integer": ("minWorkers: 1.0\n", ["the number 1.0", "an integer"]),
    "integer for a boolean": ("prefixCache: 1\n", ["the integer 1", "true or false"]),
    "no value": ("minWorkers:\n", ["is empty", "an integer"]),
    "out of bounds": ("responseTimeout: 0\n", ["the integer 0", "above 0"]),
    "not a number": ("responseTimeout: .nan\n", ["a number"]),
    "endless": ("responseTimeout: .inf\n", ["out of bounds"]),
    "hexadecimal giant": (f"minWorkers: 0x{'f' * 9000}\n", ["a very large integer"]),
    "section that is none": ("torchrun: 4\n", [":1: torchrun", "a mapping of nproc-per-node"]),
    "unknown key": ("maxWorker: 2\n", ["unknown key", "did you mean 'maxWorkers'?"]),
    "slip in a key of the handler": (
        "handler: {modelpath: /tmp}\n",
        [":1: handler.modelpath: unknown key", "did you mean 'model_path'?"],
    ),
    "letters of a handler's key exchanged": ("handler: {model_paht: /tmp}\n", ["did you mean 'model_path'?"]),
    "key in another case": ("MINWORKERS: 2\n", ["did you mean 'minWorkers'?"]),
    "key of a section at the top": ("nproc-per-node: 2\n", ["write it as torchrun.nproc-per-node"]),
    "key of the top in a section": ("torchrun: {parallelLevel: 2}\n", ["write it as parallelLevel"]),
    "unknown key of torchrun": ("torchrun: {rdzv-id: a}\n", ["torchrun.rdzv-id: unknown key"]),
    "sequences": ("sequenceBatching: true\n", ["stateless", "remove the key"]),
    "sequence timeout": ("sequenceMaxIdleMSec: 5\n", ["stateless"]),
    "own environment": ("useVenv: true\n", ["environment of sluice", "remove the key"]),
    "quantised": (
        "handler: {quantization: int8}\n",
        ["handler.quantization", "sluice convert --quantize int8"],
    ),
    "adapters": ("handler:\n  adapters: {a: /x}\n", [":2: handler.adapters", "not in this version"]),
    "unknown engine": ("engine: nativ\n", ["unknown", "did you mean 'native'?", "pipeline"]),
    "engine that cannot": (
        "parallelType: pp\nparallelLevel: 2\nengine: native\n",
        [":3: engine", "native cannot do parallelType pp", "write parallelType: tp"],
    ),
    "deepspeed without its file": ("deepspeed: {checkpoint: a}\n", [":1: deepspeed", "needs the key config"]),
    "sharing without a share": ("shareDevices: true\n", ["gpuMemoryShare", "at most 1.0"]),
    "share above the whole": ("gpuMemoryShare: 1.5\n", ["above 0 to 1"]),
    "unit": ("kvCacheMemory: 2GG\n", ["the text '2GG'", '"2GiB"']),
    "model name": ("modelName: 'a b'\n", ["the text 'a b'", "letters, digits"]),
    "no names": ("servedModelNames: []\n", ["empty list"]),
    "mapping for a list": ("servedModelNames: [{a: b}]\n", ["holds a mapping"]),
    "control characters": ('modelPath: "a\\0b"\n', ["modelPath"]),
    "lone surrogate": ('modelPath: "\\ud800"\n', ["model-config.yaml:1"]),
    "key twice": ("minWorkers: 1\ndtype: auto\nminWorkers: 2\n", [":3: minWorkers: set twice", ":1; remedy"]),
    "merge key": ("torchrun: &t {nnodes: 1}\npippy:\n  <<: *t\n", [":3", "merge keys"]),
    "key that is no text": ("1: 2\n", ["the key '1' is not text"]),
    "list for a key": ("[a]: 2\n", ["the key 'a list or mapping' is not text"]),
    "object tag": ("engine: !!python/object/apply:os.system [ls]\n", [":1: engine", "is not read"]),
    "tag in a list": ("deviceIds: [1, !!int x]\n", [":1: deviceIds: not a value of its type"]),
    "scalar tag": ("engine: !!python/name:os.system\n", [":1: engine"]),
    "tag that does not suit": ("minWorkers: !!int ''\n", [":1: minWorkers: not a value of its type"]),
    "impossible date": ("modelName: 2024-99-99\n", [":1: modelName"]),
    "syntax": ("minWorkers: 1\nhandler: [1, 2\n", ["not valid YAML"]),
    "tab": ("handler:\n\tmodel_path: x\n", [":2: not valid YAML"]),
    "two documents": ("minWorkers: 1\n---\nminWorkers: 2\n", [":2: not valid YAML"]),
    "empty": ("", ["the file is empty"]),
    "only a comment": ("# nothing\n", ["the file is empty"]),
    "a list on top": ("- a\n", ["the top level is a list"]),
    "a text on top": ("hello\n", ["the top level is the text 'hello'"]),
    "null on top": ("~\n", ["the top level is empty"]),
    "deep": ("[" * 5000, ["nested too deeply"]),
}


@pytest.mark.parametrize("name", FOOTGUNS)
def test_mistake_is_named(tmp_path: Path, name: str) -> None:
    text, expected = FOOTGUNS[name]
    (message,) = refused(tmp_path, text)
    assert all(part in message for part in expected), message
    assert "remedy: " in message


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "parallelTyp: tp\nminWorkers: x\ntorchrun:\n  nnodes: 2\n  nproc: 1\ndtype: fp64\nminWorkers: 1\n"
    messages = refused(tmp_path, text)
    keys = [message.split(": ")[:2] for message in messages]
    assert keys == [
        ["model-config.yaml:1", "parallelTyp"],
        ["model-config.yaml:2", "minWorkers"],
        ["model-config.yaml:4", "torchrun.nnodes"],
        ["model-config.yaml:5", "torchrun.nproc"],
        ["model-config.yaml:6", "dtype"],
        ["model-config.yaml:7", "minWorkers"],
    ]


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, b"minWorkers: 1\nmodelName: \xff\n")
    assert message.startswith("model-config.yaml:2: the file is not UTF-8")


def test_control_character_in_the_file(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, b"minWorkers: 1\nmodelName: \x01\n")
    assert message.startswith("model-config.yaml:2: not valid YAML")


def test_file_that_is_too_large(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, b"# " + b"a" * (1 << 20))
    assert "larger than 1048576 bytes" in message


def test_anchors_that_expand_without_end(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    assert "expand to more than 10000 values" in refused(tmp_path, bomb)[0]
    assert "expand to more than 10000 values" in refused(tmp_path, "handler: &h {adapters: *h}\n")[0]


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml:1: cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_wrong_flag_names_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: dtype: is the text 'fp64'"):
        ModelConfig.for_directory(tmp_path, dtype="fp64")
    with pytest.raises(ConfigError, match="did you mean 'maxModelLen'"):
        ModelConfig.for_directory(tmp_path, max_model_length=3)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"tensor_parallel": {"tp_size": 4}}', "tp_size is 4, but the group has 2 ranks"),
        ('{"mp_size": 4}', "mp_size is 4"),
        ('{"tensor_parallel": {"tp_size": true}}', "tp_size is True"),
        ('{"enable_cuda_graph": true}', "enable_cuda_graph does not work with 2 ranks"),
        ('{"replace_with_kernel_inject": "yes"}', "replace_with_kernel_inject is 'yes'"),
        ('{\n"dtype": fp16}', "ds.json:2: not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_deepspeed_file_that_cannot_work(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "ds.json").write_text(content)
    (message,) = refused(tmp_path, "parallelType: tp\nparallelLevel: 2\ndeepspeed: {config: ds.json}\n")
    assert message.startswith("model-config.yaml:3: deepspeed.config")
    assert expected in message
    assert "remedy: " in message


# Wrong on purpose: what a key of each type does not take.
_NOT = {
    Kind.INT: ["true", "x", "1.5", "[1]", "{a: 1}", "-1000000000000", "~"],
    Kind.NUMBER: ["true", "x", "[1]", "{a: 1}", "-5", "~", "1e999"],
    Kind.BOOL: ["1", "x", "[true]", "{a: 1}", "~"],
    Kind.TEXT: ["1", "true", "[x]", "{a: 1}", "~", '""'],
    Kind.NAME: ["1", "true", "[x]", "{a: 1}", "~", "' x'"],
    Kind.BYTES: ["true", "x", "1.5", "[1]", "{a: 1}", "-1", "~"],
    Kind.TEXTS: ["1", "true", "[1]", "{a: 1}", "~", "[]"],
    Kind.INTS: ["1", "true", "[x]", "{a: 1}", "~", "[]"],
    Kind.COUNTS: ["1", "true", "x", "[x]", "[0]", "[work]", "{a: 1}", "~", "[]"],
    Kind.ANY: [],
}


def test_every_key_refuses_every_wrong_type(tmp_path: Path) -> None:
    for section, schema in {"": TOP, **SECTIONS}.items():
        for name, key in schema.items():
            for value in _NOT[key.kind]:
                line = f"{name}: {value}"
                messages = refused(tmp_path, f"{section}:\n  {line}\n" if section else line)
                path = f"{section}.{name}" if section else name
                assert any(f": {path}: " in message for message in messages), (line, messages)


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["tp", "pp", "pptp", "custom", "gpu", "cpu", "2GiB", "native", "pipeline", "float16"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
_KEYS = st.sampled_from([*TOP, *SECTIONS]) | st.text(max_size=12)
_SECTIONS = {
    name: st.dictionaries(st.sampled_from(list(schema)) | st.text(max_size=8), _VALUES, max_size=4)
    for name, schema in SECTIONS.items()
}
_RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_or_refuse(tmp_path: Path, text: str) -> None:
    """Nothing but ConfigError, and each message says where."""
    path = tmp_path / "model-config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    problems: Sequence[Problem] = ()
    try:
        config: ModelConfig | None = load(path, num_gpus=2)
    except ConfigError as error:
        config, problems = None, error.problems
    assert config or problems
    assert all(PLACE.match(str(problem)) for problem in problems)
    assert config is None or ModelConfig.model_validate_json(config.model_dump_json()) == config


@_RELAXED
@given(st.dictionaries(_KEYS, _VALUES, max_size=6), st.fixed_dictionaries({}, optional=_SECTIONS))
def test_any_document_loads_or_is_refused(
    tmp_path: Path, top: dict[str, object], sections: dict[str, object]
) -> None:
    load_or_refuse(tmp_path, yaml.safe_dump({**top, **sections}, allow_unicode=True))


@_RELAXED
@given(st.sampled_from(sorted(DOCUMENTED)), st.integers(0, 600), st.integers(0, 4), st.text(max_size=4))
def test_any_damage_to_a_document_is_refused_or_harmless(
    tmp_path: Path, name: str, start: int, length: int, replacement: str
) -> None:
    text = DOCUMENTED[name]
    start %= len(text)
    load_or_refuse(tmp_path, text[:start] + replacement + text[start + length :])


def test_stages_are_counted(tmp_path: Path) -> None:
    (message,) = refused(tmp_path, "parallelType: pp\nparallelLevel: 2\nstageSplit: [4, 4, 4]\n")
    assert "stageSplit: names the layers of 3 stages, but the group has 2" in message


@pytest.mark.parametrize("text", ["maxWorker: 2\n", 'minWorkers: "1"\n', "handler: {modelpath: /x}\n"])
def test_a_message_says_a_thing_once(tmp_path: Path, text: str) -> None:
    [problem] = refused(tmp_path, text)
    assert "allowed: " not in problem
    assert problem.count("1 to 1024") <= 1
