"""Servers shared by a test session, started when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.server.live_server import LiveServer, launched


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    """The embedded model on one shard."""
    with launched("--num-shard", "1") as live:
        yield live


@pytest.fixture(scope="session")
def server_2_shards() -> Iterator[LiveServer]:
    """The embedded model on two shards: 9 heads in 3 KV groups, the uneven split."""
    with launched("--num-shard", "2") as live:
        yield live


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")
