"""Evaluates a run of critest: the result of each spec and its reason, from ginkgo's JSON report."""

from dataclasses import dataclass

# Results of a spec other than passed and skipped; ginkgo distinguishes panics and time-outs.
PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
# The suffix of the name of a spec whose streams used the other transport.
WEBSOCKET = " over WebSocket"


@dataclass
class Spec:
    name: str
    end: str
    seconds: float
    reason: str


def first_lines(text, most=300):
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


class Report:
    def __init__(self, reports):
        """Takes ginkgo's report, and a suffix for the names of its specs."""
        specs = (spec for suites, suffix in reports for spec in self.read(suites, suffix))
        self.specs = sorted(specs, key=lambda spec: spec.name)

    @staticmethod
    def read(suites, suffix=""):
        for suite in suites:
            for spec in suite.get("SpecReports") or []:
                if spec["LeafNodeType"] != "It":
                    # The set-up before all specs is no spec, unless it fails: then nothing ran.
                    if spec["State"] in (PASSED, SKIPPED):
                        continue
                failure = spec.get("Failure") or {}
                message = failure.get("Message", "")
                end = spec["State"] if spec["State"] in (PASSED, SKIPPED) else FAILED
                if end == SKIPPED and not message:
                    continue  # not chosen: a benchmark, or out of focus
                texts = [*(spec.get("ContainerHierarchyTexts") or []), spec["LeafNodeText"]]
                place = failure.get("Location") or {}
                where = f" ({place['FileName'].rsplit('/', 1)[-1]}:{place['LineNumber']})" if place.get("FileName") else ""
                reason = first_lines(message) + where if end != PASSED else ""
                name = " ".join(text for text in texts if text) or spec["LeafNodeType"]
                yield Spec(name + suffix, end, spec["RunTime"] / 1e9, reason)

    def of(self, end):
        return [spec for spec in self.specs if spec.end == end]

    def failed(self):
        return self.of(FAILED)

    def passed(self):
        return {spec.name for spec in self.of(PASSED)}

    def lost(self, known, complete):
        """Names of `known` that ran and did not pass; in a complete run, of those that did not run either."""
        ran = {spec.name for spec in self.specs}
        return sorted(name for name in known - self.passed() if complete or name in ran)

    def sums(self):
        return ", ".join(f"{len(self.of(end))} {end}" for end in (PASSED, FAILED, SKIPPED))

    def table(self):
        lines = [self.sums(), "", "| spec | end | s | reason |", "| --- | --- | --- | --- |"]
        for spec in self.specs:
            reason = spec.reason.replace("|", "\\|")
            lines.append(f"| {spec.name} | {spec.end} | {spec.seconds:.1f} | {reason} |")
        return "\n".join(lines) + "\n"
