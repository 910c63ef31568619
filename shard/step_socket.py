"""The socket for the router of this machine: Steps without gRPC, as framing.py has it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from typing import BinaryIO

from headgate.config_file import ConfigError
from headgate.proto import shard_pb2
from headgate.proto.framing import frame, wait_for_message
from headgate.shard.server import ShardService, StepStream

logger = logging.getLogger(__name__)

_ACCEPT_AGAIN = 0.1  # seconds after a connection could not be taken


class StepSocket:
    """Each connection is a Steps stream: it takes the place of the one before."""

    def __init__(self, service: ShardService, path: str) -> None:
        """Listens. Raises ConfigError where it can't."""
        self._service = service
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._closed = threading.Event()
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # left behind by a process that was killed
            self._listener.bind(path)
            self._listener.listen()
        except OSError as error:
            raise ConfigError(f"the shard cannot listen on {path}: {error}") from error
        threading.Thread(target=self._accept, name="steps", daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:  # there may be no file descriptor left
                if not self._closed.wait(_ACCEPT_AGAIN):
                    logger.warning("a stream of plans cannot be taken: %s", error)
                continue
            # Plans are read beside the model's thread: the next one is decoded while a step runs.
            threading.Thread(
                target=self._serve, args=(connection,), name="plans", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        stream = self._service.open_stream()
        sending = threading.Thread(
            target=_send_results, args=(stream, connection), name="results", daemon=True
        )
        sending.start()
        with connection, connection.makefile("rb") as file:
            self._service.read_plans(_plans(file), stream)
            sending.join()


def _plans(file: BinaryIO) -> Iterator[shard_pb2.StepPlans]:
    try:
        while (message := wait_for_message(file, shard_pb2.StepPlans())) is not None:
            yield message
    except ValueError as error:
        logger.error("a stream of plans cannot be read: %s", error)


def _send_results(stream: StepStream, connection: socket.socket) -> None:
    """Until the stream ends, and with it the connection."""
    try:
        for result in stream.results():
            connection.sendall(frame(result))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # the client is gone
        stream.close()
