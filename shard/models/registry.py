"""Models by architecture name, and `load_model`, which builds one from a checkpoint.

A user's own model is a Python file whose class is decorated with `@register("TheArchitecture")`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from headgate.quant_kinds import KINDS
from headgate.shard.distributed import Group
from headgate.shard.errors import ModelError
from headgate.shard.load_context import LoadContext
from headgate.shard.model_config import architecture_of, parse_model_config, read_config_files
from headgate.shard.models.base import CausalLM
from headgate.shard.partition import make_partition
from headgate.shard.weights import Weights

_BUILT_IN = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STATE_SPACE = ("mamba", "rwkv", "jamba", "bamba", "zamba", "hymba", "falcon_h1", "xlstm")
_SEQ2SEQ = ("t5", "bart", "pegasus", "marian", "whisper", "m2m", "prophetnet", "led")

_models: dict[str, type[CausalLM]] = {}

Model = TypeVar("Model", bound=type[CausalLM])


def register(*architectures: str) -> Callable[[Model], Model]:
    """Class decorator: serve checkpoints whose config.json names one of `architectures`."""

    def add(model: Model) -> Model:
        _models.update(dict.fromkeys(architectures, model))
        return model

    return add


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device,
    group: Group,
    quantize: str = "",
    precision: str = "highest",
    model_module: str = "",
    rope_scaling: str = "",
    rope_factor: float = 0.0,
    max_positions: int = 0,
) -> CausalLM:
    """Reads this rank's part of the checkpoint directory `path`, for the kernels in use.

    `quantize`: the kind its matrices are quantised to (headgate.kernels.quantised), "" for none.
    `precision`: of products' inputs, "highest" or "medium" (see Weights).
    `max_positions`: the longest sequence that will be served (0: what config.json says); RoPE kinds
    that depend on a length take it, see layers/rotary.py. Raises ModelError, one sentence that says
    what is wrong, for whatever in the checkpoint or the settings can't be served.
    """
    files = read_config_files(path)
    # What is not supported must be said before its config is missed for not looking like Llama's.
    model_class = _find(files[0], model_module)
    _check_quantisation(files[0], quantize)
    config = parse_model_config(*files, rope_scaling, rope_factor)
    weights = Weights(
        path, dtype=_dtype(dtype), device=device, quantize=quantize, precision=precision
    )
    context = LoadContext(
        config=config,
        weights=weights,
        partition=make_partition(config, group.world_size, helping=group.hands_over),
        group=group,
        max_positions=max_positions or config.max_position_embeddings,
    )
    model = model_class(context)
    context.weights.finish()
    model.weight_bytes = context.weights.nbytes
    return model


def supported() -> list[str]:
    """Architecture names there are models for."""
    for name in _BUILT_IN:
        importlib.import_module(f"headgate.shard.models.{name}")
    return sorted(_models)


def _find(config: Mapping[str, Any], model_module: str) -> type[CausalLM]:
    architecture = architecture_of(config)
    names = supported()
    if model_module:
        _import_file(Path(model_module))
        names = sorted(_models)
    if architecture in _models:
        return _models[architecture]
    kind = _kind(architecture, config)
    raise ModelError(
        f"{architecture or 'a model without an architecture in config.json'} is not supported"
        f"{f': it is {kind}' if kind else ''} (supported: {', '.join(names)})"
    )


def _kind(architecture: str, config: Mapping[str, Any]) -> str:
    """What an unsupported model is, where that can be told."""
    words = f"{config.get('model_type', '')} {architecture}".lower()
    if "vision_config" in config or any(word in words for word in ("llava", "vision", "_vl")):
        return "a vision-language model"
    if config.get("is_encoder_decoder") or any(
        words.startswith(word) or f" {word}" in words for word in _SEQ2SEQ
    ):
        return "an encoder-decoder model"
    if any(word in words for word in _STATE_SPACE):
        return "a state-space model"
    if architecture and not architecture.endswith("ForCausalLM"):
        return "not a causal language model"
    return ""


def _import_file(path: Path) -> None:
    """Runs a user's model file, which registers its classes."""
    name = f"headgate_model_{path.stem}"
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError("it is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is told to the user
        raise ModelError(f"model module {path}: {type(error).__name__}: {error}") from error


def _check_quantisation(config: Mapping[str, Any], quantize: str) -> None:
    stored = (config.get("quantization_config") or {}).get("quant_method")
    if stored:
        raise ModelError(f"a checkpoint quantised by {stored!r} is not supported")
    if quantize and quantize not in KINDS:
        raise ModelError(f"quantize {quantize!r} is not supported; there are {', '.join(KINDS)}")


def _dtype(name: str | torch.dtype) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise ModelError(f"dtype {name!r} is not supported; there are {', '.join(_DTYPES)}")
    return _DTYPES[name]
