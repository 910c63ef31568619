"""`python -m headgate.entrypoints.openai.api_server`: as headgate.entrypoints.api_server."""

from __future__ import annotations

import sys

from headgate.entrypoints.api_server import main

if __name__ == "__main__":
    sys.exit(main())
