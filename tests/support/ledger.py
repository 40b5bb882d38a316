"""The results of tests, on disk as soon as there are any, so that a run which begins again in another machine continues
from them.

A directory of files, one for each process that runs tests, with a line of JSON for each test that begins or ends.
"""

import json
import os
from dataclasses import dataclass

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
BEGUN = "begun"
# A test in which so many machines were lost is not run again.
MOST_MACHINES_LOST = 2


class Ledger:
    """One process' file."""

    def __init__(self, directory, name):
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{name}-{os.urandom(4).hex()}.jsonl"

    def begins(self, test):
        self.write({"test": test, "outcome": BEGUN})

    def ends(self, test, outcome, seconds, said=""):
        self.write({"test": test, "outcome": outcome, "seconds": round(seconds, 1), "said": said})

    def write(self, line):
        with open(self.path, "a") as file:
            print(json.dumps(line), file=file, flush=True)
            os.fsync(file.fileno())


@dataclass
class Result:
    outcome: str
    seconds: float = 0
    said: str = ""


def results(directory):
    """Returns the result of each test that has one. A test that was lost with its machine has none, and so runs again;
    the second time it has failed."""
    found, begun = {}, {}
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                one = json.loads(line)
            except ValueError:
                continue  # the machine was lost while it wrote
            if one["outcome"] == BEGUN:
                begun[one["test"]] = begun.get(one["test"], 0) + 1
            else:
                found[one["test"]] = Result(one["outcome"], one["seconds"], one["said"])
    for test, times in begun.items():
        if test not in found and times >= MOST_MACHINES_LOST:
            found[test] = Result(FAILED, said=f"{times} KVM host VMs were lost while it ran")
    return found
