"""The commands `headgate` and `text-generation-launcher`.

They parse arguments and hand over to the supervisor; what a value means is decided in config.py.
Exit codes: 0 asked to stop, 1 cannot start or go on (one sentence says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from headgate import __version__
from headgate.launcher.config import LauncherConfig, resolve_config
from headgate.launcher.errors import LaunchError
from headgate.launcher.flag import Flag, Kind, Policy
from headgate.launcher.flags import FLAGS, GROUPS
from headgate.launcher.log_output import LogOutput

DESCRIPTION = "Serve an open-weight language model over HTTP and gRPC."
BATCH = (
    "Answer a file of requests in OpenAI's batch format, without opening a port. After a kill the "
    "same command goes on where the output ends."
)
PRINT_SCHEMA = (
    "Print the OpenAPI document that a server answers at /openapi.json, with TGI's limits."
)
_INPUT = "Requests, one JSON object a line: custom_id, method, url, body."
_OF_PORTS = frozenset(
    {
        *("hostname", "port", "grpc-hostname", "grpc-port", "gateway-workers", "api-key"),
        *("cors-allow-origin", "graceful-termination-timeout", "prometheus-port"),
        *("ngrok", "ngrok-authtoken", "ngrok-edge"),
    }
)
_OUTPUT = "Results in the same order: id, custom_id, response, error."


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag when one is misspelt."""

    def error(self, message: str) -> NoReturn:
        for word in message.split():
            if word.startswith("--"):
                name = word.split("=")[0].rstrip(":,")
                near = get_close_matches(name.replace("_", "-"), [f"--{f.name}" for f in FLAGS], 1)
                if near and near[0] != name:
                    message += f" (did you mean {near[0]}?)"
                break
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """The `headgate` command."""
    parser = _Parser(prog="headgate", description=DESCRIPTION, allow_abbrev=False)
    _add_version(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve", help="start a server", description=DESCRIPTION, allow_abbrev=False
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help="as --model-id")
    _add_flags(serve)
    batch = commands.add_parser(
        "batch", help="answer a file of requests", description=BATCH, allow_abbrev=False
    )
    batch.add_argument("--input", "-i", type=Path, required=True, metavar="PATH", help=_INPUT)
    batch.add_argument("--output", "-o", type=Path, required=True, metavar="PATH", help=_OUTPUT)
    _add_flags(batch, without=_OF_PORTS)
    commands.add_parser(
        "print-schema", help="print the API's OpenAPI document", description=PRINT_SCHEMA
    )
    parsed = parser.parse_args(arguments)
    if parsed.command == "print-schema":
        from headgate.print_schema import print_schema  # the gateway: not needed to serve

        return print_schema()
    if parsed.command == "serve" and parsed.model is not None:
        if parsed.model_id is not None:
            serve.error(f"MODEL ({parsed.model}) and --model-id: give one of the two")
        parsed.model_id = parsed.model
    return _batch(parsed) if parsed.command == "batch" else _serve(parsed)


def text_generation_launcher(arguments: Sequence[str] | None = None) -> int:
    """`headgate serve` under TGI's name."""
    parser = _Parser(prog="text-generation-launcher", description=DESCRIPTION, allow_abbrev=False)
    _add_version(parser)
    _add_flags(parser)
    return _serve(parser.parse_args(arguments))


def parse_serve(arguments: Sequence[str], environment: dict[str, str]) -> LauncherConfig:
    """The configuration that `headgate serve ARGUMENTS` would run with. Raises LaunchError."""
    parser = _Parser(prog="headgate serve", allow_abbrev=False)
    _add_flags(parser)
    return resolve_config(vars(parser.parse_args(arguments)), environment)


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", "-V", action="version", version=f"%(prog)s (Headgate) {__version__}"
    )


def _add_flags(parser: argparse.ArgumentParser, without: frozenset[str] = frozenset()) -> None:
    parser.epilog = (
        "Each flag can be given by the environment variable in brackets too; the command line "
        "wins. docs/configuration.md describes them all."
    )
    for title, flags in GROUPS:
        group = parser.add_argument_group(title)
        for flag in flags:
            if flag.name in without:
                continue
            names = [f"-{flag.short}"] if flag.short else []
            names.append(f"--{flag.name}")
            if flag.kind is Kind.SWITCH:
                group.add_argument(
                    *names, dest=flag.key, action="store_true", default=None, help=_help(flag)
                )
            else:
                group.add_argument(
                    *names,
                    dest=flag.key,
                    action="append" if flag.kind is Kind.LIST else "store",
                    metavar="{" + ",".join(flag.choices) + "}"
                    if flag.choices
                    else _METAVARS[flag.kind],
                    help=_help(flag),
                )


_METAVARS = {
    Kind.TEXT: "TEXT",
    Kind.PATH: "PATH",
    Kind.INTEGER: "N",
    Kind.NUMBER: "X",
    Kind.PORT: "PORT",
    Kind.BOOLEAN: "true|false",
    Kind.LIST: "A,B",
}


def _help(flag: Flag) -> str:
    parts = [flag.help]
    if flag.policy is Policy.REFUSED:
        parts.append(f"Refused: {flag.note}.")
    elif flag.policy is Policy.NO_OP:
        parts.append(f"No effect: {flag.note}.")
    elif flag.kind is not Kind.SWITCH and flag.policy is Policy.WORKS:
        parts.append(f"Default: {flag.default_shown}.")
    if flag.env:
        parts.append(f"[{flag.env}]")
    return " ".join(parts).replace("%", "%%")


def _serve(arguments: argparse.Namespace) -> int:
    try:
        config = resolve_config(vars(arguments), os.environ)
    except LaunchError as error:
        LogOutput.from_environment(json_lines=bool(arguments.json_output)).fatal(str(error))
        return 1
    output = LogOutput.from_environment(json_lines=config.json_output)
    from headgate.launcher.supervisor import serve  # asyncio: not needed for --help

    try:
        return serve(config, output)
    except KeyboardInterrupt:  # before the signal handlers were in place
        return 130


def _batch(arguments: argparse.Namespace) -> int:
    try:
        config = resolve_config(vars(arguments), os.environ)
    except LaunchError as error:
        LogOutput.from_environment(json_lines=False).fatal(str(error))
        return 1
    from headgate.batch import BatchConfig, run  # the gateway: not needed to serve or for --help

    return run(
        BatchConfig(
            input=arguments.input,
            output=arguments.output,
            flags=_given(arguments),
            max_concurrent_requests=config.max_concurrent_requests,
            max_client_batch_size=config.max_client_batch_size,
            payload_limit=config.payload_limit,
            strict=config.strict,
        )
    )


def _given(arguments: argparse.Namespace) -> list[str]:
    """The flags as they were given, for another command line."""
    words = []
    for flag in FLAGS:
        value = getattr(arguments, flag.key, None)
        if value is True:
            words.append(f"--{flag.name}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            words.extend(f"--{flag.name}={one}" for one in values)
    return words


if __name__ == "__main__":
    sys.exit(main())
