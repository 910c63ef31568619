"""A command line of vLLM's server as one of `headgate serve`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence

from headgate.entrypoints.flags import LOOKUP_NOTE, VLLM_FLAGS, VllmFlag
from headgate.launcher.errors import LaunchError
from headgate.launcher.flag import Policy
from headgate.llm_arguments import DTYPES, KV_CACHE_DTYPES, STOP_TEXTS
from headgate.speculative_config import LOOKUP_SIZES, draft_tokens

# vLLM queues whatever comes and bounds little: its defaults in place of TGI's.
LIMITS = {
    "port": "8000",
    "max-concurrent-requests": "16384",
    "max-batch-size": "256",
    "max-stop-sequences": str(STOP_TEXTS),
    "max-top-n-tokens": "20",
    "max-client-batch-size": "1024",
    "payload-limit": "67108864",
}
_LENGTHS = frozenset({"max-model-len", "max-num-batched-tokens"})
_SUFFIXES = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}


def serve_words(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Words for `headgate serve`, and what to warn of.

    Words that are not vLLM's are handed on, so that Headgate's own flags can be given too. Raises
    LaunchError for a flag that is refused.
    """
    given, others = _parser().parse_known_args([_dashed(word) for word in arguments])
    words: dict[str, list[str]] = {}
    notes: list[str] = []
    for flag in VLLM_FLAGS:
        value = getattr(given, flag.name)
        if value is None or _is_neutral(flag, value):
            continue
        if flag.policy is Policy.REFUSED:
            shown = f" {value}" if flag.neutral and isinstance(value, str) else ""
            raise LaunchError(f"--{flag.name}{shown} cannot be served: {flag.note}.")
        if flag.policy is Policy.NO_OP:
            notes.append(f"--{flag.name} has no effect: {flag.note}")
        elif flag.note in words:
            raise LaunchError(f"--{flag.name} says {flag.note} a second time: give one of the two.")
        else:
            words[flag.note] = _values(flag, value, notes)
    defaults = dict(LIMITS)
    if api_key := environment.get("VLLM_API_KEY"):
        defaults["api-key"] = api_key
    if model := environment.get("MODEL_NAME"):
        defaults["model-id"] = model
    for name, text in defaults.items():
        words.setdefault(f"--{name}", [text])
    line = [(name, value) for name, values in words.items() for value in values]
    return [*(f"{name}={value}" if value else name for name, value in line), *others], notes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headgate.entrypoints.api_server",
        allow_abbrev=False,
        description="Headgate under the flags of vLLM's server, on port 8000.",
        epilog="Flags of `headgate serve` may be given too; docs/configuration.md has the table.",
    )
    for flag in VLLM_FLAGS:
        names = [f"--{flag.name}"] + ([flag.short] if flag.short else [])
        if flag.switch:
            action = argparse.BooleanOptionalAction
            parser.add_argument(*names, dest=flag.name, action=action, help=_help(flag))
        else:
            parser.add_argument(
                *names, dest=flag.name, nargs="+" if flag.several else None, help=_help(flag)
            )
    return parser


def _help(flag: VllmFlag) -> str:
    kind = {Policy.WORKS: "as", Policy.NO_OP: "no effect:", Policy.REFUSED: "refused:"}
    return f"{kind[flag.policy]} {flag.note}".replace("%", "%%")


def _dashed(word: str) -> str:
    """vLLM takes underscores in the names of flags."""
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value if name.startswith("--") else word


def _is_neutral(flag: VllmFlag, value: str | bool | list[str]) -> bool:
    if flag.policy is not Policy.WORKS and value is False:
        return True
    return isinstance(value, str) and value in flag.neutral


def _values(flag: VllmFlag, value: str | bool | list[str], notes: list[str]) -> list[str]:
    """Values of the flag of `headgate serve`; an empty one for a switch. Adds to `notes`.

    Raises LaunchError.
    """
    if flag.name == "enable-prefix-caching":
        return [] if value else [""]
    if isinstance(value, bool):
        return [""] if value else []
    if isinstance(value, list):
        if len(value) > 1:
            raise LaunchError(f"--{flag.name} takes one value here, not {len(value)}.")
        return value
    if flag.name == "allowed-origins":
        return _origins(value)
    if flag.name == "speculative-config":
        return [_speculate(value, notes)]
    if flag.name == "dtype":
        return [DTYPES.get(value, value)]
    if flag.name == "kv-cache-dtype":
        return [KV_CACHE_DTYPES.get(value, value)]
    if flag.name == "quantization":
        return [value.removesuffix("_marlin")]
    return [_length(value)] if flag.name in _LENGTHS else [value]


def _speculate(text: str, notes: list[str]) -> str:
    try:
        config = json.loads(text)
    except ValueError:
        config = text
    try:
        number = draft_tokens(config, "--speculative-config")
    except ValueError as error:
        raise LaunchError(f"{error}.") from None
    for key in LOOKUP_SIZES:
        if config.get(key) is not None:
            notes.append(f"`{key}` of --speculative-config has no effect: {LOOKUP_NOTE}")
    return str(number)


def _origins(text: str) -> list[str]:
    try:
        origins = json.loads(text)
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(one, str) for one in origins):
        raise LaunchError(f"--allowed-origins must be a JSON list of strings, not {text!r}.")
    return [] if "*" in origins else origins


def _length(text: str) -> str:
    """vLLM's short forms: 32k is 32000, 32K is 32768."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG])", text)
    return str(int(float(match[1]) * _SUFFIXES[match[2]])) if match else text
