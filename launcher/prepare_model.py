"""The process that gets a model's files ready: `python -m headgate.launcher.prepare_model`.

It downloads from the hub and converts .gguf and .bin weights, in a process of its own because the
libraries for that are heavy. It logs progress; exit code 2 with one sentence when it fails.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from headgate.launcher.errors import LaunchError
from headgate.launcher.model_files import (
    DIRECTORY,
    EMBEDDED,
    GGUF,
    ModelFiles,
    ModelSource,
    bin_files,
    read_source,
    write_files,
)
from headgate.launcher.process import CONFIGURATION_ERROR
from headgate.launcher.safetensors_header import find_weight_files
from headgate.log import set_up_logging

logger = logging.getLogger("headgate.launcher.prepare_model")


def prepare(source: ModelSource) -> ModelFiles:
    """The checkpoint directory of `source`. Raises LaunchError with one sentence."""
    from headgate.launcher.gguf import GgufError

    try:
        if source.kind == EMBEDDED:
            from headgate.launcher.embedded_model import ensure_embedded_model

            return ModelFiles(str(ensure_embedded_model(report=logger.info)), source.model_id)
        if source.kind == GGUF:
            from headgate.launcher.gguf import convert_gguf

            return ModelFiles(str(convert_gguf(source.path, report=logger.info)), source.model_id)
    except GgufError as error:
        raise LaunchError(_sentence(str(error))) from error
    files = ModelFiles(source.path, source.model_id)
    if source.kind != DIRECTORY:
        from headgate.launcher.hub import download

        path, sha = download(source, report=logger.info)
        files = ModelFiles(str(path), source.model_id, sha)
    directory = Path(files.path)
    if find_weight_files(directory):
        return files
    if not bin_files(directory):
        raise LaunchError(f"{source.model_id} holds neither *.safetensors nor *.bin weights.")
    from headgate.launcher.bin_checkpoint import convert_bin

    return ModelFiles(str(convert_bin(directory, report=logger.info)), files.model_id, files.sha)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def main() -> int:
    """Reads the source's file, writes the answer's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    set_up_logging("model")
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        write_files(prepare(read_source(arguments.source)), arguments.result)
    except LaunchError as error:
        logger.error("%s", error)
        return CONFIGURATION_ERROR
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
