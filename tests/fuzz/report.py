"""What a run of the fuzzer found, as Markdown."""

from __future__ import annotations

from .grammar import BY_NAME
from .program import render
from .run import Tally


def report(tally: Tally, head: str) -> str:
    """Return the failures with their programs, then every feature alone with its verdict, then the refusals."""
    lines = [f"{head} | {tally.summary()}", "", "## WRONG: distinct minimal failures", ""]
    by_kind = sorted(tally.failures.values(), key=lambda item: (len(item[0]), _owners(item[0])))
    for features, verdict in by_kind:
        lines.append(f"- `{'+'.join(f.name for f in features)}` [{_owners(features)}]: {verdict.text}")
    lines += ["", "## Every feature alone", ""]
    for kind in ("WRONG", "refused", "skipped", "exact"):
        names = [name for name, verdict in tally.singles.items() if verdict.kind == kind]
        lines.append(f"### {kind} ({len(names)})")
        for name in names:
            text = tally.singles[name].text[:220]
            lines.append(f"- {name} [{BY_NAME[name].kind}]{': ' + text if text else ''}")
        lines.append("")
    lines += ["## Refusals of compositions, by their first words", ""]
    for text, programs in sorted(tally.refusals.items(), key=lambda item: -item[1].total()):
        lines.append(f"- {programs.total()}x {text} ... (e.g. {min(programs, key=len)})")
    lines += ["", "## Programs of the failures", ""]
    for features, verdict in by_kind:
        lines += [
            f"### {'+'.join(f.name for f in features)}: {verdict.text[:120]}",
            "```python",
            render(features),
            "```",
            "",
        ]
    return "\n".join(lines) + "\n"


def _owners(features: object) -> str:
    return "; ".join(sorted({feature.kind for feature in features}))  # type: ignore[attr-defined]
