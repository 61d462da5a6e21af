"""The command line: what it makes of its arguments, and how it says no."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from engines.config import ModelConfig
from gateway import cli, listener, model_source, serve
from gateway.options import Options

ROOT = Path(__file__).parent.parent.parent


def sluice(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli.app, arguments, env=env, catch_exceptions=False)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Enough of a model for its configuration to be resolved."""
    directory = tmp_path / "some-model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[ModelConfig], Options]]:
    """What `serve` would have served: nothing is started."""
    calls: list[tuple[Sequence[ModelConfig], Options]] = []
    monkeypatch.setattr(serve, "run", lambda configs, options: calls.append((configs, options)))
    return calls


def assert_one_clear_error(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("sluice: error: ")
    for part in parts:
        assert part in line


def test_version_names_what_matters() -> None:
    result = sluice("version")
    assert result.exit_code == 0
    assert {"sluice", "torch", "python"} <= set(result.output.split())


def test_the_version_is_an_option_too() -> None:
    result = sluice("--version")
    assert (result.exit_code, result.output.split()[0]) == (0, "sluice")


def test_flags_reach_the_configuration(
    model_dir: Path, served: list[tuple[Sequence[ModelConfig], Options]]
) -> None:
    result = sluice(
        *("serve", str(model_dir), "--tp", "2", "--dtype", "float32", "--device", "cpu"),
        *("--max-model-len", "64", "--max-num-seqs", "3", "--kv-cache-memory", "8MiB", "--omp-threads", "1"),
        *("--served-name", "a", "--served-name", "org/b", "--replicas", "2"),
        *("--host", "::1", "--port", "81", "--api-key", "k1", "--api-key", "k2", "--grace", "2"),
        *("--recovery-wait", "3"),
    )
    assert result.exit_code == 0, result.output
    (((config,), options),) = served
    assert (config.tp_size, config.dtype, config.device, config.num_replicas) == (2, "float32", "cpu", 2)
    assert (config.max_model_len, config.max_num_seqs, config.kv_cache_memory) == (64, 3, 8 << 20)
    assert (config.model_name, config.served_model_names) == ("some-model", ("a", "org/b"))
    assert config.omp_threads == 1
    assert (options.host, options.port, options.api_keys, options.grace) == ("::1", 81, ("k1", "k2"), 2.0)
    assert options.recovery_wait == 3.0


def test_every_option_of_serve_has_an_environment_variable() -> None:
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    options = [parameter for parameter in command.params if parameter.name != "help"]
    assert len(options) > 15
    for option in options:
        spelling = "models" if option.name == "models" else option.opts[0]
        expected = f"SLUICE_{spelling.strip('-').replace('-', '_').upper()}"
        assert option.envvar == expected, f"{option.name}: {option.envvar}"


def test_the_environment_counts_and_a_flag_counts_more(
    model_dir: Path, served: list[tuple[Sequence[ModelConfig], Options]]
) -> None:
    env = {"SLUICE_PORT": "1234", "SLUICE_TP": "2", "SLUICE_MODELS": str(model_dir)}
    assert sluice("serve", env=env).exit_code == 0
    assert sluice("serve", "--port", "99", env=env).exit_code == 0
    assert [options.port for _, options in served] == [1234, 99]
    assert [configs[0].tp_size for configs, _ in served] == [2, 2]


@pytest.mark.parametrize(
    ("name", "blank"),
    [
        ("SLUICE_API_KEY", ""),
        ("SLUICE_API_KEY", "   "),
        ("SLUICE_API_KEY", "\n"),
        ("SLUICE_API_KEY_FILE", ""),
    ],
)
def test_a_secret_that_came_out_empty_opens_nothing(
    served: list[tuple[Sequence[ModelConfig], Options]], name: str, blank: str
) -> None:
    result = sluice("serve", env={name: blank})
    assert_one_clear_error(result, 1, f"{name}: is set, but to nothing", "unset it to serve without")
    assert served == []


def test_a_key_that_is_given_counts_more_than_a_blank_variable(
    served: list[tuple[Sequence[ModelConfig], Options]],
) -> None:
    assert sluice("serve", "--api-key", "k", env={"SLUICE_API_KEY": ""}).exit_code == 0
    assert [options.api_keys for _, options in served] == [("k",)]


def test_a_wrong_key_file_is_said_before_anything_starts(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: a, sha256: {'a' * 64}}}\n- {{name: b, rpm: 3}}\n")
    result = sluice("serve", "--api-key-file", str(keys), "--port", "0", "--log-dir", str(tmp_path / "logs"))
    assert_one_clear_error(result, 1, f"{keys}:2: unknown field rpm; allowed: name, sha256, key")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_key_is_an_error_of_the_command_line(
    served: list[tuple[Sequence[ModelConfig], Options]], blank: str
) -> None:
    assert_one_clear_error(sluice("serve", "--api-key", blank), 1, "--api-key: is empty", "leave it out")
    assert served == []


