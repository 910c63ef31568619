"""Where the model comes from: what `--model-id` may be, and whether a child must prepare its files.

It touches no network and reads no weights; prepare_model.py, in a process of its own, downloads and
converts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from headgate.launcher.config import LauncherConfig
from headgate.launcher.errors import LaunchError
from headgate.launcher.safetensors_header import find_weight_files

EMBEDDED, DIRECTORY, GGUF, HUB = "embedded", "directory", "gguf", "hub"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What the user asked to serve, and how to get it."""

    kind: str  # EMBEDDED, DIRECTORY, GGUF or HUB
    model_id: str  # as clients see it
    path: str = ""  # DIRECTORY and GGUF
    revision: str = ""  # HUB
    cache: str = ""  # HUB: the cache directory; "": huggingface_hub's default


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A checkpoint directory that the shards can read."""

    path: str
    model_id: str
    sha: str = ""  # the commit of a hub model


def find_source(config: LauncherConfig) -> ModelSource:
    """Tells what `--model-id` is. Raises LaunchError for a path that is not there."""
    text = config.model_id
    if not text:
        return ModelSource(EMBEDDED, EMBEDDED_ID)
    path = Path(text).expanduser()
    if path.is_dir():
        return ModelSource(DIRECTORY, text, str(path.resolve()))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelSource(GGUF, text, str(path.resolve()))
        raise LaunchError(
            f"--model-id {text} is a file that is not .gguf: give the checkpoint's directory."
        )
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(text):
        raise LaunchError(f"--model-id {text} does not exist.")
    cache = config.huggingface_hub_cache
    if cache and Path(cache).exists() and not os.access(cache, os.W_OK | os.X_OK):
        raise LaunchError(f"--huggingface-hub-cache {cache} is not writable.")
    return ModelSource(HUB, text, revision=config.revision, cache=cache)


def files_at_hand(source: ModelSource, weights_override: str = "") -> ModelFiles | None:
    """The checkpoint, if it needs no preparation. Raises LaunchError if it cannot be one.

    `weights_override`: the directory of the weights, where they are not the model's own.
    """
    if source.kind != DIRECTORY:
        return None
    directory = Path(source.path)
    if weights_override or find_weight_files(directory):
        return ModelFiles(source.path, source.model_id)
    if bin_files(directory):
        return None
    if (directory / "adapter_config.json").exists():
        raise LaunchError(f"{directory} holds an adapter, not a whole model.")
    raise LaunchError(
        f"{directory} holds neither *.safetensors nor pytorch_model*.bin files, so it is not a "
        "model checkpoint."
    )


def bin_files(directory: Path) -> list[Path]:
    """The pickled weight files of an older checkpoint."""
    return sorted(directory.glob("pytorch_model*.bin"))


def check_paths(config: LauncherConfig) -> None:
    """Files that flags name must be there. Raises LaunchError."""
    for flag, text in (
        ("--tokenizer-config-path", config.tokenizer_config_path),
        ("--model-module", config.model_module),
    ):
        if text and not Path(text).is_file():
            raise LaunchError(f"{flag} {text} does not exist.")


def with_weights_of(files: ModelFiles, weights: str, target: Path) -> ModelFiles:
    """A directory of links: the model's own files, with the weights in directory `weights`.

    Raises LaunchError when that holds no safetensors.
    """
    folder = Path(weights)
    if not folder.is_dir():
        raise LaunchError(f"--weights-cache-override {weights} is not a directory.")
    replacements = find_weight_files(folder)
    if not replacements:
        raise LaunchError(f"--weights-cache-override {weights} holds no *.safetensors files.")
    target.mkdir()
    for path in Path(files.path).iterdir():
        if ".safetensors" not in path.name and not path.name.endswith(".bin"):
            (target / path.name).symlink_to(path.resolve())
    for path in (*replacements, *folder.glob("*.safetensors.index.json")):
        (target / path.name).symlink_to(path.resolve())
    return ModelFiles(str(target), files.model_id, files.sha)


def write_source(source: ModelSource, path: Path) -> None:
    """For the child that prepares the files."""
    path.write_text(json.dumps(asdict(source)))


def read_source(path: Path) -> ModelSource:
    """The inverse of write_source."""
    return ModelSource(**json.loads(path.read_text()))


def write_files(files: ModelFiles, path: Path) -> None:
    """The answer of the child that prepared them."""
    path.write_text(json.dumps(asdict(files)))


def read_files(path: Path) -> ModelFiles:
    """The inverse of write_files."""
    return ModelFiles(**json.loads(path.read_text()))


def free_disk(path: Path) -> int:
    """Free bytes on the disk that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
