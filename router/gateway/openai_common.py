"""What the two OpenAI routes share: parameters, model names, usage, ids, stream ends."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headgate.proto import router_pb2
from headgate.router.errors import RouterError, ValidationError
from headgate.router.gateway.errors import ModelNotFoundError, openai_error
from headgate.router.gateway.exchange import Exchange
from headgate.router.gateway.generation import AnswerStream, check_num_answers
from headgate.router.gateway.grammar_fields import with_grammar_field
from headgate.router.gateway.openai_schemas import CommonFields, SamplingFields
from headgate.router.gateway.served_chat import ServedChat
from headgate.router.gateway.services import Services
from headgate.router.gateway.sse import DONE, event, json_number, json_string
from headgate.router.gateway.tgi_schemas import MAX_UINT32, MAX_UINT64
from headgate.router.gateway.token import Token

FINISH_REASONS = {
    router_pb2.FINISH_REASON_LENGTH: b"length",
    router_pb2.FINISH_REASON_EOS_TOKEN: b"stop",
    router_pb2.FINISH_REASON_STOP_SEQUENCE: b"stop",
}
_EARLY_STOPPING: dict[bool | str | None, router_pb2.EarlyStopping] = {
    None: router_pb2.EARLY_STOPPING_HEURISTIC,
    False: router_pb2.EARLY_STOPPING_HEURISTIC,
    True: router_pb2.EARLY_STOPPING_FIRST,
    "never": router_pb2.EARLY_STOPPING_NEVER,
}
_NEUTRAL_MODELS = ("tgi", "dummy")
_GREEDY_BELOW = 1e-5  # a temperature that float32 logits cannot tell from 0
# Where the router's name of a field is not the one that these routes' clients know.
FIELD_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "prompt_top_n_tokens": "prompt_logprobs",
    "beam_width": "best_of",
}
# Fields that are variables of the chat template.
VARIABLES = {
    "reasoning_effort": "reasoning_effort",
    "reasoning.effort": "reasoning_effort",
    "verbosity": "verbosity",
    "text.verbosity": "verbosity",
}
_MAX_SHOWN = 128  # characters of a client's own word in a message
_MAX_DIGITS = len(str(MAX_UINT32))


@dataclass(frozen=True, slots=True)
class Reply:
    """The constant fields of one reply, ready as JSON."""

    id: bytes
    created: bytes
    model: bytes
    fingerprint: bytes

    @classmethod
    def of(cls, info: router_pb2.InfoResponse, kind: str) -> Reply:
        """`kind`: the prefix of the id, "chatcmpl" or "cmpl"."""
        return cls(
            json_string(f"{kind}-{uuid.uuid4().hex}"),
            b"%d" % int(time.time()),
            json_string(served_name(info)),
            json_string(f"{info.version}-native"),
        )


def served_name(info: router_pb2.InfoResponse) -> str:
    return info.served_model_name or info.model_id


def check_model(model: str | None, info: router_pb2.InfoResponse) -> None:
    """Raises ModelNotFoundError unless `model` is neutral or what is served."""
    names = (*_NEUTRAL_MODELS, info.model_id, info.served_model_name)
    if model and model not in names:
        raise ModelNotFoundError(
            f"The model `{model[:_MAX_SHOWN]}` does not exist; `{served_name(info)}` is served",
            field="model",
        )


def warn_of_hints(
    exchange: Exchange, chat: ServedChat, hints: Mapping[str, str | None], tier: str | None
) -> None:
    """Says which wishes have no effect here: variables the template does not know, and tiers.

    `hints`: the wish for each variable of the chat template, by the name of its field.
    """
    for name, value in hints.items():
        if value and not chat.knows(VARIABLES[name]):
            exchange.warn_ignored(name, [value])
    if tier not in (None, "auto", "default"):
        exchange.warn_ignored("service_tier", [str(tier)])


def to_parameters(
    body: SamplingFields,
    *,
    max_tokens: int | None,
    top_n: int | None,
    prompt_logprobs: bool = False,
    grammar: router_pb2.Grammar | None = None,
) -> router_pb2.Parameters:
    """The router's parameters. `top_n`: alternatives per token; None: no logprobs at all."""
    if body.temperature is not None and body.temperature < 0.0:
        raise ValidationError("`temperature` must be >= 0", field="temperature")
    greedy = body.temperature is not None and body.temperature < _GREEDY_BELOW
    choosing: dict[str, Any] = {"do_sample": False}
    if not greedy:
        choosing = {
            "do_sample": True,
            "temperature": body.temperature,
            "top_k": _top_k(body.top_k),
            "top_p": body.top_p,
            "typical_p": body.typical_p,
            "min_p": body.min_p,
            "seed": _seed(body.seed),
        }
    return router_pb2.Parameters(
        **choosing,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        watermark=body.watermark,
        max_new_tokens=max_tokens,
        min_new_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=_stop(body.stop),
        stop_token_ids=body.stop_token_ids,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens,
        logprobs=top_n is not None,
        top_n_tokens=top_n or None,
        prompt_logprobs=prompt_logprobs or None,
        prompt_top_n_tokens=(top_n or None) if prompt_logprobs else None,
        grammar=grammar,
    )


