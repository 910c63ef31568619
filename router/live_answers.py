"""The answers that are being made, by the id of their row: their opening and their end.

It schedules and sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from headgate.proto.messages import Pooling
from headgate.router.beam_rows import BeamGroup
from headgate.router.beam_search import BeamParams, BeamSearch
from headgate.router.live_requests import LiveAnswer, LiveRequest
from headgate.router.output_processor import Outcome, OutputProcessor
from headgate.router.request import Request

_MAX_ID = 2**32 - 1


class LiveAnswers:
    """All of them, of all requests."""

    def __init__(self, outputs: OutputProcessor) -> None:
        self._outputs = outputs
        self._answers: dict[int, LiveAnswer] = {}
        self._next_id = 1

    def __iter__(self) -> Iterator[LiveAnswer]:
        """Those of now, whatever ends meanwhile."""
        return iter(list(self._answers.values()))

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._answers

    def get(self, row_id: int) -> LiveAnswer | None:
        return self._answers.get(row_id)

    def open(self, live: LiveRequest) -> list[LiveAnswer]:
        """Makes the request's answers, but for those that an earlier router brought to their end.

        Those to be scheduled: all, or the first where beams are searched.
        """
        valid = live.valid
        for index in range(valid.num_answers):
            if index not in valid.progress or not valid.progress[index].finished:
                self._open(live, index)
        if valid.beams is None:
            return live.answers
        self._make_beams(live, valid.beams)
        return live.answers[:1]

    def _open(self, live: LiveRequest, index: int) -> None:
        """One more answer; the first of them computes the prompt for the others."""
        valid, leader = live.valid, live.answers[0].request if live.answers else None
        sampling = replace(
            valid.sampling,
            sample_index=index,
            prompt_logprobs=valid.sampling.prompt_logprobs and index == 0,
        )
        request = Request(
            id=self._take_id(),
            prompt_ids=valid.prompt_ids,
            sampling=sampling,
            arrival=valid.arrival,
            # Either wants something of each prompt token, which the cache does not have.
            skip_prefix_cache=sampling.prompt_logprobs or sampling.pooling is Pooling.MEAN,
            leader=leader,
        )
        answer = LiveAnswer(live, request, self._outputs.answer(valid, index))
        live.answers.append(answer)
        live.num_open += 1
        self._answers[request.id] = answer

    def _make_beams(self, live: LiveRequest, params: BeamParams) -> None:
        """Rows for all beams, the first of them those of the answers."""
        rows = [answer.request for answer in live.answers]
        first = rows[0]
        while len(rows) < params.width:
            rows.append(
                Request(self._take_id(), first.prompt_ids, first.sampling, arrival=first.arrival)
            )
        for row in rows:
            row.sampling = params.row_sampling(row.sampling)
            row.leader = None
        for row in rows[1:]:
            row.sampling = replace(row.sampling, prompt_logprobs=False)
        BeamGroup.of(BeamSearch(params), rows)

    def _take_id(self) -> int:
        """A row id that no live answer has."""
        while True:
            taken = self._next_id
            self._next_id = taken % _MAX_ID + 1
            if taken not in self._answers:
                return taken

    def resume(self, answer: LiveAnswer) -> Outcome | None:
        """Takes over what an earlier router delivered; the outcome may be that it was all."""
        valid = answer.live.valid
        progress = valid.progress.get(answer.index)
        if progress is None:
            return None
        ids = [token.id for token in progress.tokens]
        end = self._outputs.end_of(valid, ids)
        outcome = answer.text.replay(progress.tokens, progress.text_offset, end)
        answer.request.output_ids.extend(ids[: answer.text.num_tokens])
        return outcome

    def close(self, answer: LiveAnswer) -> None:
        """It has ended; with the last of its answers the request has."""
        live = answer.live
        del self._answers[answer.request.id]
        live.num_open -= 1
        if not live.num_open:
            live.ended = True
            live.permit.release()
