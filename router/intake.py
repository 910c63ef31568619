"""The way of a request into the engine, the same for every RPC: admission, validation, queue.

Counts and logs what is refused on the way.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from headgate.proto import router_pb2
from headgate.router.engine import Engine
from headgate.router.errors import InternalError, RequestCancelledError, RouterError
from headgate.router.live_requests import LiveRequest, Sink
from headgate.router.metrics import Metrics
from headgate.router.validation import Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Submission:
    """A request with what an earlier router had done for it."""

    request: router_pb2.GenerateRequest
    resubmitted: bool = False
    delivered: router_pb2.Delivered | None = None


@dataclass(slots=True, eq=False)
class _Arriving:
    """A request that is being validated."""

    names: tuple[str, str]  # request and call id
    cancelled: bool = False


class Intake:
    def __init__(self, engine: Engine, validator: Validator, metrics: Metrics) -> None:
        self._engine = engine
        self._validator = validator
        self._metrics = metrics
        self._arriving: set[_Arriving] = set()

    async def submit(self, submission: Submission, sink: Sink) -> LiveRequest:
        """Raises RouterError; cancelling the wait frees the place. Later events go to `sink`."""
        arrival = time.monotonic()
        self._metrics.received()
        try:
            return await self._submit(submission, sink, arrival)
        except RouterError as error:
            self._refuse(submission.request, error)
            raise
        except Exception as error:
            logger.exception("a request could not be taken in")
            self._refuse(submission.request, InternalError())
            raise InternalError() from error
        except BaseException:
            self._metrics.failed("dropped")
            raise

    def count_refusal(self, error_type: str) -> None:
        """A request that a gateway refused by itself."""
        self._metrics.received()
        self._metrics.failed(error_type)

    def cancel(self, name: str) -> int:
        """Ends the requests with this request or call id; how many there were."""
        arriving = [one for one in self._arriving if name in one.names and not one.cancelled]
        for one in arriving:
            one.cancelled = True
        return len(arriving) + self._engine.cancel_by_name(name)

    async def _submit(self, submission: Submission, sink: Sink, arrival: float) -> LiveRequest:
        request = submission.request
        permit = self._engine.admit(_num_answers(request), submission.resubmitted)
        arriving = _Arriving((request.request_id, request.call_id))
        self._arriving.add(arriving)
        try:
            valid = await self._validator.validate(request, arrival, submission.delivered)
            if arriving.cancelled:
                raise RequestCancelledError()
            return self._engine.submit(valid, sink, permit)
        except BaseException:
            permit.release()
            raise
        finally:
            self._arriving.discard(arriving)

    def _refuse(self, request: router_pb2.GenerateRequest, error: RouterError) -> None:
        self._metrics.failed(error.error_type)
        fields = {
            "request_id": request.request_id,
            "outcome": error.error_type,
            "message": error.message,
        }
        logger.info("request refused", extra={"fields": fields})


def _num_answers(request: router_pb2.GenerateRequest) -> int:
    """How many are to be generated, as far as can be said before validation."""
    given = request.parameters
    return max(given.n, given.best_of, given.beam_width, 1)
