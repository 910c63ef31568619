"""A thin /v1/completions around openvino-genai, which ships no server. For measuring only.

Run by the interpreter that has openvino-genai and tokenizers; imports nothing of Headgate. A thread
steps the pipeline and waits until the event loop has sent what a step brought, since the pipeline
does not let go of the interpreter for long enough by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from pathlib import Path
from typing import Any

_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\n%s\r\n"


class Engine:
    """The pipeline in a thread of its own; answers go to queues of the event loop."""

    def __init__(self, folder: str, cache_gb: int) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._openvino, self._genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {})
        self._incoming: list[tuple[list[int], dict[str, Any], asyncio.Queue[Any]]] = []
        self._wake = threading.Event()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, ids: list[int], body: dict[str, Any]) -> asyncio.Queue[Any]:
        """The queue gets lists of new ids, at the end None."""
        queue: asyncio.Queue[Any] = asyncio.Queue()
        self._incoming.append((ids, body, queue))
        self._wake.set()
        return queue

    def _run(self) -> None:
        live: dict[int, tuple[Any, asyncio.Queue[Any]]] = {}
        number = 0
        while True:
            if not live and not self._incoming:
                self._wake.wait()
                self._wake.clear()
            while self._incoming:
                ids, body, queue = self._incoming.pop(0)
                number += 1
                live[number] = self._start(number, ids, body), queue
            if self._pipeline.has_non_finished_requests():
                self._pipeline.step()
            news: list[tuple[asyncio.Queue[Any], Any]] = []
            for key, (handle, queue) in list(live.items()):
                while handle.can_read():
                    news += [(queue, list(out.generated_ids)) for out in handle.read().values()]
                if handle.get_status() != self._genai.GenerationStatus.RUNNING:
                    news.append((queue, None))
                    del live[key]
            if news:
                asyncio.run_coroutine_threadsafe(_hand_over(news), self._loop).result()

    def _start(self, number: int, ids: list[int], body: dict[str, Any]) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = int(body["max_tokens"])
        config.do_sample = False
        config.ignore_eos = bool(body.get("ignore_eos"))
        prompt = self._openvino.Tensor(self._numpy.array([ids], dtype=self._numpy.int64))
        return self._pipeline.add_request(number, prompt, config)


async def _hand_over(news: list[tuple[asyncio.Queue[Any], Any]]) -> None:
    for queue, item in news:
        queue.put_nowait(item)
    await asyncio.sleep(0)  # the connections read their queues ...
    await asyncio.sleep(0)  # ... and write


class Server:
    """HTTP as far as the benchmark's client speaks it."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(_RESPONSE % (b"text/plain", b"Content-Length: 0\r\n"))
            else:
                lines = head.decode("latin-1").lower().split("\r\n")
                length = next(line for line in lines if line.startswith("content-length:"))
                body = json.loads(await reader.readexactly(int(length.split(":")[1])))
                await self._stream(body, writer)
            await writer.drain()
        finally:
            writer.close()

    async def _stream(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        ids = self._tokenizer.encode(body["prompt"]).ids
        writer.write(_RESPONSE % (b"text/event-stream", b""))
        count = 0
        queue = self._engine.submit(ids, body)
        while (new := await queue.get()) is not None:
            count += len(new)
            choice = {"index": 0, "text": self._tokenizer.decode(new), "finish_reason": None}
            writer.write(b"data: %s\n\n" % json.dumps({"choices": [choice]}).encode())
        usage = {"prompt_tokens": len(ids), "completion_tokens": count}
        end = json.dumps({"choices": [], "usage": usage}).encode()
        writer.write(b"data: %s\n\ndata: [DONE]\n\n" % end)


async def serve(arguments: argparse.Namespace) -> None:
    """Until killed."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(arguments.tokenizer) / "tokenizer.json"))
    server = Server(Engine(arguments.folder, arguments.cache_gb), tokenizer)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", arguments.port)
    async with listening:
        await listening.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="the exported model")
    parser.add_argument("--tokenizer", required=True, help="folder of the original tokenizer.json")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cache-gb", type=int, default=4)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
