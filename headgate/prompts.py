"""The forms a prompt may have in `LLM.generate`, and one form for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


class TextPrompt(TypedDict):
    """A prompt to be tokenised."""

    prompt: str


class _Ids(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_Ids, total=False):
    """A prompt as token ids; `prompt`, its text, is only given back."""

    prompt: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text, token ids or both; ids count where there are any."""

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    add_special_tokens: bool = True  # False: the text is a rendered chat, which holds them


def read_prompts(given: Any) -> list[Prompt]:
    """One prompt or a list of them; a list of numbers is one prompt.

    Raises TypeError for what is no prompt, ValueError for one that is not served.
    """
    if isinstance(given, (str, Mapping)) or _is_ids(given):
        return [_read(given, "the prompt")]
    if not isinstance(given, Sequence):
        raise TypeError(f"prompts must be a string, a dict or a list, not {type(given).__name__}")
    return [_read(one, f"prompt {index}") for index, one in enumerate(given)]


def _read(given: Any, where: str) -> Prompt:
    if isinstance(given, str):
        return Prompt(text=given)
    if _is_ids(given):
        return Prompt(token_ids=_ids(given, where))
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be a string, a dict or token ids, not {given!r:.80}")
    for name, value in given.items():
        if name not in ("prompt", "prompt_token_ids", "type") and value is not None:
            raise ValueError(f"{where}: `{name}` is not supported")
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{where}: `prompt` must be a string, not {text!r:.80}")
    if ids is None and text is None:
        raise ValueError(f"{where} has neither `prompt` nor `prompt_token_ids`")
    return Prompt(text=text, token_ids=None if ids is None else _ids(ids, where))


def _is_ids(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, (str, bytes))
        and len(given) > 0
        and all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in given)
    )


def _ids(given: Any, where: str) -> tuple[int, ...]:
    if not _is_ids(given) or not all(0 <= id_ < 2**32 for id_ in given):
        raise ValueError(f"{where} must have token ids, and at least one: {given!r:.80}")
    return tuple(given)
