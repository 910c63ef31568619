"""`python runner.py MODULE.py URL`: runs the module's rows, prints {row: "" or what went wrong}."""

from __future__ import annotations

import json
import runpy
import sys
import traceback


def main() -> None:
    module, url = sys.argv[1:]
    outcomes = {}
    for name, row in runpy.run_path(module).items():
        if name.startswith("row_"):
            try:
                row(url)
                outcomes[name] = ""
            except BaseException:
                outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
