"""`python -m headgate.router --config router.json`: one router process, started by the launcher."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys

import uvloop

from headgate import garbage
from headgate.config_file import ConfigError, load_config
from headgate.log import set_up_logging
from headgate.router.config import RouterConfig
from headgate.router.control import ControlClient
from headgate.router.group_keeper import GroupKeeper, NotEnoughMemory
from headgate.router.server import AddressInUse, Parts, RouterServer
from headgate.router.tokenizer import Tokenizer, TokenizerError, load_chat_files

logger = logging.getLogger(__name__)

STOP_GRACE = 1.0  # seconds for open calls at the end
STOPPED, LAUNCHER_GONE, MISCONFIGURED = 0, 1, 2  # exit codes


async def serve(config: RouterConfig) -> int:
    """Runs until told to stop; the exit code. Raises what a user can put right."""
    tokenizer = Tokenizer.load(config.model_path, config.validation_workers)
    chat = load_chat_files(config.model_path, config.tokenizer_config_path)
    parts = Parts.build(config, tokenizer, chat)
    server = RouterServer(parts)
    await server.start()
    control = await ControlClient.connect(config.control_address)
    keeper = GroupKeeper(
        config, parts.engine, parts.status, parts.validator, parts.outputs, control
    )
    garbage.settle()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    health = asyncio.ensure_future(server.follow_status())
    stopped = asyncio.ensure_future(stop.wait())
    following = asyncio.ensure_future(keeper.run())
    try:
        await asyncio.wait((stopped, following), return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            return STOPPED
        following.result()
        logger.error("the launcher is gone")
        return LAUNCHER_GONE
    finally:
        for task in (health, stopped, following):
            task.cancel()
        with contextlib.suppress(Exception):
            await server.stop(STOP_GRACE)
        await keeper.close()
        await control.close()
        parts.validator.close()
        tokenizer.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="headgate.router")
    parser.add_argument("--config", required=True, help="JSON file with a RouterConfig")
    arguments = parser.parse_args()
    set_up_logging("router")
    try:
        config = load_config(RouterConfig, arguments.config)
        return uvloop.run(serve(config))
    except (AddressInUse, ConfigError, NotEnoughMemory, TokenizerError) as error:
        logger.error("%s", error)
        return MISCONFIGURED


if __name__ == "__main__":
    sys.exit(main())
