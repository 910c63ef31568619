"""vLLM's `LLM`: offline generation with the same engine as the server's, without HTTP.

    from headgate import LLM, SamplingParams

    llm = LLM(model="Qwen/Qwen3-0.6B")
    for output in llm.generate(["The capital of Japan is"], SamplingParams(temperature=0)):
        print(output.prompt, output.outputs[0].text)

It starts a server of its own (private_server.py) and calls the router's gRPC service.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import grpc

from headgate.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output
from headgate.chats import Chats
from headgate.client import CHANNEL_OPTIONS
from headgate.llm_arguments import check_others, to_flags
from headgate.llm_calls import Calls, Output, Question
from headgate.outputs import PoolingRequestOutput, RequestOutput
from headgate.private_server import PrivateServer
from headgate.progress import make_progress
from headgate.prompts import Prompt, read_prompts
from headgate.proto import router_pb2, router_pb2_grpc
from headgate.sampling_params import SamplingParams

_CHANNEL_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),  # a router that died is back within a second
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

_POOLINGS = {
    None: router_pb2.POOLING_UNSPECIFIED,
    "mean": router_pb2.POOLING_MEAN,
    "last": router_pb2.POOLING_LAST,
}

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model, ready when the constructor returns. `close` it, use it in a `with`, or just end."""

    def __init__(
        self,
        model: str = "",
        *,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        dtype: Any = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        seed: int | None = 0,
        gpu_memory_utilization: float | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_logprobs: int = 20,
        block_size: int | None = None,
        kv_cache_dtype: str | None = None,
        enable_prefix_caching: bool | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        served_model_name: str | None = None,
        download_dir: str | None = None,
        trust_remote_code: bool = False,
        hf_token: str | None = None,
        flags: Sequence[str] = (),
        **others: Any,
    ) -> None:
        """`model`: a directory, a hub id or a .gguf file; empty: the embedded model.

        `seed`: makes requests without a seed repeatable from run to run; None: they are drawn.
        `flags`: further flags of `headgate serve`. Raises TypeError for an unknown argument,
        ValueError for one that is not served, ServerError where the server cannot start.
        """
        arguments = dict(locals())
        check_others(others)
        environment = {"HF_TOKEN": hf_token} if hf_token else {}
        self._server = PrivateServer([*to_flags(arguments), *flags], environment)
        try:
            self._server.wait_ready()
        except BaseException:
            self._server.close()
            raise
        self._channel = grpc.insecure_channel(self._server.address, options=_CHANNEL_OPTIONS)
        self._stub = router_pb2_grpc.RouterStub(self._channel)
        self._info = self._stub.Info(router_pb2.InfoRequest(), wait_for_ready=True)
        self._calls = Calls(self._server, self._stub, self._info)
        self._seed = seed
        self._numbers = itertools.count()
        self._chats = Chats(self._info)

    def generate(
        self,
        prompts: Any,
        sampling_params: Params = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        """Answers in the order of `prompts`: strings, token ids or dicts, one or a list.

        `sampling_params`: for all, or one for each. Raises ValueError for what cannot be served,
        naming the prompt; ServerError if the server ended.
        """
        _refuse(lora_request=lora_request)
        return self._run(read_prompts(prompts), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or a list of them, with the model's chat template.

        A last message by the assistant is continued, as by the server's chat route. `tools` are
        shown to the model; what it answers comes as it wrote it, calls too.
        """
        _refuse(lora_request=lora_request)
        if not add_generation_prompt and not continue_final_message:
            raise ValueError("`add_generation_prompt` = False is not supported")
        prompts = self._chats.prompts(
            [messages] if messages and isinstance(messages[0], Mapping) else messages,
            template=chat_template,
            tools=tools,
            variables=chat_template_kwargs,
            continued=continue_final_message,
        )
        return self._run(prompts, sampling_params, use_tqdm)

    def encode(
        self,
        prompts: Any,
        pooling_params: Any = None,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        pooling_task: str | None = None,
        pooling: str | None = None,
        normalize: bool = True,
    ) -> list[PoolingRequestOutput]:
        """Embeddings in the order of `prompts`, which are as for `generate`.

        `pooling`: "mean" or "last"; None: the flag `--pooling`. `normalize`: to length 1.
        `truncate_prompt_tokens`: keep only the last of a prompt's tokens.
        """
        _refuse(pooling_params=pooling_params, lora_request=lora_request)
        if pooling_task not in (None, "embed"):
            raise ValueError(f"`pooling_task` = {pooling_task!r} is not supported")
        if pooling not in _POOLINGS:
            raise ValueError(f"`pooling` must be mean or last, not {pooling!r}")
        asked = SamplingParams(truncate_prompt_tokens=truncate_prompt_tokens)
        embedding = router_pb2.Embedding(pooling=_POOLINGS[pooling], normalize=normalize)
        questions = [
            Question(str(next(self._numbers)), prompt, asked, asked.to_router(), embedding)
            for prompt in read_prompts(prompts)
        ]
        return cast("list[PoolingRequestOutput]", self._ask(questions, use_tqdm))

    def embed(self, prompts: Any, **arguments: Any) -> list[PoolingRequestOutput]:
        """As `encode`."""
        return self.encode(prompts, **arguments)

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: Any = None,
        use_tqdm: bool | Callable[..., Any] = False,
    ) -> list[BeamSearchOutput]:
        """The best continuations of each prompt by beam search, in the order of the prompts."""
        _refuse(lora_request=lora_request)
        sampling = params.to_sampling_params()
        return [
            beam_search_output(output)
            for output in self._run(read_prompts(prompts), sampling, use_tqdm)
        ]

    def close(self) -> None:
        """Ends the server; nothing of it is left when this returns."""
        self._channel.close()
        self._server.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(
        self, prompts: list[Prompt], params: Params, use_tqdm: bool | Callable[..., Any]
    ) -> list[RequestOutput]:
        each = _each(params, len(prompts))
        questions = []
        for prompt, own in zip(prompts, each, strict=True):
            number = next(self._numbers)
            wanted = own.to_router()
            if wanted.do_sample and wanted.seed is None and self._seed is not None:
                wanted = replace(wanted, seed=_derived_seed(self._seed, number))
            questions.append(Question(str(number), prompt, own, wanted))
        return cast("list[RequestOutput]", self._ask(questions, use_tqdm))

    def _ask(self, questions: list[Question], use_tqdm: bool | Callable[..., Any]) -> list[Output]:
        self._server.check()
        progress = make_progress(use_tqdm, len(questions), "Processed prompts")
        try:
            return self._calls.run(questions, progress)
        finally:
            progress.close()


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            raise ValueError(f"`{name}` is not supported")


def _each(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"there are {count} prompts and {len(params)} sampling_params")
    return list(params)


def _derived_seed(seed: int, number: int) -> int:
    """The seed of the number-th request of a program: a different one for each."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