def add_choices(
    parameters: router_pb2.Parameters, body: CommonFields, info: router_pb2.InfoResponse
) -> None:
    """Puts into the parameters how many answers there are to be, and what else these two routes
    may ask for.

    Raises ValidationError.
    """
    parameters.allowed_token_ids.extend(body.allowed_token_ids or ())
    parameters.bad_words.extend(body.bad_words or ())
    if body.prompt_logprobs is not None:
        if body.stream:
            raise ValidationError("`prompt_logprobs` cannot be streamed", field="prompt_logprobs")
        parameters.prompt_logprobs = True
        top_n = max(body.prompt_logprobs, parameters.prompt_top_n_tokens)
        if top_n:
            parameters.prompt_top_n_tokens = top_n
    for id_, value in (body.logit_bias or {}).items():
        if not id_.isdecimal() or len(id_) > _MAX_DIGITS or int(id_) > MAX_UINT32:
            raise ValidationError(
                f"`logit_bias` must be numbers by token id, not by {id_[:_MAX_SHOWN]!r}",
                field="logit_bias",
            )
        parameters.logit_bias[int(id_)] = value
    if body.n is not None:
        check_num_answers(body.n, info)
        parameters.n = body.n
    if body.use_beam_search:
        _add_beams(parameters, body)
        return
    for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
        if getattr(body, name) not in (None, neutral):
            raise ValidationError(f"`{name}` needs `use_beam_search`", field=name)
    if body.best_of is None or body.best_of == (body.n or 1):
        return  # all that are made are given: they need not wait for each other
    if body.stream:
        raise ValidationError("`best_of` > `n` cannot be streamed", field="best_of")
    parameters.best_of = body.best_of


def names_given(names: Mapping[str, str], body: CommonFields) -> Mapping[str, str]:
    """A route's names of the router's fields, with those that may come from one field or another:
    what brings the grammar, and what says how many beams there are."""
    names = with_grammar_field(names, body)
    if not body.use_beam_search:
        return names
    return {**names, "beam_width": "best_of" if body.best_of else "n"}


def _add_beams(parameters: router_pb2.Parameters, body: CommonFields) -> None:
    """vLLM's way to ask for beams: the n best of best_of (absent: n) of them."""
    if body.stream:
        raise ValidationError("`use_beam_search` cannot be streamed", field="use_beam_search")
    if body.early_stopping not in _EARLY_STOPPING:
        raise ValidationError(
            '`early_stopping` must be true, false or "never"', field="early_stopping"
        )
    if body.temperature is not None and body.temperature not in (0.0, 1.0):
        raise ValidationError(
            "`temperature` cannot be combined with `use_beam_search`", field="temperature"
        )
    # These routes sample by default: not here.
    parameters.do_sample = False
    for name in ("temperature", "seed"):
        parameters.ClearField(name)
    parameters.beam_width = body.best_of or body.n or 1
    parameters.early_stopping = _EARLY_STOPPING[body.early_stopping]
    if body.length_penalty is not None:
        parameters.length_penalty = body.length_penalty


