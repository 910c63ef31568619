"""`python -m headgate.launcher.private`: a server for one Python program, and for nobody else.

It opens no port: the program talks to the router over the socket in the run directory that it made,
and the server stops when the program does. The log goes to standard output; standard error
has nothing but the sentence that ends a launch.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from headgate.launcher.cli import parse_serve
from headgate.launcher.errors import LaunchError
from headgate.launcher.log_output import LogOutput
from headgate.launcher.run_directory import RunDirectory
from headgate.launcher.supervisor import serve

_LOOK_SECONDS = 0.25  # between two looks whether the program is still there


class _PrivateLog(LogOutput):
    def fatal(self, message: str) -> None:
        """The bare sentence: the program makes an exception of it."""
        self._print(self._err, message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until the program asks it to stop or ends. Exit codes as `headgate serve`."""
    parser = argparse.ArgumentParser(prog="headgate.launcher.private", allow_abbrev=False)
    parser.add_argument("--run-directory", required=True, type=Path, help="where sockets are made")
    parser.add_argument("--parent", required=True, type=int, help="process id of the program")
    own, flags = parser.parse_known_args(arguments)
    run = RunDirectory(own.run_directory)
    try:
        config = replace(
            parse_serve(flags, dict(os.environ)), gateway_workers=0, grpc_hostname="", api_key=""
        )
    except LaunchError as error:
        print(error, file=sys.stderr)
        run.remove()
        return 1
    output = _PrivateLog.from_environment(json_lines=config.json_output)
    # Not PR_SET_PDEATHSIG: it strikes when the thread that started this process ends.
    threading.Thread(target=_stop_with, args=(own.parent,), daemon=True).start()
    return serve(config, output, run)


def _stop_with(parent: int) -> None:
    """Waits for the program's end; then SIGTERM, twice should the first be lost or too polite."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
