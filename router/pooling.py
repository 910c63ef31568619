"""Embeddings of prompts: which pooling a model wants, and vectors of length 1."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from headgate.proto.messages import Pooling

_CHOICES = {"mean": Pooling.MEAN, "last": Pooling.LAST}
# The key of sentence-transformers' pooling layer, where a checkpoint has one.
_LAST_TOKEN = "pooling_mode_lasttoken"


def pooling_of(choice: str, model_path: str | Path) -> Pooling:
    """The server's pooling. `choice`: "mean", "last", or "auto": the model's own, else mean."""
    if choice in _CHOICES:
        return _CHOICES[choice]
    try:
        layer = json.loads((Path(model_path) / "1_Pooling" / "config.json").read_text())
    except (OSError, ValueError):
        return Pooling.MEAN
    last = isinstance(layer, dict) and layer.get(_LAST_TOKEN)
    return Pooling.LAST if last else Pooling.MEAN


def normalised(vector: Sequence[float]) -> list[float]:
    """The vector divided by its Euclidean length; one of zeros stays as it is."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)
