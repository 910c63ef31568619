"""The tables of docs/configuration.md, made from the tables of flags and variables.

`python -m headgate.launcher.flag_docs docs/configuration.md` writes them between the marks in the
page; a test compares.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from headgate.entrypoints.flags import VLLM_FLAGS
from headgate.launcher.flag import Flag, Kind, Policy
from headgate.launcher.flags import GROUPS
from headgate.launcher.variables import VARIABLES

_UNSAID = ("", "null", "False", "[]")  # what no command line says
_MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def flags_tables() -> str:
    """One table per group of flags."""
    parts = []
    for title, flags in GROUPS:
        parts.append(f"### {title}\n\n| Flag | Environment | Default | What it does | Policy |")
        parts.append("|---|---|---|---|---|")
        parts.extend(_flag_row(flag) for flag in flags)
        parts.append("")
    return "\n".join(parts)


def variables_table() -> str:
    """The variables without a flag."""
    rows = ["| Environment | What it does | Policy |", "|---|---|---|"]
    rows += [f"| `{v.name}` | {v.help} | {v.policy.value} |" for v in VARIABLES]
    return "\n".join(rows) + "\n"


def vllm_table() -> str:
    """vLLM's flags, those of the same fate on one row."""
    rows: dict[tuple[Policy, str], list[str]] = {}
    for flag in VLLM_FLAGS:
        values = " or ".join(f"`{value}`" for value in flag.neutral if value not in _UNSAID)
        shown = f"`--{flag.name}`" + (f", `{flag.short}`" if flag.short else "")
        if flag.policy is Policy.REFUSED and values:
            shown += f" (but {values})"
        rows.setdefault((flag.policy, flag.note), []).append(shown)
    lines = ["| vLLM's flag | What it does | Policy |", "|---|---|---|"]
    for (policy, note), names in rows.items():
        fate = f"as `{note}`" if policy is Policy.WORKS else f"{note[:1].upper()}{note[1:]}."
        if note == "--disable-prefix-caching":
            fate = "`--no-enable-prefix-caching` is `--disable-prefix-caching`"
        kind = Policy.ALIAS if policy is Policy.WORKS else policy
        lines.append(f"| {', '.join(names)} | {fate} | {kind.value} |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """The page with its tables up to date."""
    tables = {
        "flags": flags_tables(),
        "variables": variables_table(),
        "vllm": vllm_table(),
    }
    return _MARKS.sub(lambda match: match[1] + tables[match[2]] + match[3], page)


def _flag_row(flag: Flag) -> str:
    name = f"`--{flag.name}`" + (f", `-{flag.short}`" if flag.short else "")
    env = (
        ", ".join(f"`{name}`" for name in (*flag.env_before, flag.env, *flag.env_aliases) if name)
        or "none"
    )
    text = flag.help
    if flag.choices:
        text += f" One of: {', '.join(flag.choices)}."
    if flag.refused_values:
        text += f" Not available in this version: {', '.join(flag.refused_values)}."
    if flag.policy in (Policy.NO_OP, Policy.REFUSED):
        text += f" {flag.note[:1].upper()}{flag.note[1:]}."
    policy = flag.policy.value
    if flag.policy is Policy.ALIAS:
        policy = f"alias of `{flag.note}`"
    default = "off" if flag.kind is Kind.SWITCH else flag.default_shown
    return f"| {name} | {env} | {default} | {text} | {policy} |".replace("A|B", "A\\|B")


def main(arguments: list[str]) -> int:
    """Rewrites the page in place."""
    path = Path(arguments[0])
    path.write_text(filled(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
