"""TGI command lines that people published, with the embedded model put in, start and answer.

Ports are replaced by free ones and /scratch by a directory that may be written; everything else is
as it was, including Kubernetes' traps in the environment. Lines that come to the same configuration
then, but for warnings, are one server.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.server.live_server import launched
from tests.unit.test_flags import PUBLISHED, resolve

KUBERNETES = {
    "HOSTNAME": "headgate-7d9f8b6c5d-x2x7k",
    "PORT": "tcp://10.96.0.17:80",
    "PROMETHEUS_PORT": "tcp://10.96.0.18:9000",
    "QUANTIZE": "",
    "NUM_SHARD": "",
}


def flags_of(line: str) -> str:
    """The line's flags but the model and the port."""
    return re.sub(r"--model-id MODEL|(--port|-p)[ =]\d+", "", line)


# The last of equal ones, which has the most words to it.
DIFFERENT = {replace(resolve(flags_of(line)), warnings=()): line for line in PUBLISHED}.values()


@pytest.mark.parametrize("line", DIFFERENT)
def test_published_line_starts_and_answers(line: str, tmp_path: Path) -> None:
    flags = flags_of(line).replace("/scratch", str(tmp_path)).split()
    with launched(*flags, env=KUBERNETES) as live:
        answer = live.generate("The capital of France is", max_new_tokens=4)
        assert answer["generated_text"].startswith(" Paris")
        assert live.post("/tokenize", {"inputs": "hi"}).status_code == 200
