"""Evaluates two runs of pjdfstest: the result of each test on the host and in a container, and the list of known
misses."""

import re
from dataclasses import dataclass

from node import Failed

PASSED, SKIPPED, FAILED = "ok", "skipped", "FAILED"

TEST = re.compile(r"^(\S+::\S+) +(ok|skipped|FAILED)$")
SUMMARY = re.compile(r"^Summary: .* (\d+) total$", re.MULTILINE)


@dataclass
class Result:
    end: str
    reason: str = ""


def results(printed):
    """Returns each test's result, by name. Of a test that ran twice, the run counts in which it was not skipped."""
    found, current = {}, None
    for line in printed.splitlines():
        if match := TEST.match(line):
            current = Result(match[2])
            if match[1] not in found or found[match[1]].end == SKIPPED:
                found[match[1]] = current
        elif line.startswith("\t") and current and not current.reason:
            current.reason = line.strip()
    totals = [int(total) for total in SUMMARY.findall(printed)]
    # A suite that was interrupted says nothing about the rest of its tests.
    if len(totals) != 2 or max(totals) != len(found):
        raise Failed(f"the suite broke off after {len(found)} tests: {printed[-2000:]}")
    return found


def listed(text):
    """Reads the reasons of known misses, by the names of tests: one a line, name first; `#` begins a comment."""
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {name: reason for name, reason in lines}


class Comparison:
    """Sorts the tests of a container by the results of the same tests on the host, and by the known misses."""

    def __init__(self, host, container, known):
        self.known = known
        self.passed, self.missed, self.skipped, self.failed = [], [], [], {}
        for name, reason in ((name, "is listed and does not exist") for name in known.keys() - container.keys()):
            self.failed[name] = reason
        for name in sorted(host.keys() | container.keys()):
            self.sort(name, host.get(name), container.get(name))

    def sort(self, name, host, container):
        if not host or not container:
            self.failed[name] = f"ran only {'in the container' if container else 'on the host'}"
        elif container.end == PASSED:
            if name in self.known:
                self.failed[name] = "passes now: take it out of misses.txt"
            else:
                self.passed.append(name)
        elif container.end == SKIPPED and name in self.known:
            self.skipped.append((name, self.known[name]))
        elif host.end == FAILED:
            self.skipped.append((name, f"fails on the host too: {host.reason}"))
        elif name in self.known:
            self.missed.append((name, self.known[name]))
        else:
            self.failed[name] = f"{container.end}: {container.reason}"

    def show(self):
        for word, tests in (("skipped", self.skipped), ("missed", self.missed), ("FAILED", self.failed.items())):
            for name, reason in tests:
                print(f"  {word}: {name}: {reason}")
        counts = {"passed": self.passed, "failed": self.failed, "missed": self.missed, "skipped": self.skipped}
        print("posix:", ", ".join(f"{len(tests)} {word}" for word, tests in counts.items()), flush=True)
