"""The table of every flag of `headgate serve`.

Its groups have files of their own. They say what exists; config.py reads the command line and the
environment. docs/configuration.md is made from it by `python -m headgate.launcher.flag_docs`.
"""

from __future__ import annotations

from headgate.launcher.flag import Flag
from headgate.launcher.limit_flags import LIMITS
from headgate.launcher.log_flags import LOGS
from headgate.launcher.model_flags import MODEL
from headgate.launcher.network_flags import NETWORK
from headgate.launcher.shard_flags import SHARDS

GROUPS: tuple[tuple[str, tuple[Flag, ...]], ...] = (
    ("Model", MODEL),
    ("Shards", SHARDS),
    ("Limits and memory", LIMITS),
    ("Network", NETWORK),
    ("Logs", LOGS),
)
FLAGS: tuple[Flag, ...] = tuple(flag for _, group in GROUPS for flag in group)
BY_KEY: dict[str, Flag] = {flag.key: flag for flag in FLAGS}
