"""Many calls of the router in flight, answers in the order of the questions.

Never more than the router takes at a time. A call that a dying router took with it is made again:
the same tokens come out.
"""

from __future__ import annotations

import contextlib
import queue
import time
from dataclasses import dataclass, replace
from typing import Any

import grpc

from headgate.outputs import (
    PoolingRequestOutput,
    RequestOutput,
    pooling_output,
    request_output,
)
from headgate.private_server import PrivateServer
from headgate.prompts import Prompt
from headgate.proto import router_pb2, router_pb2_grpc
from headgate.room import Room
from headgate.router import sampling_params as router
from headgate.router.errors import (
    DrainingError,
    OverloadedError,
    RouterError,
    UnavailableError,
    ValidationError,
    from_rpc_error,
)
from headgate.sampling_params import SamplingParams

_TRIES = 5  # of one call, where the router dies again and again
_LOOK_SECONDS = 0.5  # between two looks whether the server is still there
_PAUSE_SECONDS = 0.02
_SERVING = (router_pb2.SERVER_STATE_READY, router_pb2.SERVER_STATE_RECOVERING)
_AGAIN = (DrainingError, OverloadedError, UnavailableError)


Output = RequestOutput | PoolingRequestOutput


@dataclass(frozen=True, slots=True)
class Question:
    """One request: as the caller put it, and as the router takes it."""

    request_id: str
    prompt: Prompt
    asked: SamplingParams
    wanted: router.SamplingParams
    embedding: router_pb2.Embedding | None = None  # wanted instead of answers


@dataclass(slots=True)
class _Call:
    index: int
    question: Question
    token_ids: list[int]
    message: router_pb2.GenerateRequest
    tries: int = 0
    future: Any = None

    @property
    def num_answers(self) -> int:
        """That the router makes for it."""
        return self.question.wanted.num_answers


class Calls:
    """Safe to use from several threads: they share the room."""

    def __init__(
        self,
        server: PrivateServer,
        stub: router_pb2_grpc.RouterStub,
        info: router_pb2.InfoResponse,
    ) -> None:
        self._server = server
        self._stub = stub
        self._longest = info.max_total_tokens
        self._room = Room(info.max_concurrent_requests)  # in answers, as the router counts

    def run(self, questions: list[Question], progress: Any) -> list[Output]:
        """Raises ValueError for a question that is refused, after the rest was cancelled."""
        answers: list[Output | None] = [None] * len(questions)
        done: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        live: dict[int, _Call] = {}
        waiting = (self._call(index, question) for index, question in enumerate(questions))
        following = next(waiting, None)
        left = len(questions)
        try:
            while left:
                while following and self._room.take(following.num_answers, wait=not live):
                    live[following.index] = following
                    self._start(following, done)
                    following = next(waiting, None)
                call = self._take(done)
                answer = self._answer(call)
                if answer is None:
                    self._start(call, done)
                    continue
                del live[call.index]
                self._room.give_back(call.num_answers)
                answers[call.index] = answer
                left -= 1
                progress.update(1)
        finally:
            for call in live.values():
                with contextlib.suppress(Exception):
                    call.future.cancel()
                self._room.give_back(call.num_answers)
        return [answer for answer in answers if answer is not None]

    def _call(self, index: int, question: Question) -> _Call:
        ids = self._token_ids(index, question.prompt)
        wanted = question.wanted
        if wanted.truncate is not None:
            ids = ids[-wanted.truncate :]
        if question.embedding is not None:
            message = router_pb2.GenerateRequest(
                token_ids=router_pb2.TokenIds(ids=ids),
                embedding=question.embedding,
                request_id=question.request_id,
            )
            return _Call(index, question, ids, message)
        room = self._longest - len(ids)
        if room <= 0:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; prompt and answer together can have "
                f"{self._longest} (max_model_len)"
            )
        if wanted.max_new_tokens is not None and wanted.max_new_tokens > room:
            shortest = min(wanted.min_new_tokens or 0, room) or None
            wanted = replace(wanted, max_new_tokens=room, min_new_tokens=shortest)
        message = router_pb2.GenerateRequest(
            token_ids=router_pb2.TokenIds(ids=ids),
            parameters=replace(wanted, truncate=None).to_proto(),
            request_id=question.request_id,
        )
        return _Call(index, question, ids, message)

    def _token_ids(self, index: int, prompt: Prompt) -> list[int]:
        if prompt.token_ids is not None:
            return list(prompt.token_ids)
        request = router_pb2.TokenizeRequest(
            text=prompt.text or "", add_special_tokens=prompt.add_special_tokens
        )
        for tries in range(1, _TRIES + 1):
            try:
                response = self._tokenize(request)
                break
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
                if tries == _TRIES or not isinstance(failure, _AGAIN):
                    raise _for_caller(index, failure) from None
                self._wait_serving()
        ids = [span.id for span in response.tokens]
        if not ids:
            raise ValueError(f"prompt {index} is empty")
        return ids

    def _tokenize(self, request: router_pb2.TokenizeRequest) -> router_pb2.TokenizeResponse:
        """Raises ServerError where no router will ever take it."""
        future = self._stub.Tokenize.future(request, wait_for_ready=True)
        try:
            while True:
                try:
                    return future.result(timeout=_LOOK_SECONDS)
                except grpc.FutureTimeoutError:
                    self._server.check()
        finally:
            future.cancel()

    def _start(self, call: _Call, done: queue.SimpleQueue[_Call]) -> None:
        call.tries += 1
        call.future = self._stub.Generate.future(call.message, wait_for_ready=True)
        call.future.add_done_callback(lambda _: done.put(call))

    def _wait_serving(self) -> None:
        """Until a router has shards that it can use. Raises ServerError."""
        while True:
            time.sleep(_PAUSE_SECONDS)
            self._server.check()
            with contextlib.suppress(grpc.RpcError):
                state = self._stub.Info(router_pb2.InfoRequest(), timeout=_LOOK_SECONDS).state
                if state in _SERVING:
                    return

    def _take(self, done: queue.SimpleQueue[_Call]) -> _Call:
        while True:
            try:
                return done.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._server.check()

    def _answer(self, call: _Call) -> Output | None:
        """None: the call is to be made again."""
        try:
            response = call.future.result()
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if call.tries < _TRIES and isinstance(failure, _AGAIN):
                self._wait_serving()
                return None
            raise _for_caller(call.index, failure) from None
        question = call.question
        if question.embedding is not None:
            return pooling_output(question.request_id, call.token_ids, response)
        return request_output(
            question.request_id,
            question.prompt.text,
            call.token_ids,
            response,
            logprobs=question.asked.logprobs,
            prompt_logprobs=question.asked.prompt_logprobs,
            detokenize=question.asked.detokenize,
        )


def _for_caller(index: int, error: RouterError) -> Exception:
    if isinstance(error, ValidationError):
        return ValueError(f"prompt {index}: {error.message}")
    return error
