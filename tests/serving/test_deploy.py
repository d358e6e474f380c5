"""The files of deploy/ load: what they name exists, metrics by name and label, options of the command, systemd's words."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from yojo.cli import app
from yojo.rewards import GroupCollator
from yojo.serving.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KEYWORDS = set("sum by rate increase histogram_quantile ignoring group_left on avg max min le label_values".split())


def known():
    """dict: metric -> its labels, as the server tells them once everything has happened."""
    metrics = Metrics()
    metrics.add(GroupCollator(lambda groups: [], 2).metrics)
    metrics.request("/score", 200, "", 0.1)
    metrics.shed("tokens")
    metrics.waiting(1, 1, 1, 1)
    for count in (metrics.prepared, metrics.queued):
        count(0.1)
    metrics.scored(1, 1, 0.1)
    metrics.answered(1, 1)

    class Worker:
        state, restarts = "ready", 0

    metrics.workers([Worker], [Worker], True)
    found = {"up": {"job", "instance"}}
    for line in metrics.text().decode().splitlines():
        if not line.startswith("#"):
            name, labels = re.match(r"(\w+)(?:\{(.*)\})?", line).groups()
            found.setdefault(name, {"instance", "job"}).update(re.findall(r"(\w+)=", labels or ""))
    return found


def check(expression, metrics):
    """Every metric of a PromQL expression exists, and has the labels that it is selected and added up by."""
    text = expression.replace("$__rate_interval", "5m")
    selected = re.findall(r"\b([a-z_]\w*)\s*\{([^}]*)\}", text)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", text)
    grouped = [
        label.strip() for group in re.findall(r"\b(?:by|ignoring|on)\s*\(([^)]*)\)", bare) for label in group.split(",")
    ]
    names = set(re.findall(r"\b[a-z_]\w+\b", re.sub(r"\b(by|ignoring|on)\s*\([^)]*\)", "", bare))) - KEYWORDS
    assert names and names <= set(metrics), f"{expression}: there is no {names - set(metrics)}"
    labels = set().union(*(metrics[name] for name in names))
    assert set(grouped) <= labels, f"{expression}: no label {set(grouped) - labels}"
    for name, matchers in selected:
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert wanted <= metrics[name], f"{expression}: {name} has no label {wanted - metrics[name]}"


def test_a_metric_that_is_none_is_found():
    metrics = known()
    check('sum by (le) (rate(yojo_request_seconds_bucket{endpoint="/score"}[5m]))', metrics)
    for wrong in (
        "yojo_redy",
        'yojo_ready{nothing="1"}',
        "sum by (nothing) (yojo_ready)",
        "rate(yojo_requests[5m])",
    ):
        with pytest.raises(AssertionError, match="there is no|no label"):
            check(wrong, metrics)


def test_prometheus():
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    assert scrape["metrics_path"] == "/metrics" and scrape["static_configs"][0]["targets"] == ["localhost:8000"]
    assert [(DEPLOY / name).is_file() for name in config["rule_files"]] == [True]
    rules = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    metrics = known()
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 5
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"} and rule["annotations"]["summary"]
        check(rule["expr"], metrics)


def test_grafana():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "instance"}
    panels, metrics, taken = board["panels"], known(), set()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] in ("stat", "timeseries", "heatmap") and panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            check(target["expr"], metrics)


def options():
    """dict of the options of `yojo serve`."""
    command = typer.main.get_command(app).commands["serve"]
    return {option for one in command.params for option in one.opts}


def unit():
    """[(section, key, value)] of the systemd unit."""
    found, section = [], None
    for line in (DEPLOY / "yojo-serve.service").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            found.append((section, *line.split("=", 1)))
    return found


def test_systemd():
    found = {(section, key): value for section, key, value in unit()}
    words = shlex.split(found["Service", "ExecStart"])
    assert words[1] == "serve" and {word for word in words if word.startswith("--")} <= options()
    # SIGTERM goes to the server alone, and it has time for what it has accepted.
    assert found["Service", "KillMode"] == "mixed"
    assert int(found["Service", "TimeoutStopSec"]) > int(words[words.index("--grace") + 1])
    if (program := shutil.which("systemd-analyze")) is None:
        return
    said = subprocess.run([program, "verify", DEPLOY / "yojo-serve.service"], capture_output=True, text=True).stderr
    complaints = [line for line in said.splitlines() if "yojo-serve" in line and "is not executable" not in line]
    assert complaints == []


def test_docker():
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    by_word = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        by_word.setdefault(word, []).append(rest)
    # Arguments as lists: no shell stands between a signal and the server.
    command = json.loads(by_word["ENTRYPOINT"][0]) + json.loads(by_word["CMD"][0])
    assert command[:2] == ["yojo", "serve"] and {word for word in command if word.startswith("--")} <= options()
    assert by_word["STOPSIGNAL"] == ["SIGTERM"] and by_word["USER"] == ["yojo"]
    sent = {
        line.lstrip("!") for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {name for line in by_word["COPY"] if not line.startswith("--from") for name in line.split()[:-1]}
    assert copied == sent and all((ROOT / name).exists() for name in copied)
    check = json.loads(re.search(r"CMD (\[.*\])$", by_word["HEALTHCHECK"][0])[1])
    compile(check[2], "HEALTHCHECK", "exec")
    assert "127.0.0.1:8000/health" in check[2]
    extras = re.search(r"\.\[([\w,]+)\]", text)[1].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
