"""Lines of a batch: what is a request, what is skipped, what a half-written output says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headgate.batch_files import Bad, Done, Request, read_line, read_requests
from headgate.launcher.cli import main


def line(**fields: Any) -> bytes:
    whole = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    given = {key: value for key, value in {**whole, **fields}.items() if value is not None}
    return json.dumps(given).encode() + b"\n"


def test_a_request() -> None:
    assert read_line(line(), 3) == Request(3, "a", "/v1/completions", {"prompt": "x"})


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "line 3"),
        (b"[1]", "JSON object"),
        (b"[" * 100_000, "line 3"),
        (line(custom_id=None), "custom_id"),
        (line(custom_id=7), "custom_id"),
        (line(method="GET"), "method"),
        (line(url="/v1/embeddings"), "/v1/embeddings"),
        (line(body=None), "body"),
        (line(body={"stream": True}), "stream"),
    ],
)
def test_what_is_no_request(raw: bytes, word: str) -> None:
    bad = read_line(raw, 3)
    assert isinstance(bad, Bad) and word in bad.message and bad.code == "invalid_line"


def entry(custom_id: str | None, status: int = 200, error: Any = None) -> bytes:
    response = None if error else {"status_code": status, "request_id": "r", "body": {}}
    fields = {"id": "i", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(fields).encode() + b"\n"


def test_going_on(tmp_path: Path) -> None:
    requests, results = tmp_path / "in", tmp_path / "out"
    requests.write_bytes(
        line(custom_id="a") + b"bad\n\n" + line(custom_id="b") + line(custom_id="a") + b"bad\n"
    )
    first = list(read_requests(requests, Done.of(results)))
    assert [(one.line, one.custom_id) for one in first] == [
        (1, "a"), (2, None), (4, "b"), (5, "a"), (6, None),
    ]  # fmt: skip
    assert isinstance(first[3], Bad) and first[3].code == "duplicate_custom_id"
    whole = entry("a", 422) + entry(None, error={"code": "c", "message": "m", "line": 2})
    results.write_bytes(whole + entry("b")[:-5])
    done = Done.of(results)
    assert results.read_bytes() == whole and done.failed == 2
    assert [one.line for one in read_requests(requests, done)] == [4, 5, 6]


def test_a_file_that_is_no_output(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text('{"precious": 1}\nhalf')
    with pytest.raises(ValueError, match="not the output of a batch"):
        Done.of(path)
    assert path.read_text().endswith("half")


def test_starts_that_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent")
    assert main(["batch", "--input", absent, "--output", str(tmp_path / "out")]) == 1
    assert "absent" in capsys.readouterr().err
    requests = tmp_path / "in"
    requests.write_bytes(line())
    assert main(["batch", "--input", str(requests), "--output", str(requests)]) == 1
    assert "same file" in capsys.readouterr().err and requests.read_bytes() == line()
    assert main(["batch", "-i", absent, "-o", absent, "--dtype", "int3"]) == 1
    assert "int3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["batch", "-i", absent, "-o", absent, "--port", "80"])
