"""Converts a checkpoint of pickled .bin files to safetensors, once, into the user's cache.

Pickles are read with torch's `weights_only`, which runs no code from the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from headgate.launcher.errors import LaunchError
from headgate.launcher.gguf import cache_directory
from headgate.launcher.model_files import bin_files, free_disk
from headgate.launcher.safetensors_header import INDEX_NAME

Report = Callable[[str], None]


def convert_bin(directory: Path, *, report: Report) -> Path:
    """A directory with the same model as safetensors; the one made before, if there is one.

    Raises LaunchError with one sentence.
    """
    files = bin_files(directory)
    target = cache_directory() / "converted" / _key(directory, files)
    if target.is_dir():
        return target
    needed = sum(file.stat().st_size for file in files)
    if needed > free_disk(target):
        raise LaunchError(
            f"Converting {directory} to safetensors needs {needed >> 20} MiB in {target.parent}."
        )
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        report(f"Converting {directory} to safetensors: {len(files)} files, once.")
        _convert(files, draft, _is_tied(directory), report)
        for path in directory.iterdir():
            if path.is_file() and path not in files and not path.name.endswith(".bin.index.json"):
                shutil.copyfile(path, draft / path.name)
        try:
            draft.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    except OSError as error:
        raise LaunchError(
            f"{directory} cannot be converted in {target.parent}: {error.strerror or error}."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _key(directory: Path, files: list[Path]) -> str:
    """Names the content: path, sizes and times of change."""
    text = str(directory.resolve())
    for file in files:
        status = file.stat()
        text += f"|{file.name}:{status.st_size}:{status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _is_tied(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "config.json").read_text())["tie_word_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(files: list[Path], target: Path, tied: bool, report: Report) -> None:
    import torch
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # an old file that cannot be mapped
            loaded = _load_whole(file)
        except pickle.UnpicklingError:
            raise LaunchError(_unsafe(file)) from None
        tensors = {
            key: value.contiguous().clone()
            for key, value in loaded.items()
            if isinstance(value, torch.Tensor) and not (tied and key.endswith("lm_head.weight"))
        }
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        report(f"Converted {file.name} ({number} of {len(files)}).")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / INDEX_NAME).write_text(json.dumps(index))


def _load_whole(file: Path) -> dict[str, object]:
    import torch

    try:
        loaded: dict[str, object] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise LaunchError(_unsafe(file)) from None
    except (RuntimeError, EOFError):
        raise LaunchError(f"{file} is damaged: it is not a file of PyTorch weights.") from None
    return loaded


def _unsafe(file: Path) -> str:
    return (
        f"{file} is damaged or holds more than weights, and Headgate runs no code from "
        "checkpoints: use a safetensors version of the model."
    )
