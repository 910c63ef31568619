"""The model's tokenizer: text to ids in a bounded pool of threads, and its files' say on chats.

`tokenizers` only, never `transformers`. `Tokenizer.encode` holds the GIL while
`encode_batch` frees it, so long texts go through a thread and a batch of one. The
tokenizer's truncation and padding state is shared by all threads: it is switched off
once and never touched; who needs fewer tokens slices the ids. Ids to text is
detokenizer.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by the library at its first batch: a pool of threads of its own would take the shards' cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from headgate.router.detokenizer import Pieces

_DEFAULT_TEMPLATE, _TOOL_TEMPLATE = "default", "tool_use"
INLINE_CHARACTERS = 256  # up to here encoding takes less time than a thread's wake-up


class TokenizerError(ValueError):
    """The model directory has no tokenizer that can be loaded. One sentence for the user."""


@dataclass(frozen=True, slots=True)
class Span:
    """A token; `start` and `stop` are character offsets, 0 and 0 if the tokenizer added it."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ChatFiles:
    """What gateways need to render chats; empty strings where the model says nothing."""

    chat_template: str = ""
    tool_chat_template: str = ""  # for chats with tools, where it is another one
    bos_token: str = ""
    eos_token: str = ""


class Tokenizer:
    """One per process. `encode` and `spans` may be awaited by many tasks at once."""

    def __init__(self, backend: tokenizers.Tokenizer, workers: int, model_vocab_size: int = 0):
        """`model_vocab_size`: rows of the model's embedding, where known: it may be padded."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenizer")
        self.vocab_size: int = model_vocab_size or backend.get_vocab_size()
        self.pieces = Pieces.of(backend)

    @classmethod
    def load(cls, model_path: str | Path, workers: int) -> Tokenizer:
        """Raises TokenizerError."""
        path = Path(model_path) / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{model_path} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} cannot be loaded: {error}") from error
        config = _read_json(Path(model_path) / "config.json")
        nested = config.get("text_config")
        size = config.get("vocab_size") or (nested or {}).get("vocab_size") or 0
        return cls(backend, workers, int(size))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; as many as it has, whatever the model's limit."""
        if len(text) <= INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await self._in_pool(self._encode, text, add_special_tokens)

    async def spans(self, text: str, *, add_special_tokens: bool = True) -> list[Span]:
        """The tokens of `text` with the characters they come from."""
        return await self._in_pool(self._spans, text, add_special_tokens)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return batch[0].ids

    def _spans(self, text: str, add_special_tokens: bool) -> list[Span]:
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return [
            Span(id_, text[start:stop], start, stop)
            for id_, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]


def load_chat_files(model_path: str | Path, tokenizer_config_path: str = "") -> ChatFiles:
    """Reads chat template and special tokens.

    `tokenizer_config_path` (a .json or .jinja file) comes before the model's own files; raises
    TokenizerError where it was named but cannot be read.
    """
    directory = Path(model_path)
    config = _read_json(directory / "tokenizer_config.json")
    sources = [config.get("chat_template"), _template_of(directory / "processor_config.json")]
    sources.insert(0, _template_of(directory / "chat_template.json"))
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        sources.insert(0, jinja.read_text(encoding="utf-8"))
    for_tools = directory / "additional_chat_templates" / f"{_TOOL_TEMPLATE}.jinja"
    if for_tools.is_file():
        sources.append([{"name": _TOOL_TEMPLATE, "template": for_tools.read_text("utf-8")}])
    if tokenizer_config_path:
        override = Path(tokenizer_config_path)
        if not override.is_file():
            raise TokenizerError(f"--tokenizer-config-path {override} is not a file")
        if override.suffix == ".jinja":
            sources.insert(0, override.read_text(encoding="utf-8"))
        else:
            named = _read_json(override)
            sources.insert(0, named.get("chat_template"))
            config = {**config, **named}
    return ChatFiles(
        chat_template=_first(sources, _DEFAULT_TEMPLATE),
        tool_chat_template="" if tokenizer_config_path else _first(sources, _TOOL_TEMPLATE),
        bos_token=_token_text(config.get("bos_token")),
        eos_token=_token_text(config.get("eos_token")),
    )


def _template_of(path: Path) -> Any:
    return _read_json(path).get("chat_template")


def _first(sources: list[Any], name: str) -> str:
    """The first template of this name: a source is the default one, or a list of named ones."""
    for source in sources:
        named = {_DEFAULT_TEMPLATE: source}
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source}
        template = named.get(name)
        if template and isinstance(template, str):
            return template
    return ""


def _token_text(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without a file. Raises TokenizerError if malformed."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} does not hold a JSON object")
    return data
