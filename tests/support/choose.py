"""Chooses the tests of `make test`: always a few of each kind, those that recent changes touch, and a part of the
others.

The part is another one each day, so that in DAYS days every test runs. What touches what is decided by words in the
paths of changed files (TOUCHES), so it holds wherever a folder is moved to.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPO = SUPPORT.parent.parent
INTEGRATION = REPO / "tests/integration"
CACHE = Path(os.environ.get("HUSK_CACHE") or Path.home() / ".cache" / "husk")
# The last commit whose tests all passed in CI on this machine.
SEEN = CACHE / "ci-seen"
# Without such a commit, so many recent commits count as new.
RECENT = 20
DAYS = 4

# A word in the path of a changed file, and the tests that it touches: files of tests/integration, or other suites.
MACHINES, AGENT, FEATURES = "machines", "agent", "features"
FUZZ = REPO / "tests/fuzz"
TOUCHES = {
    r"apparmor": ["test_apparmor"],
    r"hook": ["test_hooks"],
    r"network|netlink|cni|tap|bandwidth|dns": ["test_network"],
    r"stream|spdy|websocket|port|exec|attach|stdio|pump": ["test_streaming"],
    r"volume|storage|fs|fuse|idmap|live|shared": ["test_volumes"],
    r"template|snapshot|clone": ["test_templates", MACHINES],
    r"host|userns": ["test_host_handler"],
    r"stats|metrics|cgroup|events|update|usage|resources": ["test_figures"],
    r"spec|seccomp|security|caps|user|sysctl|oci": ["test_security"],
    r"image|registry|cdi|devices": ["test_fields", "test_bad_input", "test_command_images"],
    r"runtime/cli|credential": ["test_command_images"],
    r"recover|sandbox|lifecycle|pods|container|log|records": ["test_life"],
    r"error|config|cri": ["test_bad_input"],
    r"cli": ["test_command", "test_command_run"],
    r"vmm": [MACHINES],
    r"agent|proto": [AGENT],
    r"kernel|features|guest-image": [FEATURES, MACHINES],
}


# --- Tests that there are ------------------------------------------------------------------------------


def pytest():
    """Returns the command that is pytest, from the environment with the test's packages."""
    python = CACHE / "python/test/bin/python"
    if not python.exists():
        sys.exit(f"{python} is missing: run `tests/support/deps test`")
    return [python, "-m", "pytest"]


def collect():
    """Returns the names of all tests of pods, in the order of their files."""
    listed = subprocess.run([*pytest(), "--collect-only", "-q"], cwd=INTEGRATION, capture_output=True, text=True)
    if listed.returncode:
        sys.exit(f"pytest cannot collect the tests:\n{listed.stdout}{listed.stderr}")
    return [line for line in listed.stdout.splitlines() if "::" in line]


def class_of(test):
    return test.rpartition("::")[0]


def file_of(test):
    return test.partition(".py::")[0]


def groups_of(tests, always):
    """Groups tests by class, because the tests of a class share a daemon's configuration."""
    groups = {}
    for test in tests:
        groups.setdefault(class_of(test), []).append(test)
    return [{"name": name, "always": always, "tests": inner} for name, inner in groups.items()]


# --- Changes -------------------------------------------------------------------------------------------


def git(*words):
    done = subprocess.run(["git", *words], cwd=REPO, capture_output=True, text=True)
    return done.stdout.split("\n") if done.returncode == 0 else None


def changed_files():
    """Returns the files that changed since the last commit that CI has seen, or in the last commits, and uncommitted
    ones."""
    bases = [SEEN.read_text().strip()] if SEEN.exists() else []
    for base in [*bases, f"HEAD~{RECENT}"]:
        if git("merge-base", "--is-ancestor", base, "HEAD") is not None:
            committed = git("diff", "--name-only", base)
            return base, [path for path in committed if path]
    return "the beginning", [path for path in git("ls-files") or [] if path]


def touched(paths):
    """Returns the files of tests/integration, and the other suites, that changes of these files touch."""
    found = set()
    for path in paths:
        if path.endswith(".md") or path.startswith("docs/"):
            continue
        if match := re.match(r"tests/integration/(test_\w+)\.py", path):
            found.add(match[1])
            continue
        if path.startswith("tests/"):
            continue
        for word, suites in TOUCHES.items():
            if re.search(rf"(?<![a-z])({word})", path):
                found.update(suites)
    return found


def fuzz_target(paths, day):
    """The fuzz target of the day: each in its turn, and every other day one of a crate that changed."""
    manifest = tomllib.loads((FUZZ / "Cargo.toml").read_text())

    def folders(target):
        needed = [dep.removeprefix("dep:") for name in target["required-features"] for dep in manifest["features"][name]]
        dependencies = [manifest["dependencies"][name] for name in needed]
        places = [dependency["path"] for dependency in dependencies if "path" in dependency]
        return [os.path.relpath(FUZZ / place, REPO) + "/" for place in places]

    targets = manifest["bin"]
    changed = [target for target in targets if any(path.startswith(tuple(folders(target))) for path in paths)]
    pool = changed if changed and day % 2 else targets
    return pool[day // 2 % len(pool)]["name"]


# --- The choice ----------------------------------------------------------------------------------------


def is_of_today(position, day):
    return position % DAYS == day % DAYS


def plan(tests, touched_suites, day):
    """Returns groups in the order in which they run, and the tests that are left for another day."""
    first = {}
    for test in tests:
        first.setdefault(class_of(test), test)
    smoke = list(first.values())
    others = [test for test in tests if test not in smoke]
    of_changes = [test for test in others if file_of(test) in touched_suites]
    rest = [test for test in others if file_of(test) not in touched_suites]
    of_today = [test for position, test in enumerate(rest) if is_of_today(position, day)]
    later = [test for test in rest if test not in of_today]
    # If time runs out, other tests miss it each day.
    groups = groups_of(of_changes, False)
    begin = day % len(groups) if groups else 0
    groups = groups[begin:] + groups[:begin]
    return [*groups_of(smoke, True), *groups, *groups_of(of_today, False)], later
