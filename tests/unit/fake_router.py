"""A small router for gateway tests: it listens as the router does, and a test writes its answers.

By default a request's answer is the words of `answer`, one token each; `script` replaces that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc

from headgate.proto import router_pb2 as pb
from headgate.proto import router_pb2_grpc
from headgate.proto.framing import frame, read_message, stream_path

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
INFO = pb.InfoResponse(
    model_id="org/model",
    served_model_name="model",
    version="0.1.0",
    dtype="bfloat16",
    device="cpu",
    num_shards=1,
    max_concurrent_requests=128,
    max_best_of=2,
    max_stop_sequences=4,
    max_top_n_tokens=5,
    max_input_tokens=100,
    max_total_tokens=200,
    max_client_batch_size=4,
    validation_workers=2,
    chat_template=TEMPLATE,
    bos_token="<s>",
    eos_token="</s>",
)


def token(id: int, text: str, logprob: float = -0.5, special: bool = False) -> pb.Token:
    return pb.Token(id=id, text=text, logprob=logprob, special=special)


class Conversation:
    """The router's side of one Multiplex stream."""

    def __init__(self) -> None:
        self.outbox: asyncio.Queue[pb.ServerMessage | None] = asyncio.Queue()
        self.received: list[pb.ClientMessage] = []

    def send(self, submit: pb.Submit, *events: pb.GenerateEvent) -> None:
        """All the events in one message, as a step's would be."""
        self.outbox.put_nowait(
            pb.ServerMessage(
                events=[
                    pb.KeyedEvent(key=submit.key, attempt=submit.attempt, event=event)
                    for event in events
                ]
            )
        )

    def send_state(self, state: pb.ServerState, detail: str = "") -> None:
        self.outbox.put_nowait(
            pb.ServerMessage(status=pb.ServerStatus(state=state, detail=detail, info=INFO))
        )

    def got(self, kind: str) -> list[pb.ClientMessage]:
        return [message for message in self.received if message.WhichOneof("message") == kind]


Script = Callable[[Conversation, pb.Submit], Awaitable[None]]


class FakeRouter(router_pb2_grpc.RouterServicer):
    """Serve it with `async with FakeRouter(address) as router`."""

    def __init__(self, address: str, script: Script | None = None) -> None:
        self.address = address
        self.script: Script = script or answer
        self.state = pb.SERVER_STATE_READY
        self.conversations: list[Conversation] = []
        self.submits: list[pb.Submit] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._socket: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> FakeRouter:
        self._server = grpc.aio.server()
        router_pb2_grpc.add_RouterServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        await self._server.start()
        self._socket = await asyncio.start_unix_server(self._serve, stream_path(self.address))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.die()

    async def die(self) -> None:
        if self._server is not None and self._socket is not None:
            for task in self._tasks:
                task.cancel()
            self._socket.close()
            for writer in self._writers:
                writer.close()
            await self._server.stop(0)
            self._server = None

    @property
    def last(self) -> Conversation:
        return self.conversations[-1]

    @property
    def requests(self) -> list[pb.GenerateRequest]:
        return [submit.request for submit in self.submits]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        conversation = Conversation()
        self.conversations.append(conversation)
        reading = asyncio.create_task(self._read(conversation, reader))
        try:
            while (message := await conversation.outbox.get()) is not None:
                writer.write(frame(message))
                await writer.drain()
        finally:
            reading.cancel()
            self._writers.discard(writer)
            writer.close()

    async def _read(self, conversation: Conversation, reader: asyncio.StreamReader) -> None:
        while (message := await read_message(reader, pb.ClientMessage())) is not None:
            conversation.received.append(message)
            kind = message.WhichOneof("message")
            if kind == "hello":
                conversation.send_state(self.state)
            elif kind == "submit":
                self.submits.append(message.submit)
                task = asyncio.create_task(self.script(conversation, message.submit))  # type: ignore[arg-type]
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        conversation.outbox.put_nowait(None)

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        spans, start = [], 0
        for index, word in enumerate(request.text.split(" ")):
            spans.append(pb.TokenSpan(id=index, text=word, start=start, stop=start + len(word)))
            start += len(word) + 1
        return pb.TokenizeResponse(tokens=spans)

    async def Cancel(
        self, request: pb.CancelRequest, context: grpc.aio.ServicerContext
    ) -> pb.CancelResponse:
        """Ends what has that id and has not been answered."""
        named = [
            submit
            for submit in self.submits
            if request.request_id in (submit.request.request_id, submit.request.call_id)
        ]
        for submit in named:
            self.last.send(submit, error("cancelled", 499, "The request was cancelled"))
        return pb.CancelResponse(cancelled=len(named))

    async def Metrics(
        self, request: pb.MetricsRequest, context: grpc.aio.ServicerContext
    ) -> pb.MetricsResponse:
        return pb.MetricsResponse(text=b"# TYPE tgi_queue_size gauge\ntgi_queue_size 0\n")


# ------------------------------------------------------------------- events


def accepted(
    input_tokens: int = 3, seed: int | None = None, num_answers: int = 1
) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        accepted=pb.Accepted(
            input_tokens=input_tokens, seed=seed, prompt_characters=12, num_answers=num_answers
        )
    )


def tokens(
    first_index: int, *new: pb.Token, text: str, offset: int, index: int = 0
) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        tokens=pb.Tokens(
            first_index=first_index, tokens=new, text=text, text_offset=offset, index=index
        )
    )


def finished(
    text: str,
    count: int,
    reason: pb.FinishReason = pb.FINISH_REASON_LENGTH,
    seed: int | None = None,
    prefill: list[pb.Token] | None = None,
    index: int = 0,
) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        finished=pb.Finished(
            reason=reason,
            generated_text=text,
            generated_tokens=count,
            input_tokens=3,
            seed=seed,
            prefill=prefill,
            index=index,
            timings=pb.Timings(validation=1_000_000, queue=2_000_000, inference=30_000_000),
        )
    )


def error(error_type: str, status: int, message: str, **more: object) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        error=pb.Error(error_type=error_type, http_status=status, message=message, **more)  # type: ignore[arg-type]
    )


WORDS = (" Tokyo", " is", " big")


async def answer(conversation: Conversation, submit: pb.Submit) -> None:
    """Goes on from what was delivered; the last token comes with the end.

    Of several answers, all with the same words, each is a word shorter than the one before.
    """
    parameters = submit.request.parameters
    seed = 7 if parameters.do_sample else None
    delivered = {entry.index: entry for entry in submit.delivered.answers}
    open_ = [
        index
        for index in range(parameters.n or 1)
        if index not in delivered or not delivered[index].finished
    ]
    conversation.send(submit, accepted(seed=seed, num_answers=len(open_)))
    done = min((len(delivered[i].tokens) if i in delivered else 0 for i in open_), default=0)
    for place in range(done, len(WORDS)):
        events: list[pb.GenerateEvent] = []
        for index in open_:
            words = WORDS[: len(WORDS) - index]
            if place >= len(words):
                continue
            new = token(11 + place, words[place], -0.5 - place)
            new.top.extend(
                token(100 + n, f" alt{n}", -1.0 - n) for n in range(parameters.top_n_tokens)
            )
            offset = sum(map(len, words[:place]))
            events.append(tokens(place, new, text=words[place], offset=offset, index=index))
            if place == len(words) - 1:
                prefill = None
                if parameters.prompt_logprobs and not index:
                    prefill = [pb.Token(id=1, text="Hi"), token(2, " there", -3.25)]
                events.append(
                    finished("".join(words), len(words), seed=seed, prefill=prefill, index=index)
                )
        conversation.send(submit, *events)
