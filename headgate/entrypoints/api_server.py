"""`python -m headgate.entrypoints.api_server`: `headgate serve` under vLLM's flags."""

from __future__ import annotations

import os
import sys

from headgate.entrypoints.command_line import serve_words
from headgate.launcher.cli import main as headgate
from headgate.launcher.errors import LaunchError
from headgate.launcher.log_output import LogOutput


def main() -> int:
    """Exit codes as `headgate serve`."""
    output = LogOutput.from_environment(json_lines=False)
    try:
        words, notes = serve_words(sys.argv[1:], os.environ)
    except LaunchError as error:
        output.fatal(str(error))
        return 1
    for note in notes:
        output.warn(note)
    return headgate(["serve", *words])


if __name__ == "__main__":
    sys.exit(main())
