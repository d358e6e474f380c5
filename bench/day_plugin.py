"""A pytest plugin that makes a run of tests one that can be stopped at any time and gone on with (`bench.gpu_day`).

Each test that has ended is a line of a file, tests that are in it are left out, and none is begun after a deadline. It is told by
the environment: YOJO_DAY_STEP, the name of the step; YOJO_DAY_TESTS, the file to append to; YOJO_DAY_KNOWN, a copy of it
made before the run, so that all workers of pytest-xdist leave the same tests out; YOJO_DAY_DEADLINE, seconds since 1970.
"""

import json
import os
import sys
import time

import pytest

MOST_BEGUN = 3  # a test that was begun so often and never ended is given up
UNUSABLE = 3  # exit status where the GPU no longer computes


def outcomes(path, step):
    """Test -> "passed", "skipped", "failed" or "given up", of a step; what only was begun is not among them."""
    found, begun = {}, {}
    if not os.path.isfile(path):
        return found
    with open(path) as file:
        for text in file:
            line = json.loads(text)
            if line["step"] != step:
                continue
            if line["outcome"] == "begun":
                begun[line["test"]] = begun.get(line["test"], 0) + 1
            elif line["outcome"] != "left":
                found[line["test"]] = line["outcome"]
    given_up = {test: "given up" for test, count in begun.items() if count >= MOST_BEGUN and test not in found}
    return found | given_up


class Day:
    def __init__(self, config, step, path, known, deadline):
        self.config, self.step, self.path, self.deadline = config, step, path, deadline
        self.known = outcomes(known, step)
        self.is_worker = hasattr(config, "workerinput")
        self.reports = {}  # test -> worst outcome so far, seconds, words

    def append(self, test, outcome, **more):
        line = {"step": self.step, "test": test, "outcome": outcome, **more}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, config, items):
        old = [item for item in items if item.nodeid in self.known]
        if old:
            config.hook.pytest_deselected(items=old)
            items[:] = [item for item in items if item.nodeid not in self.known]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        if time.time() > self.deadline:
            self.append(item.nodeid, "left")
            # What the tests before it share is taken down, as pytest itself would.
            item.session._setupstate.teardown_exact(None)
            return True
        result = yield
        if item.stash.get(FAILED, False) and not _usable():
            os._exit(UNUSABLE)  # whatever comes after it would fail, too
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            item.stash[FAILED] = True
        return report

    def pytest_runtest_logstart(self, nodeid, location):
        if not self.is_worker:
            self.append(nodeid, "begun")

    def pytest_runtest_logreport(self, report):
        if self.is_worker:
            return
        outcome, seconds, words = self.reports.get(report.nodeid, ("passed", 0.0, ""))
        seconds += report.duration
        if report.failed:
            outcome, words = "failed", words + report.longreprtext[-3000:]
        elif report.skipped and outcome == "passed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            outcome, words = "skipped", str(reason)[:300]
        self.reports[report.nodeid] = outcome, seconds, words
        if report.when in ("teardown", "???"):  # the latter: a worker ended within it
            self.append(report.nodeid, outcome, seconds=round(seconds, 2), words=words)


FAILED = pytest.StashKey()


def _usable():
    """Whether the GPU still computes, where there is one: after an illegal access it does not."""
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return True
    try:
        return (torch.ones(2, device="cuda") + 1).sum().item() == 4
    except RuntimeError:
        return False


def pytest_configure(config):
    names = ("STEP", "TESTS", "KNOWN", "DEADLINE")
    step, path, known, deadline = (os.environ[f"YOJO_DAY_{name}"] for name in names)
    config.pluginmanager.register(Day(config, step, path, known, float(deadline)), "yojo-day")
