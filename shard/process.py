"""The shard process: loads its part of the model and serves it.

Started by the launcher. Exit codes: 0 when asked to stop, 2 when the configuration or the model
cannot be served (the last log line is one sentence for the user), 1 for anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

import torch

from headgate import garbage
from headgate.config_file import ConfigError, load_config
from headgate.kernels import ops
from headgate.log import set_up_logging
from headgate.proto.framing import stream_path
from headgate.shard.config import ShardConfig, ShardIdentity
from headgate.shard.device import num_gpus, take_gpu
from headgate.shard.distributed import init_group
from headgate.shard.errors import ModelError, PeerLost
from headgate.shard.memory import give_back, is_out_of_memory
from headgate.shard.model_config import read_model_config
from headgate.shard.model_runner import ModelRunner
from headgate.shard.model_thread import ModelThread
from headgate.shard.models.registry import load_model
from headgate.shard.null_runner import NullRunner
from headgate.shard.runner import Runner
from headgate.shard.server import ShardService, start_server
from headgate.shard.step_socket import StepSocket
from headgate.shard.step_trace import StepTrace

logger = logging.getLogger("headgate.shard")

_USERS_ERRORS = (ConfigError, ModelError, ops.BackendUnavailable)
# When a group is stopped its members die one by one; a shard that loses a peer waits this long for
# its own signal before it calls that a failure.
_STOP_GRACE = 0.3


class ShardProcess:
    """The process's life, and its ends."""

    def __init__(self) -> None:
        self._socket_paths: tuple[str, ...] = ()
        self._trace: StepTrace | None = None
        self._stopping = threading.Event()
        self._failing = threading.Lock()

    def run(self, config_path: str) -> None:
        """Does not return: the process ends by a signal or a failure."""
        parent = os.getppid()
        identity = ShardIdentity.from_environment(os.environ)
        config = _read_config(config_path)
        address = identity.address(config)
        thread = ModelThread(config.num_threads, self.fail)
        runner = thread.call(lambda: _load(config, identity))
        thread.when_idle(runner.rest)
        if os.getppid() != parent:
            logger.error("the launcher is gone")
            self.exit(1)
        self._trace = StepTrace.from_environment(os.environ, identity.rank)
        garbage.settle()
        steps_path = ""
        if address.startswith("unix:"):
            steps_path = stream_path(address)
            self._socket_paths = (address.removeprefix("unix:"), steps_path)
        service = ShardService(runner, thread, self._trace, steps_path)
        if steps_path:
            StepSocket(service, steps_path)
        server = start_server(service, address)
        fields = {"address": address, "epoch": identity.epoch}
        logger.info("shard serves", extra={"fields": fields})
        server.wait_for_termination()

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT. A collective under way can't be broken off: nothing is awaited."""
        self._stopping.set()
        self.exit(0)

    def fail(self, error: BaseException) -> None:
        """Ends the process for `error`, from any thread; only the first error is told."""
        if not self._failing.acquire(blocking=False):
            threading.Event().wait()
        if isinstance(error, _USERS_ERRORS):
            logger.error("%s", error)
            self.exit(2)
        if isinstance(error, PeerLost):
            if self._stopping.wait(_STOP_GRACE):
                return
            logger.error("%s", error)
        else:
            logger.error("shard failed: %s", error, exc_info=error)
        self.exit(1)

    def exit(self, code: int) -> None:
        """Ends the process at once: other threads may hang in a collective or hold a GPU."""
        for path in self._socket_paths:
            with contextlib.suppress(OSError):  # already removed, with its directory
                os.unlink(path)
        if self._trace is not None:
            self._trace.close()
        sys.stderr.flush()
        os._exit(code)


def _read_config(path: str) -> ShardConfig:
    try:
        return load_config(ShardConfig, path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _load(config: ShardConfig, identity: ShardIdentity) -> Runner:
    """Joins the group and loads the model. Runs on the model's thread."""
    if config.null:
        return NullRunner(read_model_config(config.model_path), config, identity)
    if config.device == "cuda":
        _take_gpu(config, identity)
    group = init_group(config.device, config.process_group_timeout)
    kernels = ops.use(config.kernels, config.device, batch_invariant=config.batch_invariant)
    started = time.monotonic()
    try:
        model = load_model(
            config.model_path,
            dtype=config.weight_dtype,
            device=config.device,
            group=group,
            quantize=config.quantize,
            precision=config.matmul_precision,
            model_module=config.model_module,
            rope_scaling=config.rope_scaling,
            rope_factor=config.rope_factor,
            max_positions=config.max_total_tokens,
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"not enough memory to load {config.model_path}: {error}") from error
    give_back()
    fields = {
        "weight_bytes": model.weight_bytes,
        "dtype": config.dtype,
        "quantize": config.quantize or None,
        "matmul_precision": config.matmul_precision,
        "kernels": kernels,
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - started, 2),
    }
    logger.info("model loaded", extra={"fields": fields})
    return ModelRunner(model, group, config, identity)


def _take_gpu(config: ShardConfig, identity: ShardIdentity) -> None:
    """One process, one GPU."""
    found = num_gpus()
    if identity.rank >= found:
        raise ConfigError(f"shard {identity.rank} needs a GPU of its own, and {found} are visible")
    take_gpu(identity.rank, config.cuda_memory_fraction)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m headgate.shard", description=__doc__)
    parser.add_argument("--config", required=True, help="JSON file written by the launcher")
    arguments = parser.parse_args()
    set_up_logging(f"shard-{os.environ.get('RANK', '0')}")
    process = ShardProcess()
    signal.signal(signal.SIGTERM, process.stop)
    signal.signal(signal.SIGINT, process.stop)
    try:
        process.run(arguments.config)
    except BaseException as error:
        process.fail(error)
