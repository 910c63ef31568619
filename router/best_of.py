"""`best_of`: of several finished answers the best, by mean logprob, as if only they had been made.

It stands between the engine and a request's sink and holds all events until the last answer's end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headgate.proto import router_pb2
from headgate.router.live_requests import Sink


@dataclass(slots=True)
class _Candidate:
    """One answer, in one event however many brought it."""

    tokens: router_pb2.Tokens = field(default_factory=router_pb2.Tokens)
    finished: router_pb2.Finished | None = None

    @property
    def mean_logprob(self) -> float:
        logprobs = [token.logprob for token in self.tokens.tokens]
        return sum(logprobs) / max(len(logprobs), 1)  # none where only the prompt is scored


class BestOf(Sink):
    """A sink: `num_answers` come in, the `num_given` best go out, the best as answer 0."""

    def __init__(self, sink: Sink, num_answers: int, num_given: int) -> None:
        self._sink = sink
        self._num_given = num_given
        self._candidates = [_Candidate() for _ in range(num_answers)]

    def send(self, event: router_pb2.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "tokens":
            held = self._candidates[event.tokens.index].tokens
            held.tokens.extend(event.tokens.tokens)
            held.text += event.tokens.text
        elif kind == "finished":
            self._candidates[event.finished.index].finished = event.finished
            if all(candidate.finished is not None for candidate in self._candidates):
                self._give()
        else:
            self._sink.send(event)

    def _give(self) -> None:
        # Equals stay in the order of their indices.
        ranked = sorted(self._candidates, key=lambda candidate: -candidate.mean_logprob)
        first = self._candidates[0].finished
        prefill = list(first.prefill) if first is not None else []
        for index, candidate in enumerate(ranked[: self._num_given]):
            finished = candidate.finished
            assert finished is not None  # _give is called at the end of all
            candidate.tokens.index = finished.index = index
            del finished.prefill[:]
            finished.prefill.extend(prefill if index == 0 else ())
            self._sink.send(router_pb2.GenerateEvent(tokens=candidate.tokens))
            self._sink.send(router_pb2.GenerateEvent(finished=finished))
