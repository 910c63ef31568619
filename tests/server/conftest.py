"""Servers and a reference shared by a test session, started when first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headgate.launcher.embedded_model import ensure_embedded_model
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


@pytest.fixture(scope="session")
def small(tiny_checkpoint: Path) -> Iterator[LiveServer]:
    """A fast model with room for 128 tokens and 8 requests."""
    flags = ("--max-total-tokens", "128", "--max-concurrent-requests", "8")
    with launched("--model-id", str(tiny_checkpoint), *flags) as live:
        yield live


@pytest.fixture(scope="session")
def reference() -> Any:
    """The embedded model in Transformers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ensure_embedded_model(), dtype=torch.float32)
    return model.eval().requires_grad_(False)
