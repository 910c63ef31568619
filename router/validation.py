"""From a client's `GenerateRequest` to a `ValidRequest`: the last place that checks anything.

It tokenises, applies lengths and limits, draws the seed, and names the field at fault in a
ValidationError. It does not decide whether there is room for the request.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from headgate.proto import router_pb2
from headgate.proto.messages import Pooling, RowSampling
from headgate.router.beam_search import BeamParams, EarlyStopping
from headgate.router.config import RouterConfig
from headgate.router.errors import AdapterNotFoundError, UnavailableError, ValidationError
from headgate.router.grammar_compiler import GrammarCompiler
from headgate.router.pooling import pooling_of
from headgate.router.sampling_params import MIN_TEMPERATURE, ParameterLimits, SamplingParams
from headgate.router.tokenizer import Tokenizer

_MAX_SHOWN = 128  # characters of a client's own word in a message
SEED_BITS = 63  # of a drawn seed: fits a signed 64-bit integer of any client


@dataclass(frozen=True, slots=True)
class Progress:
    """What an earlier router had already sent of an answer."""

    tokens: tuple[router_pb2.Token, ...]
    text_offset: int  # characters
    finished: bool  # to its end


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request that can be served as it stands."""

    request_id: str  # the client's name for it
    call_id: str  # of the call it is a part of, or empty
    prompt_ids: list[int]
    prompt_characters: int
    prompt_text: str | None  # None: it came as token ids
    sampling: RowSampling
    seed: int | None  # None: greedy
    parameters: SamplingParams
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    arrival: float  # seconds, time.monotonic()
    num_answers: int = 1  # to generate
    num_given: int = 1  # of them; fewer than all: the best
    ranked: bool = False  # best first, when all have ended
    normalize: bool = True  # an embedding, to length 1
    scores_only: bool = False  # the prompt's logprobs are all: the token sampled is dropped
    beams: BeamParams | None = None  # how to search for the answers; None: they are chosen
    progress: Mapping[int, Progress] = field(default_factory=dict)  # by the answer's index


