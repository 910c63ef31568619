"""Whether the server can serve: the router's word, or the launcher's while there is no router.

Read by health routes and by the gate in front of every inference request. Holds no request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from headgate.proto import router_pb2
from headgate.router.errors import DrainingError, RouterError, UnavailableError

_FILE_MAX_AGE = 0.25  # seconds a reading of status.json is used for


class State(Enum):
    """The values of /health/ready's `state`."""

    LOADING = "loading"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    FAILED = "failed"


_FROM_PROTO = {
    router_pb2.SERVER_STATE_LOADING: State.LOADING,
    router_pb2.SERVER_STATE_READY: State.READY,
    router_pb2.SERVER_STATE_RECOVERING: State.RECOVERING,
    router_pb2.SERVER_STATE_DRAINING: State.DRAINING,
    router_pb2.SERVER_STATE_FAILED: State.FAILED,
}
_SINCE_READY = {"ready": State.RECOVERING, "recovering": State.RECOVERING}
_PHASES = {"failed": State.FAILED, "draining": State.DRAINING, **_SINCE_READY}


class ServerState:
    """The state in force, from the last ServerStatus and the launcher's status file."""

    def __init__(self, status_path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(status_path) if status_path else None
        self._clock = clock
        self._read_at = float("-inf")
        self._phase = ""
        self._phase_detail = ""
        self._status: router_pb2.ServerStatus | None = None  # None: no router
        self._was_ready = False
        self.info: router_pb2.InfoResponse | None = None  # stays when the router goes

    def update(self, status: router_pb2.ServerStatus | None) -> None:
        """Takes the router's word over; None: its stream broke."""
        self._status = status
        if status is None:
            return
        if status.HasField("info"):
            self.info = status.info
        if self._of_router() in (State.READY, State.RECOVERING):
            self._was_ready = True

    @property
    def router_takes_requests(self) -> bool:
        """Whether requests may be put on the stream now, rather than wait here."""
        return self._of_router() in (State.READY, State.RECOVERING, State.DRAINING)

    def current(self) -> tuple[State, str]:
        """The state and a text about it, for people."""
        self._read_file()
        by_router, by_file = self._of_router(), _PHASES.get(self._phase)
        if self._phase in _SINCE_READY:
            self._was_ready = True
        if by_file is State.FAILED:
            return State.FAILED, self._phase_detail
        if by_router is None:
            if by_file is State.DRAINING:
                return State.DRAINING, self._phase_detail
            if self._was_ready:
                return State.RECOVERING, "the router is being restarted"
            return State.LOADING, self._progress("waiting for the router")
        assert self._status is not None
        if by_router is State.LOADING:
            if self._was_ready:
                return State.RECOVERING, self._status.detail
            return State.LOADING, self._progress(self._status.detail)
        return by_router, self._status.detail

    def refusal(self) -> RouterError | None:
        """Why a new inference request cannot even wait; None: it can be submitted."""
        state, detail = self.current()
        if state is State.LOADING:
            return UnavailableError(f"The model is not ready yet ({detail})", retry_after=2.0)
        if state is State.FAILED:
            return UnavailableError(detail or "The server has failed", retry_after=30.0)
        if state is State.DRAINING:
            return DrainingError(retry_after=5.0)
        return None

    def _of_router(self) -> State | None:
        if self._status is None:
            return None
        return _FROM_PROTO.get(self._status.state, State.LOADING)

    def _progress(self, otherwise: str) -> str:
        text = ": ".join(part for part in (self._phase, self._phase_detail) if part)
        return text or otherwise or "loading"

    def _read_file(self) -> None:
        now = self._clock()
        if self._path is None or now - self._read_at < _FILE_MAX_AGE:
            return
        self._read_at = now
        try:
            data = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(data, dict):
            self._phase = str(data.get("phase") or "")
            self._phase_detail = str(data.get("detail") or "")
