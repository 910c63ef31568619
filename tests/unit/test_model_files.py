"""What --model-id may be: directories, .gguf files, hub ids (a hub on loopback), .bin weights."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from headgate.launcher.cli import parse_serve
from headgate.launcher.errors import LaunchError
from headgate.launcher.model_facts import read_model_facts
from headgate.launcher.model_files import (
    DIRECTORY,
    EMBEDDED,
    GGUF,
    HUB,
    ModelSource,
    files_at_hand,
    find_source,
    read_files,
    with_weights_of,
    write_source,
)
from headgate.launcher.safetensors_header import read_weight_files
from tests.unit.launcher_model import model_files, safetensors, write_model
from tests.unit.local_hub import COMMIT, LocalHub, serving

ROOT = Path(__file__).resolve().parents[2]


def source_of(line: str) -> ModelSource:
    return find_source(parse_serve(shlex.split(line), {}))


def prepare(source: ModelSource, tmp: Path, **environment: str) -> tuple[int, Path, list[dict]]:
    """(exit code, file of the answer, log records) of the process that prepares files."""
    request, answer = tmp / "source.json", tmp / "answer.json"
    write_source(source, request)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    arguments = ("--source", str(request), "--result", str(answer))
    ended = subprocess.run(
        [sys.executable, "-m", "headgate.launcher.prepare_model", *arguments],
        cwd=ROOT,
        env={
            **clean,
            "HF_HOME": str(tmp / "hf"),
            "XDG_CACHE_HOME": str(tmp / "xdg"),
            "HEADGATE_CACHE": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("{")]
    return ended.returncode, answer, [json.loads(line) for line in lines]


# ------------------------------------------------------------------- sources


def test_kinds_of_model_id(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert source_of("").kind == EMBEDDED
    assert source_of(f"--model-id {tmp_path}").kind == DIRECTORY
    assert source_of(f"--model-id {tmp_path}/model.gguf").kind == GGUF
    hub = source_of("--model-id org/model --revision v1 --huggingface-hub-cache /x")
    assert hub == ModelSource(HUB, "org/model", revision="v1", cache="/x")
    assert source_of("--model-id gpt2").kind == HUB


@pytest.mark.parametrize("text", ["/no/where", "./nowhere", "a/b/c", "missing.gguf", "~/nowhere-x"])
def test_paths_that_are_not_there(text: str) -> None:
    with pytest.raises(LaunchError, match="does not exist"):
        source_of(f"--model-id {text}")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(LaunchError, match=r"not \.gguf"):
        source_of(f"--model-id {tmp_path}/model.bin")


def test_a_directory_needs_no_preparation(tmp_path: Path) -> None:
    source = source_of(f"--model-id {write_model(tmp_path)}")
    files = files_at_hand(source)
    assert files is not None and files.path == str(tmp_path)
    facts = read_model_facts(tmp_path)
    assert (facts.num_heads, facts.parameters, facts.dtype) == (3, 32 * 12, "float32")


@pytest.mark.parametrize(
    ("names", "words"),
    [((), "neither"), (("adapter_config.json",), "adapter"), (("pytorch_model.bin",), "")],
)
def test_directories_without_safetensors(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    source = source_of(f"--model-id {tmp_path}")
    if not words:
        assert files_at_hand(source) is None  # to be converted
        return
    with pytest.raises(LaunchError, match=words):
        files_at_hand(source)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    file = write_model(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(LaunchError, match=r"model\.safetensors is cut short: 100 bytes"):
        read_weight_files(tmp_path)
    file.write_bytes(whole[:20])
    with pytest.raises(LaunchError, match=r"model\.safetensors is damaged"):
        read_weight_files(tmp_path)
    file.write_bytes(b"\x10" + bytes(7) + b"not json at all!")
    with pytest.raises(LaunchError, match=r"model\.safetensors is damaged"):
        read_weight_files(tmp_path)


def test_the_index_names_its_files(tmp_path: Path) -> None:
    write_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "lost.safetensors"}})
    )
    with pytest.raises(LaunchError, match="lost"):
        read_weight_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(LaunchError, match="not a readable index"):
        read_weight_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{bad"])
def test_a_bad_config(tmp_path: Path, text: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LaunchError, match=r"config\.json"):
        read_model_facts(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LaunchError, match=r"no config\.json"):
        read_model_facts(tmp_path)


def test_weights_of_another_directory(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    other = tmp_path / "other"
    with pytest.raises(LaunchError, match="not a directory"):
        with_weights_of(files_of(model), str(other), tmp_path / "linked")
    other.mkdir()
    (other / "tuned.safetensors").write_bytes(safetensors({"a": (2,)}))
    linked = with_weights_of(files_of(model), str(other), tmp_path / "linked")
    names = sorted(path.name for path in Path(linked.path).iterdir())
    assert names == ["config.json", "tokenizer_config.json", "tuned.safetensors"]
    assert read_model_facts(Path(linked.path)).parameters == 2


def files_of(directory: Path):
    files = files_at_hand(ModelSource(DIRECTORY, str(directory), str(directory)))
    assert files is not None
    return files


# ----------------------------------------------------------------------- hub


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    models = {"org/model": {**model_files(), "README.md": b"x", "onnx/model.onnx": b"x"}}
    with serving(LocalHub(models)) as running:
        yield running


def test_download_then_offline(hub: LocalHub, tmp_path: Path) -> None:
    source = ModelSource(HUB, "org/model", cache=str(tmp_path / "cache"))
    code, answer, log = prepare(source, tmp_path, HF_ENDPOINT=hub.url)
    assert code == 0, log
    files = read_files(answer)
    assert files.sha == COMMIT and files.path.startswith(str(tmp_path / "cache"))
    assert read_model_facts(Path(files.path)).num_heads == 3
    assert not any("README" in path or "onnx" in path for path in hub.requests)
    assert any("Downloading org/model" in record["message"] for record in log)
    asked = len(hub.requests)
    code, answer, log = prepare(source, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert code == 0 and read_files(answer) == files and len(hub.requests) == asked


def test_a_hub_that_is_gone_and_a_cached_model(hub: LocalHub, tmp_path: Path) -> None:
    source = ModelSource(HUB, "org/model")
    assert prepare(source, tmp_path, HF_ENDPOINT=hub.url)[0] == 0
    code, _, log = prepare(source, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 0, log


@pytest.mark.parametrize(
    ("source", "environment", "words"),
    [
        (ModelSource(HUB, "org/other"), {}, ("org/other", "neither a local path")),
        (ModelSource(HUB, "org/model", revision="v9"), {}, ("org/model", "'v9'")),
        (ModelSource(HUB, "org/model"), {"HF_HUB_OFFLINE": "1"}, ("cache", "HF_HUB_OFFLINE")),
    ],
)
def test_hub_errors(
    hub: LocalHub, tmp_path: Path, source: ModelSource, environment: dict, words: tuple[str, ...]
) -> None:
    code, _, log = prepare(source, tmp_path, HF_ENDPOINT=hub.url, **environment)
    assert code == 2
    assert log[-1]["level"] == "error"
    assert all(word in log[-1]["message"] for word in words), log[-1]
    assert "\n" not in log[-1]["message"]


def test_a_token_opens_a_private_model(tmp_path: Path) -> None:
    with serving(LocalHub({"org/model": model_files()}, token="secret")) as hub:
        source = ModelSource(HUB, "org/model")
        assert prepare(source, tmp_path, HF_ENDPOINT=hub.url)[0] == 2
        code, _, log = prepare(source, tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="secret")
        assert code == 0, log


# ----------------------------------------------------------------------- bin


def test_bin_weights_are_converted_once(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    embedding = torch.arange(24.0).reshape(4, 6)
    torch.save({"embed": embedding, "view": embedding.T}, model / "pytorch_model.bin")
    source = ModelSource(DIRECTORY, "m", str(model))
    code, answer, log = prepare(source, tmp_path)
    assert code == 0, log
    converted = Path(read_files(answer).path)
    assert str(converted).startswith(str(tmp_path / "xdg"))
    tensors = load_file(converted / "model-00001-of-00001.safetensors")
    assert torch.equal(tensors["view"], embedding.T)
    assert read_model_facts(converted).parameters == 48
    before = converted.stat().st_mtime_ns
    code, answer, log = prepare(source, tmp_path)
    assert code == 0 and Path(read_files(answer).path) == converted
    assert converted.stat().st_mtime_ns == before and not log


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    model = write_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    code, _, log = prepare(ModelSource(DIRECTORY, "m", str(model)), tmp_path)
    assert code == 2 and "pytorch_model.bin" in log[-1]["message"]
    assert not (tmp_path / "sprung").exists()