class Validator:
    """Holds the limits. `vocab_size` is the tokenizer's until the shards tell the model's."""

    def __init__(self, config: RouterConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._limits = ParameterLimits(
            max_stop_sequences=config.max_stop_sequences,
            max_top_n_tokens=config.max_top_n_tokens,
            max_best_of=min(config.max_best_of, config.max_concurrent_requests),
            max_answers=config.max_concurrent_requests,
        )
        self._compiler = GrammarCompiler(config.model_path)
        self._pooling = pooling_of(config.pooling, config.model_path)
        self.vocab_size = tokenizer.vocab_size
        self._eos_token_ids: tuple[int, ...] | None = None
        self._heard = asyncio.Event()

    def hear(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        prepare: Callable[[str], Awaitable[None]],
    ) -> None:
        """What shards tell of their model; `prepare` has them compile a grammar beforehand."""
        self.vocab_size, self._eos_token_ids = vocab_size, tuple(eos_token_ids)
        self._prepare = prepare
        self._heard.set()

    def give_up(self) -> None:
        """There will be no shards."""
        self._heard.set()

    async def validate(
        self,
        message: router_pb2.GenerateRequest,
        arrival: float | None = None,
        delivered: router_pb2.Delivered | None = None,
    ) -> ValidRequest:
        """Raises ValidationError. `delivered`: what an earlier router sent of the answer."""
        arrival = time.monotonic() if arrival is None else arrival
        parameters = SamplingParams.from_proto(message.parameters)
        if message.HasField("embedding"):
            parameters = self._for_embedding(parameters)
        parameters.check(self._limits)
        self._check_prompt(message)
        self._check_truncate(parameters)
        prompt_ids = await self._prompt_ids(message)
        if parameters.truncate is not None:
            prompt_ids = prompt_ids[-parameters.truncate :]
        if message.HasField("embedding"):
            self._check_input_length(len(prompt_ids))
        max_new_tokens = self._check_lengths(len(prompt_ids), parameters)
        self._check_ids(parameters)
        grammar = await self._compile(parameters)
        text = message.text if message.WhichOneof("prompt") == "text" else None
        seed = self._seed(parameters, delivered)
        num_given = parameters.n or 1
        num_answers = parameters.best_of or num_given
        beams = await self._beam_params(parameters, max_new_tokens)
        ranked = num_answers > 1 and parameters.best_of is not None
        # What is sent only when all is done is made and sent again as a whole.
        progress = {} if ranked or beams else self._progress(delivered, num_answers, max_new_tokens)
        return ValidRequest(
            request_id=message.request_id or secrets.token_hex(8),
            call_id=message.call_id,
            prompt_ids=prompt_ids,
            prompt_characters=len(text) if text is not None else 0,
            prompt_text=text,
            sampling=replace(
                self._row_sampling(parameters, max_new_tokens, seed),
                grammar=grammar,
                pooling=self._pooling_of(message),
                bad_words=await self._bad_words(parameters.bad_words, max_new_tokens),
            ),
            seed=seed,
            parameters=parameters,
            stop=parameters.stop,
            include_stop=parameters.include_stop is not False,
            skip_special_tokens=parameters.skip_special_tokens is not False,
            arrival=arrival,
            num_answers=num_answers,
            num_given=num_given,
            ranked=ranked,
            beams=beams,
            normalize=message.embedding.normalize or not message.embedding.HasField("normalize"),
            scores_only=parameters.scores_only,
            progress=progress,
        )

    # ------------------------------------------------------------------ rules

    def _for_embedding(self, parameters: SamplingParams) -> SamplingParams:
        """The parameters of a row that samples nothing: it takes the room of one token."""
        for name in (entry.name for entry in fields(parameters)):
            if name != "truncate" and getattr(parameters, name) not in (None, ()):
                raise ValidationError(f"`{name}` has no meaning for an embedding", field=name)
        return replace(parameters, max_new_tokens=1, logprobs=False)

    def _pooling_of(self, message: router_pb2.GenerateRequest) -> Pooling:
        if not message.HasField("embedding"):
            return Pooling.NONE
        asked = message.embedding.pooling
        return Pooling(asked) if asked else self._pooling

    def _check_prompt(self, message: router_pb2.GenerateRequest) -> None:
        if message.adapter_id:
            raise AdapterNotFoundError(
                f"`adapter_id`: there is no adapter `{message.adapter_id[:_MAX_SHOWN]}`",
                field="adapter_id",
            )
        kind = message.WhichOneof("prompt")
        if kind is None or not (message.text if kind == "text" else message.token_ids.ids):
            raise ValidationError("`inputs` cannot be empty", field="inputs")

    def _check_truncate(self, parameters: SamplingParams) -> None:
        limit, given = self._config.max_input_tokens, parameters.truncate
        if given is not None and not 0 < given <= limit:
            raise ValidationError(
                f"`truncate` must be strictly positive and less than {limit}. Given: {given}",
                field="truncate",
            )

    async def _prompt_ids(self, message: router_pb2.GenerateRequest) -> list[int]:
        if message.WhichOneof("prompt") == "token_ids":
            ids = list(message.token_ids.ids)
            self._check_vocabulary(ids, "inputs")
            return ids
        special = message.add_special_tokens or not message.HasField("add_special_tokens")
        try:
            ids = await self._tokenizer.encode(message.text, add_special_tokens=special)
        except Exception as error:  # tokenizers raises plain Exception
            raise ValidationError(f"tokenizer error {error}", field="inputs") from error
        if not ids:
            raise ValidationError("`inputs` cannot be empty", field="inputs")
        return ids

    def _check_lengths(self, inputs: int, parameters: SamplingParams) -> int:
        """The most tokens that a row samples; raises where prompt and answer do not fit."""
        limit = self._config.max_total_tokens
        new = parameters.max_new_tokens
        if new is None:
            new = max(limit - inputs, 0)
        if inputs + new > limit:
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {limit}. "
                f"Given: {inputs} `inputs` tokens and {new} `max_new_tokens`",
                field="max_new_tokens",
                context_length=limit,
            )
        fits = new > 0 or (parameters.scores_only and inputs < limit)
        self._check_input_length(inputs, fits=fits)
        if (parameters.min_new_tokens or 0) > new:
            raise ValidationError(
                f"`min_new_tokens` must be <= `max_new_tokens` = {new}. "
                f"Given: {parameters.min_new_tokens}",
                field="min_new_tokens",
            )
        return max(new, 1)  # a row that only scores its prompt samples a token at its end

    def _check_input_length(self, inputs: int, *, fits: bool = True) -> None:
        if inputs > self._config.max_input_tokens or not fits:
            raise ValidationError(
                f"`inputs` must have less than {self._config.max_input_tokens} tokens. "
                f"Given: {inputs}",
                field="inputs",
                context_length=self._config.max_total_tokens,
            )

    def _check_ids(self, parameters: SamplingParams) -> None:
        self._check_vocabulary(parameters.stop_token_ids, "stop_token_ids")
        self._check_vocabulary(parameters.allowed_token_ids, "allowed_token_ids")
        self._check_vocabulary([id_ for id_, _ in parameters.logit_bias], "logit_bias")

    def _check_vocabulary(self, ids: list[int] | tuple[int, ...], field: str) -> None:
        if ids and max(ids) >= self.vocab_size:
            raise ValidationError(
                f"`{field}` holds token {max(ids)}, the vocabulary ends at {self.vocab_size - 1}",
                field=field,
            )

    async def _bad_words(
        self, words: Sequence[str], max_length: int
    ) -> tuple[tuple[int, ...], ...]:
        """The token sequences to keep out: each word at the answer's beginning, and after a space.

        Those that no answer of `max_length` tokens can hold are left out.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            stem = word.lstrip(" ")
            for text in (stem, " " + stem) if stem else (word,):
                ids = await self._tokenizer.encode(text, add_special_tokens=False)
                if 0 < len(ids) <= max_length:
                    found[tuple(ids)] = None
        return tuple(found)

    async def _compile(self, parameters: SamplingParams) -> str:
        """The grammar as shards take it; empty where there is none."""
        if parameters.grammar is None:
            return ""
        if not self._config.grammar_support:
            raise ValidationError("grammar is not supported", field="grammar")
        eos = await self._model_eos()
        grammar = await self._compiler.compile(parameters.grammar, self.vocab_size, eos)
        await self._prepare(grammar)
        return grammar

    async def _model_eos(self) -> tuple[int, ...]:
        """The model's own, once there are shards to tell them. Raises UnavailableError."""
        await self._heard.wait()  # a router started anew gets its requests before its shards
        if self._eos_token_ids is None:
            raise UnavailableError()
        return self._eos_token_ids

    def close(self) -> None:
        """Ends what compiles grammars."""
        self._compiler.close()

    # --------------------------------------------------------------- the result

    def _seed(
        self, parameters: SamplingParams, delivered: router_pb2.Delivered | None
    ) -> int | None:
        if not parameters.samples:
            return None
        if delivered is not None and delivered.HasField("seed"):
            return delivered.seed
        if parameters.seed is not None:
            return parameters.seed
        return secrets.randbits(SEED_BITS)

    async def _beam_params(
        self, parameters: SamplingParams, max_new_tokens: int
    ) -> BeamParams | None:
        if not parameters.searches:
            return None
        eos = () if parameters.ignore_eos else await self._model_eos()
        penalty = parameters.length_penalty
        beams = BeamParams(
            width=parameters.beam_width or 1,
            max_new_tokens=max_new_tokens,
            min_new_tokens=parameters.min_new_tokens or 0,
            length_penalty=1.0 if penalty is None else penalty,
            early_stopping=EarlyStopping(parameters.early_stopping or 0),
            eos_ids=frozenset(eos),
            stop_ids=frozenset(parameters.stop_token_ids),
        )
        if beams.num_candidates > self.vocab_size:
            raise ValidationError(
                f"`beam_width` = {beams.width} needs {beams.num_candidates} tokens to choose from, "
                f"and the vocabulary has {self.vocab_size}",
                field="beam_width",
            )
        return beams

    def _row_sampling(
        self, parameters: SamplingParams, max_new_tokens: int, seed: int | None
    ) -> RowSampling:
        p = parameters
        temperature = 0.0
        if p.samples:
            temperature = max(1.0 if p.temperature is None else p.temperature, MIN_TEMPERATURE)
        return RowSampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=min(p.top_k or 0, self.vocab_size),
            top_p=1.0 if p.top_p is None else p.top_p,
            typical_p=1.0 if p.typical_p is None else p.typical_p,
            min_p=p.min_p or 0.0,
            repetition_penalty=1.0 if p.repetition_penalty is None else p.repetition_penalty,
            frequency_penalty=p.frequency_penalty or 0.0,
            presence_penalty=p.presence_penalty or 0.0,
            watermark_gamma=self._config.watermark_gamma if p.watermark else 0.0,
            watermark_delta=self._config.watermark_delta if p.watermark else 0.0,
            seed=seed or 0,
            min_new_tokens=p.min_new_tokens or 0,
            ignore_eos=bool(p.ignore_eos),
            stop_token_ids=p.stop_token_ids,
            # Alternatives without the chosen token's own logprob would be of no use, and
            # `best_of` ranks by them.
            logprobs=p.logprobs is not False or bool(p.top_n_tokens) or (p.best_of or 0) > 1,
            top_n_tokens=min(p.top_n_tokens or 0, self.vocab_size),
            prompt_logprobs=bool(p.prompt_logprobs or p.prompt_top_n_tokens),
            logit_bias=p.logit_bias,
            allowed_token_ids=p.allowed_token_ids,
            prompt_top_n_tokens=min(p.prompt_top_n_tokens or 0, self.vocab_size),
        )

    def _progress(
        self, delivered: router_pb2.Delivered | None, num_answers: int, max_new_tokens: int
    ) -> dict[int, Progress]:
        progress: dict[int, Progress] = {}
        for answer in delivered.answers if delivered is not None else ():
            if answer.index >= num_answers:
                raise ValidationError(f"`delivered` has answer {answer.index} of {num_answers}")
            if len(answer.tokens) > max_new_tokens:
                raise ValidationError("`delivered` holds more tokens than `max_new_tokens` allows")
            self._check_vocabulary([token.id for token in answer.tokens], "delivered")
            progress[answer.index] = Progress(
                tuple(answer.tokens), answer.text_offset, answer.finished
            )
        if sum(answer.finished for answer in progress.values()) == num_answers:
            raise ValidationError("`delivered` holds the ends of all answers")
        return progress
