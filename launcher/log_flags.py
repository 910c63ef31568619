"""Flags of what the server tells: logs, traces, its settings."""

from __future__ import annotations

from headgate.launcher.flag import Flag, Kind, Policy

LOGS = (
    Flag("json-output", Kind.SWITCH, "Write the log as one JSON object a line.", default=False),
    Flag(
        "log-prompts",
        Kind.SWITCH,
        "Write prompts and answers into the log.",
        default=False,
        own=True,
    ),
    Flag(
        "otlp-endpoint",
        Kind.TEXT,
        "Collector for OpenTelemetry traces.",
        policy=Policy.REFUSED,
        note="traces are not exported in this version",
    ),
    Flag(
        "otlp-service-name",
        Kind.TEXT,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note="traces are not exported in this version",
    ),
    Flag(
        "usage-stats",
        Kind.TEXT,
        "Accepted for TGI's command lines.",
        choices=("on", "off", "no-stack"),
        policy=Policy.NO_OP,
        note="Headgate never sends usage statistics",
    ),
    Flag(
        "env",
        Kind.SWITCH,
        "Print versions and hardware before starting.",
        default=False,
        short="e",
        has_env=False,
    ),
)
