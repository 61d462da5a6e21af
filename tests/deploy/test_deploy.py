"""What is in deploy/: each file by the tool made for its kind, where that is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway import errors
from tests.e2e.server import FAKE_SERVE, serving, wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
GRACE_SECONDS, FLUSH_SECONDS = 30, 5
PROMETHEUS_OWN = {"up"}  # what Prometheus itself says of a scrape
OF_PIPELINES = {"pipeline_stage_busy_seconds_total", "pipeline_active_seconds_total", "pipeline_bubble"}
_SUFFIXES = ("_bucket", "_count", "_sum")


def tool(name: str) -> str:
    """Its path: beside our Python, where pip put it, or on the system's. Skips where it is absent."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*argv: str | Path) -> str:
    result = subprocess.run([str(part) for part in argv], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def test_dockerfile_passes_hadolint() -> None:
    assert passes(tool("hadolint"), DEPLOY / "Dockerfile") == ""


def test_image_gets_what_is_needed_and_no_more() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = {source for sources in copies for source in sources}
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {f"{source}*" for source in copied if (ROOT / source).is_dir()} == set(packages["find"]["include"])


def test_compose_file_passes_its_schema() -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_compose_mounts_exist_and_nothing_is_published_off_this_machine() -> None:
    services = load("compose.yaml")["services"]
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        sources = [volume.split(":")[0] for volume in service["volumes"]]
        assert all((DEPLOY / source).is_dir() for source in sources if source.startswith("."))
    sluice = services["sluice"]
    assert sluice["read_only"] is True
    assert int(sluice["environment"]["SLUICE_GRACE"]) == GRACE_SECONDS
    assert int(sluice["stop_grace_period"].removesuffix("s")) > GRACE_SECONDS + FLUSH_SECONDS


def test_prometheus_files_pass_promtool() -> None:
    promtool = tool("promtool")
    assert "8 rules found" in passes(promtool, "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    passes(promtool, "test", "rules", Path(__file__).with_name("alerts_test.yml"))


def test_systemd_units_pass_systemd_analyze(tmp_path: Path) -> None:
    """Under a root directory in which the command exists."""
    analyze = tool("systemd-analyze")
    unit = (DEPLOY / "systemd" / "sluice.service").read_text()
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text().replace("/opt/sluice/bin/sluice", shutil.which("true") or "/bin/true")
        (tmp_path / path.name).write_text(text)
    output = passes(analyze, "verify", *sorted(tmp_path.iterdir()))
    assert "sluice" not in output
    security = passes(analyze, "security", "--offline=yes", "--threshold=25", tmp_path / "sluice.service")
    assert "Overall exposure level" in security
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0] != "#")
    assert settings["KillMode"] == "mixed"
    assert f"SLUICE_GRACE={GRACE_SECONDS}" in unit
    assert int(settings["TimeoutStopSec"]) > GRACE_SECONDS + FLUSH_SECONDS


def test_kubernetes_manifest_passes_its_schema() -> None:
    passes(tool("kubernetes-validate"), "--strict", DEPLOY / "kubernetes.yaml")
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + GRACE_SECONDS + FLUSH_SECONDS
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_kubernetes_sets_no_variable_that_is_an_option_of_ours() -> None:
    """A link to a Service named sluice would set SLUICE_PORT."""
    deployment, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.fixture(scope="module")
def exposed() -> dict[str, set[str]]:
    """Label names by series name, as a server over a group really exposes them."""
    with serving(program=FAKE_SERVE) as server:
        assert server.complete().status_code == 200
        assert httpx.get(f"{server.url}/nothing").status_code == 404  # an error, to be counted
        ran = "sluice:prefix_cache_queries_total"
        wait_until(lambda: server.metric(ran) > 0, "the first heartbeat after it")
        text = server.client.get("/metrics").text
        assert server.stop() == 0
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            names = [f"{name}{suffix}" for suffix in _SUFFIXES] if kind == "histogram" else [name]
            found.update((each, set()) for each in names)
    for line in text.splitlines():
        if not line.startswith("#") and "{" in line:
            name, rest = line.split("{", 1)
            found[name] |= {label.split("=")[0] for label in rest.rsplit("}", 1)[0].split(",")}
    return found


def queries() -> list[tuple[str, str]]:
    """(where, query) of every panel and every alert."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "sluice.json").read_text())
    panels = [
        (panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]
    ]
    rules = [(rule["alert"], rule["expr"]) for rule in load("prometheus/alerts.yml")["groups"][0]["rules"]]
    assert len(panels) >= 15
    assert len(rules) >= 8
    return panels + rules


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector of a parsed query."""
    import promql_parser

    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        child = getattr(node, name, None)
        if child is not None and type(child).__module__ == type(node).__module__:
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


@pytest.mark.parametrize(("where", "query"), queries())
def test_every_query_is_over_metrics_and_labels_that_we_expose(
    where: str, query: str, exposed: dict[str, set[str]]
) -> None:
    promql_parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    parsed = promql_parser.parse(query.replace("$__rate_interval", "1m"))
    found = list(selectors(parsed))
    assert len(found) == query.count("sluice:") + query.count("up{")
    for selector in found:
        if selector.name in PROMETHEUS_OWN:
            continue
        assert selector.name in exposed, f"{where}: {selector.name}"
        if selector.name.removeprefix("sluice:") not in OF_PIPELINES:  # these have no series without stages
            labels = {matcher.name for matcher in selector.matchers.matchers}
            assert labels <= exposed[selector.name], f"{where}: {selector.name}"


def test_the_alert_on_server_errors_names_codes_that_occur() -> None:
    rules = {rule["alert"]: rule["expr"] for rule in load("prometheus/alerts.yml")["groups"][0]["rules"]}
    (codes,) = re.findall(r'code=~"([a-z_|]+)"', rules["SluiceServerErrors"])
    occurring = {row.code for row in errors.ROWS if row.status >= 500}
    assert set(codes.split("|")) <= occurring


def test_dashboard_asks_the_datasource_that_is_provisioned() -> None:
    text = (DEPLOY / "grafana" / "dashboards" / "sluice.json").read_text()
    (source,) = load("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    asked = {panel["datasource"]["uid"] for panel in json.loads(text)["panels"]}
    assert asked == {source["uid"]}
    (provider,) = load("grafana/provisioning/dashboards/sluice.yml")["providers"]
    mounted = [volume.split(":")[1] for volume in load("compose.yaml")["services"]["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
