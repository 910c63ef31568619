"""What the user asked for: LauncherConfig, resolved from command line, environment and defaults.

It applies each flag's policy and the rules between flags. It neither looks at the machine nor at
the model; None in a field means that autosize.py works the value out.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headgate.launcher.errors import LaunchError
from headgate.launcher.flag import (
    Flag,
    FlagValue,
    Kind,
    Policy,
    is_service_link,
    parse_bool,
    parse_value,
)
from headgate.launcher.flags import BY_KEY, FLAGS
from headgate.launcher.variables import VARIABLES


@dataclass(frozen=True, slots=True)
class LauncherConfig:
    """One field per flag that works, in the order of flags.py."""

    model_id: str  # "": the embedded model
    revision: str
    served_model_name: str
    tokenizer_config_path: str
    tool_call_parser: str
    reasoning_parser: str
    pooling: str
    model_module: str
    dtype: str | None
    quantize: str | None
    matmul_precision: str
    kv_cache_dtype: str
    rope_scaling: str | None
    rope_factor: float | None
    huggingface_hub_cache: str
    weights_cache_override: str
    speculate: int | None
    sharded: bool | None
    num_shard: int | None
    threads_per_shard: int | None
    kernels: str
    batch_invariant: bool
    cuda_graphs: str
    cuda_memory_fraction: float
    shard_uds_path: str
    master_addr: str
    master_port: int | None
    null_shard: bool
    heartbeat_timeout: float  # seconds, as all times
    startup_timeout: float
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    max_batch_prefill_tokens: int | None
    max_batch_total_tokens: int | None
    max_batch_size: int | None
    max_client_batch_size: int
    block_size: int
    kv_overcommit: float
    disable_prefix_caching: bool
    disable_grammar_support: bool
    watermark_gamma: float
    watermark_delta: float
    hostname: str
    port: int
    grpc_port: int | None
    grpc_hostname: str
    gateway_workers: int
    api_key: str
    cors_allow_origin: tuple[str, ...]
    payload_limit: int  # bytes
    validation_workers: int
    vllm_stream_delimiter: str
    strict: bool
    graceful_termination_timeout: float
    json_output: bool
    log_prompts: bool
    env: bool
    compute_type: str  # the variable COMPUTE_TYPE; "": made from the hardware
    predict_route: str  # the variable AIP_PREDICT_ROUTE
    health_route: str  # the variable AIP_HEALTH_ROUTE
    warnings: tuple[str, ...]  # one line each, said once at start


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and how the user gave it, for messages."""

    value: FlagValue
    source: str