def test_a_variable_holds_several_with_spaces_between(
    served: list[tuple[Sequence[ModelConfig], Options]],
) -> None:
    assert sluice("serve", env={"SLUICE_API_KEY": " first second\n"}).exit_code == 0
    assert [options.api_keys for _, options in served] == [("first", "second")]


def test_without_a_model_the_demo_is_served(
    served: list[tuple[Sequence[ModelConfig], Options]],
) -> None:
    result = sluice("serve")
    assert result.exit_code == 0, result.output
    (((config,), _),) = served
    assert model_source.is_demo(config)
    assert config.served_model_names == ("sluice-demo",)


def test_a_path_that_does_not_exist_names_its_neighbour(model_dir: Path) -> None:
    wrong = model_dir.with_name("some-modle")
    assert_one_clear_error(sluice("serve", str(wrong)), 1, str(wrong), f"did you mean {model_dir}")


def test_a_wrong_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "model-config.yaml"
    file.write_text("modelName: m\nparalelType: tp\n")
    assert_one_clear_error(sluice("serve", str(file)), 1, f"{file}:2", "parallelType")


def test_a_machine_that_is_too_small_is_another_exit_code(model_dir: Path) -> None:
    file = model_dir / "model-config.yaml"
    file.write_text(
        "modelName: m\ndeviceType: gpu\ndeviceIds: [900, 901]\nparallelType: tp\nparallelLevel: 2\n"
    )
    result = sluice("serve", str(file))
    assert result.exit_code == 2
    assert "900" in result.stderr
    assert "Traceback" not in result.output


def test_two_models_of_one_name(model_dir: Path) -> None:
    result = sluice("serve", str(model_dir), str(model_dir / ".." / "some-model"))
    assert_one_clear_error(result, 1, "some-model", "given twice")


def test_one_served_name_for_two_models(model_dir: Path) -> None:
    result = sluice("serve", str(model_dir), str(model_dir), "--served-name", "x")
    assert_one_clear_error(result, 1, "--served-name", "servedModelNames")


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = sluice("serve", "--port", str(port), "--log-dir", str(tmp_path / "logs"))
    assert_one_clear_error(result, 1, f"127.0.0.1:{port}", "--port")
    assert not (tmp_path / "logs").exists()


def test_an_unknown_host_is_said() -> None:
    with pytest.raises(listener.CannotListen, match=r"no\.such\.host\.invalid"):
        listener.listen("no.such.host.invalid", 0)


def test_the_address_is_written_as_a_client_would() -> None:
    for host, expected in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")):
        with listener.listen(host, 0) as sock:
            assert listener.url_of(sock) == f"http://{expected}:{sock.getsockname()[1]}/v1"


def test_bench_says_what_it_cannot_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("bench", "chat"):
        assert_one_clear_error(sluice(name, "--url", url), 1, url, "is `sluice serve` running there?")
    assert_one_clear_error(sluice("bench", "--concurrency", "1,x"), 1, "--concurrency")


def test_with_a_log_in_json_an_error_is_an_object_too(tmp_path: Path) -> None:
    broken = tmp_path / "model-config.yaml"
    broken.write_text("parallelType: sideways\nmaxNumSeqs: 0\n")
    result = sluice("serve", str(broken), "--log-format", "json")
    assert result.exit_code == 1
    records = [json.loads(line) for line in result.stderr.splitlines()]
    assert len(records) >= 2  # one a problem
    assert {(record["level"], record["logger"]) for record in records} == {("error", "gateway")}
    assert "model-config.yaml:1: parallelType" in records[0]["message"]
