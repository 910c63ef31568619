"""Errors of the shard that other processes are told of."""

from __future__ import annotations


class ModelError(Exception):
    """The model can't be served as configured. One sentence: what is wrong, and where."""


class PeerLost(Exception):
    """A collective failed: another shard of the group died, hung or left. The group is finished."""
