"""Hooks of pytest for these tests: the order of a plan, a share of it for each process, and results on disk.

`run` beside this file starts pytest twice, each on a node of its own. Both have all tests of the plan, and each takes
one group of them after the other that the other has not taken.
"""

import json
import os
import time
from pathlib import Path

import pods
import pytest
from ledger import FAILED, PASSED, SKIPPED, Ledger

# These need an earlier release, which `make upgrade` builds and names.
collect_ignore = [] if os.environ.get("HUSK_UPGRADE_FROM") else ["test_upgrade.py"]
# Lines of huskd's log that are printed with a failure.
LOG_LINES = 25


def pytest_addoption(parser):
    parser.addoption("--plan", type=Path, help="a file with groups of tests, in the order in which they are to run")
    parser.addoption("--results", type=Path, help="the directory for results")
    parser.addoption("--claims", type=Path, help="the directory in which processes take groups of tests")
    parser.addoption("--until", type=float, help="no test that can wait begins after this time, in seconds since 1970")


def pytest_configure(config):
    if config.option.plan:
        config.pluginmanager.register(Share(config.option), "husk-share")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and pods.the_node.cache_info().currsize:
        report.sections.append(("the last lines of huskd's log", "\n".join(pods.the_node().log_tail("huskd", LOG_LINES))))
    return report


class Share:
    """The share of a plan that this process runs, with the results of its tests."""

    def __init__(self, options):
        self.plan = json.loads(options.plan.read_text())
        self.claims, self.until = options.claims, options.until
        self.ledger = Ledger(options.results, f"pods-{os.getpid()}")
        self.started, self.failures, self.skipped = 0.0, [], None
        # pytest's own report goes to a file: two processes share the terminal, a line at a time.
        self.terminal = os.fdopen(os.dup(2), "w")

    def pytest_runtestloop(self, session):
        """Runs group after group. Everything is torn down after each, because the next group is not known."""
        if session.testsfailed:
            raise session.Interrupted("tests could not be collected")
        by_id = {item.nodeid: item for item in session.items}
        for number, group in enumerate(self.plan):
            if self.in_time(group) and self.take(number):
                items = [by_id[test] for test in group["tests"]]
                for item, following in zip(items, [*items[1:], None]):
                    # The last test of a group tears its class down.
                    last = following is None or not self.in_time(group)
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None if last else following)
                    if last:
                        break
        return True

    def in_time(self, group):
        return group["always"] or not self.until or time.time() < self.until

    def take(self, number):
        try:
            (self.claims / str(number)).touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    def pytest_runtest_logstart(self, nodeid):
        self.started, self.failures, self.skipped = time.monotonic(), [], None
        self.ledger.begins(nodeid)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failures.append("\n".join([report.longreprtext, *(f"{name}:\n{text}" for name, text in report.sections)]))
        elif report.skipped:
            self.skipped = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid):
        seconds = time.monotonic() - self.started
        outcome = FAILED if self.failures else SKIPPED if self.skipped else PASSED
        said = "\n".join(self.failures) or self.skipped or ""
        self.ledger.ends(nodeid, outcome, seconds, said)
        print(f"{outcome:7} {seconds:4.0f} s  {nodeid}", *([said] if said else []), sep="\n", file=self.terminal, flush=True)
