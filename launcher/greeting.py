"""What the launcher says to people: a first request to try, and the report of `--env`."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

from headgate import __version__
from headgate.launcher.autosize import show_bytes
from headgate.launcher.config import LauncherConfig
from headgate.launcher.hardware import Hardware
from headgate.launcher.model_files import ModelFiles

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "grpcio", "protobuf")


def first_request(config: LauncherConfig, port: int, files: ModelFiles) -> tuple[str, str]:
    """(URL of the server, a curl command that asks it something)."""
    host = config.hostname
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    elif ":" in host and not host.startswith("["):
        host = f"[{host}]"
    url = f"http://{host}:{port}"
    if _has_chat_template(config, Path(files.path)):
        question = {"role": "user", "content": "What is the capital of Japan?"}
        route, body = "/v1/chat/completions", {"messages": [question], "temperature": 0}
    else:
        parameters = {"max_new_tokens": 16}
        route, body = "/generate", {"inputs": "The capital of Japan is", "parameters": parameters}
    key = "-H 'Authorization: Bearer YOUR_API_KEY' " if config.api_key else ""
    return url, (
        f"curl {url}{route} -H 'Content-Type: application/json' {key}-d '{json.dumps(body)}'"
    )


def _has_chat_template(config: LauncherConfig, directory: Path) -> bool:
    named = config.tokenizer_config_path.endswith(".jinja")
    if named or (directory / "chat_template.jinja").exists():
        return True
    path = Path(config.tokenizer_config_path or directory / "tokenizer_config.json")
    try:
        return bool(json.loads(path.read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def environment_report(hardware: Hardware) -> list[tuple[str, str]]:
    """Versions and hardware, for bug reports."""
    rows = [
        ("headgate", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("cores", str(hardware.cores)),
        (
            "memory",
            f"{show_bytes(hardware.memory_available)} free of {show_bytes(hardware.memory_limit)}",
        ),
        ("/dev/shm", f"{show_bytes(hardware.shm_free)} free"),
    ]
    for gpu in hardware.gpus:
        rows.append(("gpu", f"{gpu.name}, {show_bytes(gpu.free_bytes)} free"))
    if not hardware.gpus:
        rows.append(("gpu", hardware.gpu_note or "none"))
    for package in _PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            continue
    return rows
