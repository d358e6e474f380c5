"""A pytest plugin that makes a run of tests one that can be stopped at any time and gone on with (`bench.gpu_day`).

Each test that has ended is a line of a file, tests that are in it are left out, and none is begun after a deadline. It is told by
the environment: YOJO_DAY_STEP, the name of the step; YOJO_DAY_TESTS, the file to append to; YOJO_DAY_KNOWN, a copy of it
made before the run, so that all workers of pytest-xdist leave the same tests out; YOJO_DAY_DEADLINE, seconds since 1970.
"""

import os
import sys
import time

import pytest

from bench import lines

UNUSABLE = 3  # exit status where the GPU no longer computes


class Day:
    def __init__(self, config, step, path, known, deadline):
        self.config, self.step, self.path, self.deadline = config, step, path, deadline
        self.known = lines.outcomes(known, step)
        self.is_worker = hasattr(config, "workerinput")
        self.suspect = False  # whether the test that runs has failed
        self.reports = {}  # test -> worst outcome so far, seconds, words

    def append(self, test, outcome, **more):
        lines.append(self.path, {"step": self.step, "test": test, "outcome": outcome, **more})

    def pytest_collection_modifyitems(self, config, items):
        old = [item for item in items if item.nodeid in self.known]
        if old:
            config.hook.pytest_deselected(items=old)
            items[:] = [item for item in items if item.nodeid not in self.known]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if time.time() <= self.deadline:
            return None  # pytest's own runs the test
        # What the tests before it share is taken down, as pytest itself would behind the last test.
        done = pytest.CallInfo.from_call(
            lambda: item.session._setupstate.teardown_exact(None),
            "teardown",
            reraise=(KeyboardInterrupt, pytest.exit.Exception),
        )
        self.append(item.nodeid, "left", **({"words": repr(done.excinfo.value)[:3000]} if done.excinfo else {}))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        self.suspect |= report.failed
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self):
        # In the process that ran the test, once it has been torn down and reported.
        if self.suspect and not _usable():
            os._exit(UNUSABLE)  # whatever comes after it would fail, too
        self.suspect = False

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
