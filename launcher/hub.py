"""Downloads a model from the hub, or finds it in the cache, with progress for the log.

Only what serving needs: configuration, tokenizer, safetensors (.bin weights where there are none).
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the cache variables are huggingface_hub's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from headgate.launcher.autosize import show_bytes
from headgate.launcher.errors import LaunchError
from headgate.launcher.model_files import ModelSource, free_disk

Report = Callable[[str], None]

# The HTTP library's base error; which library that is depends on huggingface_hub's version.
_HTTP_ERROR: type[Exception] = next(
    base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"
)
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken")
_PROGRESS_SECONDS = 3.0


def download(source: ModelSource, *, report: Report) -> tuple[Path, str]:
    """The snapshot's directory and commit. Raises LaunchError with one sentence."""
    name = source.model_id + (f" at {source.revision}" if source.revision else "")
    try:
        return _download(source, name, report)
    except GatedRepoError:
        raise LaunchError(
            f"{name} is gated: accept its terms on {constants.ENDPOINT} and give a token in "
            "HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise LaunchError(f"{source.model_id} has no revision {source.revision!r}.") from None
    except RepositoryNotFoundError:
        raise LaunchError(
            f"{source.model_id} is neither a local path nor a model on {constants.ENDPOINT} that "
            "this user may see (HF_TOKEN gives access to private ones)."
        ) from None
    except LocalEntryNotFoundError:
        raise LaunchError(
            f"{name} is not completely in the cache {_cache(source)}, and the hub "
            f"{constants.ENDPOINT} cannot be asked ({_why_offline()})."
        ) from None
    except HFValidationError:
        raise LaunchError(f"{source.model_id!r} is neither a local path nor a hub id.") from None
    except (HfHubHTTPError, _HTTP_ERROR, RuntimeError) as error:
        raise LaunchError(f"{name} cannot be downloaded: {_first_line(error)}.") from None
    except OSError as error:
        raise LaunchError(
            f"{name} cannot be stored in {_cache(source)}: {error.strerror or error}."
        ) from None


def _download(source: ModelSource, name: str, report: Report) -> tuple[Path, str]:
    revision = source.revision or "main"
    try:
        info = HfApi().model_info(source.model_id, revision=revision, files_metadata=True)
    except (OfflineModeIsEnabled, _HTTP_ERROR) as error:
        if isinstance(error, HfHubHTTPError):  # the hub was asked and said no
            raise
        report(f"The hub cannot be asked ({_first_line(error)}): looking for {name} in the cache.")
        path = snapshot_download(
            source.model_id,
            revision=revision,
            cache_dir=source.cache or None,
            allow_patterns=[*_SMALL_FILES, "*.safetensors"],
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
        return Path(path), Path(path).name
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = choose_files(list(sizes), source.model_id)
    total = sum(sizes[file] for file in wanted)
    missing = total - _stored(source)
    free = free_disk(_cache(source))
    if missing > free:
        raise LaunchError(
            f"{name} needs {show_bytes(missing)} more in {_cache(source)}, where "
            f"{show_bytes(free)} are free."
        )
    with _progress(source, name, total, report):
        path = snapshot_download(
            source.model_id,
            revision=revision,
            cache_dir=source.cache or None,
            allow_patterns=wanted,
        )
    return Path(path), info.sha or Path(path).name


def choose_files(names: list[str], model_id: str) -> list[str]:
    """Of a repository's files those that serving needs. Raises LaunchError where weights lack."""
    top = [name for name in names if "/" not in name]
    small = [name for name in top if any(fnmatch(name, pattern) for pattern in _SMALL_FILES)]
    weights = [name for name in top if name.endswith(".safetensors")]
    # Some repositories hold the weights twice, also in their authors' own layout.
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights:
        weights = [name for name in top if fnmatch(name, "pytorch_model*.bin")]
    if "adapter_config.json" in top and "config.json" not in top:
        raise LaunchError(f"{model_id} is an adapter, not a whole model.")
    if not weights:
        hint = ""
        if any(name.endswith(".gguf") for name in top):
            hint = "; download one of its .gguf files and give its path"
        raise LaunchError(f"{model_id} holds neither *.safetensors nor *.bin weights{hint}.")
    return small + weights


@contextmanager
def _progress(source: ModelSource, name: str, total: int, report: Report) -> Iterator[None]:
    """Reports how much is there while the block runs; says nothing if nothing is missing."""
    done = threading.Event()
    if _stored(source) >= total:
        yield
        return
    report(f"Downloading {name}: {show_bytes(total)} from {constants.ENDPOINT}.")

    def watch() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            stored = min(_stored(source), total)
            report(
                f"Downloading {name}: {100 * stored // max(total, 1)} % "
                f"({show_bytes(stored)} of {show_bytes(total)})."
            )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    report(f"Downloaded {name}.")


def _cache(source: ModelSource) -> Path:
    return Path(source.cache or constants.HF_HUB_CACHE)


def _stored(source: ModelSource) -> int:
    """Bytes of this model in the cache, unfinished files included."""
    folder = _cache(source) / repo_folder_name(repo_id=source.model_id, repo_type="model") / "blobs"
    total = 0
    for path in folder.glob("*"):
        try:
            status = path.stat()
        except OSError:  # renamed meanwhile
            continue
        total += min(status.st_size, status.st_blocks * 512 + 511)
    return total


def _why_offline() -> str:
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
