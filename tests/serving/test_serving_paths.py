"""Relative paths of `yojo serve` mean the same folders in every worker and replica, wherever those run."""

import logging
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

from yojo.cli import app
from yojo.serving import cluster, server
from yojo.serving.roles import model_of


@pytest.fixture
def asked(monkeypatch):
    """list of (model, settings) that the command has a server made of."""
    found = []

    def serve(model, settings, *_):
        found.append((model, settings))
        return 0

    monkeypatch.setattr(cluster, "serve_on_ray", serve)
    monkeypatch.setattr(server, "serve", serve)
    # The command has the logs of its process, which is that of all tests here: its handler would outlive the stream that it has.
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    levels = {name: logging.getLogger(name).level for name in ("uvicorn", "uvicorn.error", "httpx")}
    yield found
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize("where", [(), ("--ray", "auto")])
def test_relative_paths_mean_those_of_the_command(asked, where, tmp_path, monkeypatch):
    demo = Path(str(files("yojo") / "demo"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "org").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    # Where this is no folder, it is a name on the hub: another model.
    words = ["--model", "org/reward_model", "--base-model", "org/backbone", "--image-root", "pictures"]
    done = CliRunner().invoke(app, ["serve", *words, *where])
    assert done.exit_code == 0, done.output
    ((model, settings),) = asked
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert (model.name, settings.names) == ("reward_model", ("reward_model",))
    assert Path(settings.image_root).samefile(tmp_path / "pictures")
    assert Path(model.path).samefile(demo / "reward_model")
    assert Path(model.options["base_model"]).samefile(demo / "backbone")
    loaded, folder = model.load("cpu")
    assert Path(folder).samefile(demo / "reward_model") and loaded.config.mode == "comparative"


def test_a_base_model_on_the_hub_keeps_its_name():
    model = model_of(str(files("yojo") / "demo" / "reward_model"), base_model="org/base")
    assert model.options["base_model"] == "org/base"
