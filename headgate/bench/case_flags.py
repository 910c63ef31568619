"""The flags that commands of the benchmark share: the model, kinds of weights and workloads."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import tokenizers

from headgate.bench.contestants import KINDS
from headgate.bench.workload import parse_plan
from headgate.launcher.cli import parse_serve
from headgate.launcher.model_files import ModelFiles, find_source
from headgate.launcher.prepare_model import prepare


def add_case_flags(parser: argparse.ArgumentParser, plan: str, kinds: str) -> None:
    """With these as defaults."""
    parser.add_argument(
        "--plan", default=plan, help="workload:concurrency:requests, ... (default: %(default)s)"
    )
    parser.add_argument("--kinds", default=kinds, help="of weights (default: %(default)s)")
    parser.add_argument("--model-id", default="", help="as of headgate serve")
    parser.add_argument("--flags", default="", help="more flags of headgate serve, in one string")


def take_case_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Kinds, plan and flags become lists. Exits with a message where they are none."""
    arguments.kinds = arguments.kinds.split(",")
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    try:
        arguments.plan = parse_plan(arguments.plan)
    except ValueError as error:
        parser.error(str(error))
    arguments.flags = arguments.flags.split()


def prepare_model(model_id: str) -> tuple[ModelFiles, tokenizers.Tokenizer]:
    """The model, "" for the embedded one, ready to be read, and its tokenizer."""
    flags = ["--model-id", model_id] if model_id else []
    files = prepare(find_source(parse_serve(flags, dict(os.environ))))
    return files, tokenizers.Tokenizer.from_file(str(Path(files.path) / "tokenizer.json"))
