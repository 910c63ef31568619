"""The one exception that ends a launch: its text is a sentence meant for the user."""

from __future__ import annotations


class LaunchError(Exception):
    """Why the launcher cannot start or go on; `str(error)` is one sentence, exit code 1."""