def resolve_config(
    arguments: Mapping[str, str | bool | list[str] | None], environment: Mapping[str, str]
) -> LauncherConfig:
    """Command line over environment over default.

    `arguments` maps each flag's key to its raw text, absent or None where not given. Raises
    LaunchError with one sentence for a bad value, a refused flag or a broken rule.
    """
    warnings: list[str] = []
    given: dict[str, _Given] = {}
    for flag in FLAGS:
        found = _from_command_line(flag, arguments.get(flag.key))
        if found is None:
            found = _from_environment(flag, environment, warnings)
        if found is not None and _has_effect(flag, found, warnings):
            given[flag.key] = found
    _check_variables(environment, warnings)
    _merge_aliases(given)
    _check_rules(given)
    values: dict[str, Any] = {
        flag.key: given[flag.key].value if flag.key in given else flag.default
        for flag in FLAGS
        if flag.policy is Policy.WORKS
    }
    prefix_caching = environment.get("PREFIX_CACHING", "")
    if prefix_caching and not parse_bool(prefix_caching):
        values["disable_prefix_caching"] = True
    if values["rope_scaling"] and values["rope_factor"] is None:
        values["rope_factor"] = 1.0
    if values["rope_factor"] and not values["rope_scaling"]:
        values["rope_scaling"] = "linear"
    return LauncherConfig(
        **values,
        compute_type=environment.get("COMPUTE_TYPE", ""),
        predict_route=_route(environment, "AIP_PREDICT_ROUTE"),
        health_route=_route(environment, "AIP_HEALTH_ROUTE"),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _route(environment: Mapping[str, str], name: str) -> str:
    """A path that Vertex AI wants served, or empty. Raises LaunchError."""
    path = environment.get(name, "").strip()
    if path and (not path.startswith("/") or "{" in path):
        raise LaunchError(f"{name} must be a path that begins with /, not {path!r}.")
    return path


def _from_command_line(flag: Flag, raw: str | bool | list[str] | None) -> _Given | None:
    source = f"--{flag.name}"
    if raw is None or raw is False:
        return None
    if raw is True:
        return _Given(True, source)
    if isinstance(raw, list):
        items: Iterable[FlagValue] = (parse_value(flag, text, source) for text in raw)
        return _Given(tuple(i for t in items if isinstance(t, tuple) for i in t), source)
    if raw == "" and flag.kind not in (Kind.TEXT, Kind.PATH):
        raise LaunchError(f"{source} needs a value.")
    if raw == "":
        return _Given(flag.default, source)
    return _Given(parse_value(flag, raw, source), source)


def _from_environment(
    flag: Flag, environment: Mapping[str, str], warnings: list[str]
) -> _Given | None:
    if not flag.env:
        return None
    for name in (*flag.env_before, flag.env, *flag.env_aliases):
        text = environment.get(name, "").strip()
        if not text or _is_trap(flag, name, text):
            continue
        if is_service_link(flag, text):
            warnings.append(
                f"{name}={text} is the link of a Kubernetes service, not a setting: ignored"
            )
            continue
        return _Given(parse_value(flag, text, name), name)
    return None


def _is_trap(flag: Flag, name: str, text: str) -> bool:
    """Values that container platforms set for purposes of their own."""
    if flag.key == "hostname":  # the pod's or container's name: not an address to listen on
        return text != "localhost" and not _is_address(text)
    return name == "SM_NUM_GPUS" and text == "0"  # SageMaker on a machine without GPUs


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _has_effect(flag: Flag, found: _Given, warnings: list[str]) -> bool:
    """Applies the flag's policy. Raises LaunchError for what is refused."""
    value = found.value
    if value in flag.refused_values:
        there = ", ".join(c for c in flag.choices if c not in flag.refused_values)
        raise LaunchError(
            f"{found.source} {value} is not available in this version; there is {there}."
        )
    if flag.policy in (Policy.WORKS, Policy.ALIAS):
        return True
    if value is None or value in flag.neutral:
        return False
    if flag.policy is Policy.REFUSED:
        shown = "" if flag.kind is Kind.SWITCH else f" {_shown(value)}"
        raise LaunchError(f"{found.source}{shown} cannot be served: {flag.note}.")
    warnings.append(f"{found.source} has no effect: {flag.note}")
    return False


def _shown(value: FlagValue) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _check_variables(environment: Mapping[str, str], warnings: list[str]) -> None:
    for variable in VARIABLES:
        text = environment.get(variable.name, "")
        if variable.policy is Policy.NO_OP and text and text not in variable.neutral:
            warnings.append(f"{variable.name} has no effect: {variable.help.rstrip('.')}")


def _merge_aliases(given: dict[str, _Given]) -> None:
    """Moves the value of an alias to the flag it stands for. Raises LaunchError if both differ."""
    for flag in FLAGS:
        if flag.policy is not Policy.ALIAS or flag.key not in given:
            continue
        alias = given.pop(flag.key)
        target = BY_KEY[flag.note.lstrip("-").replace("-", "_")]
        other = given.get(target.key)
        if other is None:
            given[target.key] = alias
        elif other.source.startswith("--") == alias.source.startswith("--"):
            raise LaunchError(
                f"{alias.source} is the old name of --{target.name}: give one of the two."
            )
        elif alias.source.startswith("--"):
            given[target.key] = alias


def _check_rules(given: Mapping[str, _Given]) -> None:
    """The rules between flags that need neither machine nor model."""
    _ordered(given, "max_input_tokens", "max_total_tokens", strictly=True)
    _ordered(given, "max_total_tokens", "max_batch_total_tokens", strictly=False)
    sharded, shards = given.get("sharded"), given.get("num_shard")
    if sharded and sharded.value and shards and shards.value == 1:
        raise LaunchError(
            f"{sharded.source} true needs at least 2 shards, but {shards.source} is 1."
        )
    block_size = given.get("block_size")
    if (
        block_size
        and isinstance(block_size.value, int)
        and block_size.value & (block_size.value - 1)
    ):
        raise LaunchError(f"{block_size.source} must be a power of two, not {block_size.value}.")


def _ordered(given: Mapping[str, _Given], low: str, high: str, *, strictly: bool) -> None:
    first, second = given.get(low), given.get(high)
    if first is None or second is None:
        return
    a, b = first.value, second.value
    if isinstance(a, int) and isinstance(b, int) and (a > b or (strictly and a == b)):
        relation = "below" if strictly else "at most"
        raise LaunchError(f"{first.source} ({a}) must be {relation} {second.source} ({b}).")