def _top_k(value: int | None) -> int | None:
    if value is None or value in (0, -1):  # vLLM's ways to say off
        return None
    if not 0 < value <= MAX_UINT32:
        raise ValidationError("`top_k` must be positive, or 0 or -1 for off", field="top_k")
    return value


def _seed(value: int | None) -> int | None:
    if value is None or value == -1:
        return None
    if not 0 <= value <= MAX_UINT64:
        raise ValidationError(f"`seed` must be >= 0 and <= {MAX_UINT64}", field="seed")
    return value


def _stop(value: str | list[str] | None) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return value or []


def alternatives(asked: int | None, top_n: int | None) -> int | None:
    """The larger of two ways to ask for alternatives; None: neither was used."""
    return None if asked is None and top_n is None else max(asked or 0, top_n or 0)


# ------------------------------------------------------------------- shapes


def usage(finished: Iterable[router_pb2.Finished]) -> bytes:
    """Token counts, summed; a prompt with several answers counts once."""
    prompt = completion = 0
    for entry in finished:
        prompt += entry.input_tokens if entry.index == 0 else 0
        completion += entry.generated_tokens
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
        prompt,
        completion,
        prompt + completion,
    )


def finish_reason(finished: router_pb2.Finished) -> bytes:
    """As a JSON string."""
    return b'"%s"' % FINISH_REASONS.get(finished.reason, b"length")


def logprob_of(token: Token) -> bytes:
    return json_number(token.logprob) if token.logprob is not None else b"null"


def token_logprobs(token: Token) -> bytes:
    """OpenAI's object for one token of a chat."""
    return b'{%s,"top_logprobs":[%s]}' % (
        _token_logprob(token),
        b",".join(b"{%s}" % _token_logprob(other) for other in token.top),
    )


def _token_logprob(token: Token) -> bytes:
    return b'"token":%s,"logprob":%s,"bytes":[%s]' % (
        json_string(token.text),
        logprob_of(token),
        b",".join(b"%d" % byte for byte in token.text.encode()),
    )


def prompt_logprobs(prefill: Sequence[Token], top_n: int | None) -> bytes:
    """vLLM's list: for each prompt token its logprob and those of `top_n` others, by token id.

    As a member with its comma; empty where `top_n` is None.
    """
    if top_n is None:
        return b""
    return b',"prompt_logprobs":[%s]' % b",".join(_prompt_token(token, top_n) for token in prefill)


def _prompt_token(token: Token, top_n: int) -> bytes:
    if token.logprob is None:
        return b"null"
    ranks = {other.id: rank for rank, other in enumerate(token.top, start=1)}
    shown = {token.id: token} | {other.id: other for other in token.top[:top_n]}
    return b"{%s}" % b",".join(
        b'"%d":{"logprob":%s,"rank":%s,"decoded_token":%s}'
        % (
            id_,
            logprob_of(entry),
            b"%d" % ranks[id_] if id_ in ranks else b"null",
            json_string(entry.text),
        )
        for id_, entry in shown.items()
    )


class OpenAIStream(AnswerStream):
    """Ends with a usage event where asked, and with [DONE]."""

    def __init__(
        self, services: Services, exchange: Exchange, usage_event: tuple[bytes, bytes] | None
    ) -> None:
        """`usage_event`: what goes before and after the counts; None: no such event."""
        super().__init__(services, exchange)
        self._usage_event = usage_event

    def tail(self, finished: Sequence[router_pb2.Finished]) -> bytes:
        if self._usage_event is None or not finished:
            return DONE
        before, after = self._usage_event
        return before + usage(finished) + after + DONE

    def error_event(self, error: RouterError) -> bytes:
        return event(openai_error(error, self._exchange.field_names))
