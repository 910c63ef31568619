"""vLLM's beam search, offline: `LLM.beam_search(prompts, BeamSearchParams(beam_width=4, ...))`.

The search itself is the router's (headgate.router.beam_search), by Transformers' rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from headgate.outputs import Logprobs, RequestOutput
from headgate.sampling_params import SamplingParams


@dataclass(slots=True)
class BeamSearchParams:
    """How to search. Raises ValueError for a value out of range."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # 0 or 1: beams are not sampled
    length_penalty: float = 1.0  # score = logprob / length ** it
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = False  # True, False or "never", as in Transformers

    def __post_init__(self) -> None:
        self.to_sampling_params()

    def to_sampling_params(self) -> SamplingParams:
        """The same search, for all of its beams."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=0,
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam that ended."""

    tokens: list[int]  # prompt and answer
    logprobs: Logprobs  # of the answer's tokens
    cum_logprob: float
    text: str  # of the prompt, where it came as text, and the answer
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """A prompt's beams, best first."""

    sequences: list[BeamSearchSequence]


def beam_search_output(output: RequestOutput) -> BeamSearchOutput:
    return BeamSearchOutput(
        [
            BeamSearchSequence(
                tokens=[*output.prompt_token_ids, *answer.token_ids],
                logprobs=answer.logprobs or [],
                cum_logprob=answer.cumulative_logprob or 0.0,
                text=(output.prompt or "") + answer.text,
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
            )
            for answer in output.outputs
        ]
    )
