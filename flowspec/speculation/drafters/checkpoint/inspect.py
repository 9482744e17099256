"""Inspects a draft checkpoint without running it."""

from dataclasses import dataclass
from pathlib import Path

from flowspec.model.architecture import ModelConfig, read_json
from flowspec.speculation.drafters.checkpoint.config import ERROR, Finding
from flowspec.speculation.drafters.checkpoint.kind import (
    FAMILIES,
    DraftKind,
    draft_weights,
    read_draft,
    recognise,
)
from flowspec.speculation.drafters.eagle.load import EaglePlan, plan_eagle
from flowspec.speculation.drafters.eagle3.load import Eagle3Plan, plan_eagle3


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadReport:
    """The kind of a checkpoint and everything wrong with it; `about` has its form and sizes."""

    path: Path
    kind: DraftKind
    about: str
    findings: tuple[Finding, ...]

    @property
    def loads(self) -> bool:
        """Whether it can be used for drafting."""
        return all(finding.severity != ERROR for finding in self.findings)


def inspect_head(folder: Path, target: ModelConfig) -> HeadReport:
    """Recognise the checkpoint in `folder` and compare it with its target.

    Raises ValueError only if there is nothing to inspect: no weights, or damaged ones.
    """
    path = draft_weights(folder)
    tensors = read_draft(path)
    kind = recognise(tensors)
    findings: list[Finding] = []
    about = f"{len(tensors)} tensors"
    if kind.family in ("eagle", "eagle3"):
        hf = _config(folder, findings)
        plan: EaglePlan | Eagle3Plan
        if kind.family == "eagle":
            plan = plan_eagle(hf, tensors, target)
        else:
            plan = plan_eagle3(hf, tensors, target)
        findings += plan.findings
        about = ", ".join((about, *plan.about))
    elif not FAMILIES[kind.family].drafter:
        known = ", ".join(
            f"{f.title} (--drafter {f.drafter})" for f in FAMILIES.values() if f.drafter
        )
        findings.append(Finding(ERROR, "family", f"no drafter runs a {kind.title}; known: {known}"))
    return HeadReport(path=path, kind=kind, about=about, findings=tuple(findings))


def _config(folder: Path, findings: list[Finding]) -> dict[str, object] | None:
    """Return the config; if it cannot be read, None, with the reason in `findings`."""
    try:
        return read_json(folder / "config.json")
    except ValueError as error:
        findings.append(Finding(ERROR, "config.json", str(error)))
        return None
