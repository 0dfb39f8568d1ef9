"""What is wrong with an input: the one type for it, from the readers of files to the checks in front of a training
run."""

from dataclasses import dataclass, replace
from pathlib import Path

LEVELS = ("error", "warning", "note")
MAX_SHOWN = 20  # findings listed in one message


class Refused(ValueError):
    """Raised where a value is read or converted, before its place is known: (reason, fix)."""


@dataclass(frozen=True)
class Finding:
    file: Path | str
    line: int  # from 1; 0 = the file as a whole
    reason: str
    fix: str
    # error: the file cannot be used, or the run would be wasted; warning: look at it; note: good to know
    level: str = "error"
    check: str = ""  # --allow CHECK switches it off; without a name it cannot be switched off

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else str(self.file)

    def __str__(self) -> str:
        name = f" [{self.check}]" if self.check else ""
        return f"{self.place}: {self.reason}{name}; fix: {self.fix}"

    def at(self, file: Path | str, line: int, what: str = "") -> "Finding":
        """The same finding with its place; what: the part of the row, before the reason."""
        return replace(self, file=file, line=line, reason=f"{what}: {self.reason}" if what else self.reason)


def fault(reason: str, fix: str, level: str = "error", check: str = "") -> Finding:
    """A finding whose place the caller knows: see Finding.at."""
    return Finding("", 0, reason, fix, level, check)


def list_findings(findings: list[Finding]) -> str:
    """The first ones, a line each, and how many more there are."""
    lines = [str(finding) for finding in findings[:MAX_SHOWN]]
    if len(findings) > MAX_SHOWN:
        lines.append(f"... and {len(findings) - MAX_SHOWN} more")
    return "\n".join(lines)
