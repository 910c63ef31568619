"""TGI command lines that people published, with the embedded model put in, start and answer.

Ports are replaced by free ones and /scratch by a directory that may be written; everything else is
as it was, including Kubernetes' traps in the environment.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.server.live_server import launched
from tests.unit.test_flags import PUBLISHED

KUBERNETES = {
    "HOSTNAME": "headgate-7d9f8b6c5d-x2x7k",
    "PORT": "tcp://10.96.0.17:80",
    "PROMETHEUS_PORT": "tcp://10.96.0.18:9000",
    "QUANTIZE": "",
    "NUM_SHARD": "",
}


def flags_of(line: str, scratch: Path) -> list[str]:
    """The line's flags but the model and the port."""
    line = re.sub(r"--model-id MODEL|(--port|-p)[ =]\d+", "", line)
    return line.replace("/scratch", str(scratch)).split()


@pytest.mark.parametrize("line", PUBLISHED)
def test_published_line_starts_and_answers(line: str, tmp_path: Path) -> None:
    with launched(*flags_of(line, tmp_path), env=KUBERNETES) as live:
        answer = live.generate("The capital of France is", max_new_tokens=4)
        assert answer["generated_text"].startswith(" Paris")
        assert live.post("/tokenize", {"inputs": "hi"}).status_code == 200
