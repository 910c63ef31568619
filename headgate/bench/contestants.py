"""The servers that are measured: how each is started for a kind of weights, and what it needs.

Headgate is always there. Its peers are other people's programs, installed elsewhere; each takes
part where the command line says where it lies.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HEADGATE = "Headgate"
PLAIN = "Headgate, no drafts"  # the same without speculation
# Kinds of weights, and the kind of the peers that each is compared with: OpenVINO rounds inputs to
# bfloat16 as bf16-medium does, the others multiply as they like.
KINDS = {"bf16": "bf16", "bf16-medium": "bf16", "int8": "int8", "int4": "int4"}
KIND_FLAGS = {
    "bf16": [],
    "bf16-medium": ["--matmul-precision", "medium"],
    "int8": ["--quantize", "int8"],
    "int4": ["--quantize", "int4"],
}
_OPENVINO_FOLDERS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One server with one kind of weights."""

    name: str
    kind: str
    command: Callable[[int], list[str]]  # of the port to listen on
    model: str = "tgi"  # what requests put into `model`
    health: str = "/health"
    exact: bool = True  # knows ignore_eos and min_tokens

    @property
    def title(self) -> str:
        return f"{self.name} {self.kind}"


def headgate(kind: str, model_id: str, flags: list[str], name: str = HEADGATE) -> Contestant:
    """This server, as `make serve` starts it, with `flags` more."""

    def command(port: int) -> list[str]:
        words = [sys.executable, "-m", "headgate.launcher", "serve", "--port", str(port)]
        if model_id:
            words += ["--model-id", model_id]
        return words + KIND_FLAGS[kind] + flags

    return Contestant(name, kind, command, health="/health/ready")


def add_peer_flags(parser: argparse.ArgumentParser) -> None:
    """Where the peers are; none is needed."""
    group = parser.add_argument_group("peers", "Servers to compare with, where they are installed.")
    group.add_argument(
        "--openvino-python",
        metavar="PYTHON",
        help="an interpreter with openvino-genai and tokenizers",
    )
    group.add_argument(
        "--openvino-models",
        metavar="DIR",
        type=Path,
        help="the model as optimum-cli exports it, in the subfolders fp16, int8 or int4",
    )
    group.add_argument("--vllm-python", metavar="PYTHON", help="an interpreter with vLLM for CPU")
    group.add_argument("--llama-server", metavar="PATH", help="llama.cpp's llama-server")
    group.add_argument(
        "--llama-models",
        metavar="DIR",
        type=Path,
        help="bf16.gguf, int8.gguf (Q8_0) or int4.gguf (Q4_0 or Q4_1)",
    )
    group.add_argument(
        "--transformers-python", metavar="PYTHON", help="an interpreter with transformers[serving]"
    )
    group.add_argument(
        "--transformers-model",
        metavar="DIR",
        help="the model with an eos_token_id that never comes: it knows no ignore_eos",
    )


def peers(arguments: argparse.Namespace, kind: str, model_path: str) -> list[Contestant]:
    """The peers that can serve `kind`, by the flags of `add_peer_flags`."""
    found = []
    if arguments.openvino_python and arguments.openvino_models:
        folder = arguments.openvino_models / _OPENVINO_FOLDERS[kind]
        if folder.is_dir():
            found.append(_openvino(arguments.openvino_python, folder, kind, model_path))
    if arguments.llama_server and arguments.llama_models:
        file = arguments.llama_models / f"{kind}.gguf"
        if file.is_file():
            found.append(_llama_cpp(arguments.llama_server, file, kind))
    if kind == "bf16" and arguments.vllm_python:
        found.append(_vllm(arguments.vllm_python, model_path))
    if kind == "bf16" and arguments.transformers_python and arguments.transformers_model:
        found.append(_transformers(arguments.transformers_python, arguments.transformers_model))
    return found


def _openvino(python: str, folder: Path, kind: str, model_path: str) -> Contestant:
    script = str(Path(__file__).parent / "openvino_server.py")
    return Contestant(
        "OpenVINO GenAI",
        kind,
        lambda port: [python, script, str(folder), "--tokenizer", model_path, "--port", str(port)],
    )


def _llama_cpp(program: str, file: Path, kind: str) -> Contestant:
    def command(port: int) -> list[str]:
        threads = str(len(os.sched_getaffinity(0)))  # its own default counts physical cores
        flags = ["-t", threads, "--parallel", "32", "--cont-batching", "-c", "32768", "--no-webui"]
        return [program, "-m", str(file), "--host", "127.0.0.1", "--port", str(port), *flags]

    return Contestant("llama.cpp", kind, command)


def _vllm(python: str, model_path: str) -> Contestant:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))

    def command(port: int) -> list[str]:
        words = ["env", "HF_HUB_OFFLINE=1", "VLLM_CPU_KVCACHE_SPACE=4"]
        words += [f"VLLM_CPU_OMP_THREADS_BIND={cores}", python]
        words += ["-m", "vllm.entrypoints.openai.api_server", "--model", model_path]
        return [*words, "--served-model-name", "tgi", "--host", "127.0.0.1", "--port", str(port)]

    return Contestant("vLLM", "bf16", command)


def _transformers(python: str, model_path: str) -> Contestant:
    def command(port: int) -> list[str]:
        words = ["env", "HF_HUB_OFFLINE=1", str(Path(python).parent / "transformers"), "serve"]
        words += [model_path, "--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"]
        return [*words, "--host", "127.0.0.1", "--port", str(port)]

    return Contestant("Transformers", "bf16", command, model=model_path, exact=False)
