"""Flags of limits: requests at a time, lengths, batches, caches, what a request may ask for."""

from __future__ import annotations

from headgate.launcher.flag import Flag, Kind, Policy

_CHUNKING = "prompts are computed in chunks beside running requests, so there is nothing to balance"

LIMITS = (
    Flag(
        "max-concurrent-requests",
        Kind.INTEGER,
        "Answers running or waiting at a time; a request for one more gets 429. A request with "
        "`n`, `best_of` or beams has several.",
        default=128,
        minimum=1,
    ),
    Flag(
        "max-best-of",
        Kind.INTEGER,
        "The largest `best_of` of a request.",
        default=2,
        minimum=1,
    ),
    Flag(
        "max-stop-sequences",
        Kind.INTEGER,
        "Largest number of stop strings of a request.",
        default=4,
        minimum=0,
    ),
    Flag(
        "max-top-n-tokens",
        Kind.INTEGER,
        "Largest `top_n_tokens` of a request.",
        default=5,
        minimum=0,
    ),
    Flag(
        "max-input-tokens",
        Kind.INTEGER,
        "Longest prompt, in tokens.",
        minimum=1,
        default_text="--max-total-tokens - 1",
    ),
    Flag(
        "max-input-length",
        Kind.INTEGER,
        "TGI's old name of --max-input-tokens.",
        minimum=1,
        policy=Policy.ALIAS,
        note="--max-input-tokens",
    ),
    Flag(
        "max-total-tokens",
        Kind.INTEGER,
        "Longest prompt and answer together, in tokens.",
        minimum=2,
        default_text="the model's positions, within the KV memory",
    ),
    Flag(
        "max-batch-prefill-tokens",
        Kind.INTEGER,
        "Most tokens that one step computes; on a CPU never more than 1024.",
        minimum=1,
        default_text="a step of 150 ms on a CPU (300 for up to 192 tokens), 4096 on a GPU",
    ),
    Flag(
        "max-batch-total-tokens",
        Kind.INTEGER,
        "Size of the KV cache in tokens.",
        minimum=1,
        default_text="1 GiB on a CPU, the free memory on a GPU",
    ),
    Flag(
        "max-batch-size",
        Kind.INTEGER,
        "Most sequences running at a time.",
        minimum=1,
        default_text="--max-concurrent-requests, within the step's tokens",
    ),
    Flag(
        "max-client-batch-size",
        Kind.INTEGER,
        "Most prompts in one /v1/completions call.",
        default=4,
        minimum=1,
    ),
    Flag(
        "block-size",
        Kind.INTEGER,
        "Tokens per block of the KV cache.",
        default=16,
        minimum=1,
        maximum=256,
        own=True,
    ),
    Flag(
        "kv-overcommit",
        Kind.NUMBER,
        "How far admission bets on answers ending early: 0 reserves each request's longest "
        "answer, more admits more requests and preempts more often.",
        default=0.1,
        minimum=0,
        maximum=1,
        own=True,
    ),
    Flag(
        "disable-prefix-caching",
        Kind.SWITCH,
        "Don't reuse the KV blocks of earlier prompts.",
        default=False,
        own=True,
    ),
    Flag(
        "enable-prefill-logprobs",
        Kind.SWITCH,
        "Accepted for TGI's command lines.",
        default=False,
        policy=Policy.NO_OP,
        note="the prompt's log-probabilities are there for every request that asks for them",
        neutral=(False,),
    ),
    Flag(
        "waiting-served-ratio",
        Kind.NUMBER,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note=_CHUNKING,
    ),
    Flag(
        "max-waiting-tokens",
        Kind.INTEGER,
        "Accepted for TGI's command lines.",
        policy=Policy.NO_OP,
        note=_CHUNKING,
    ),
    Flag(
        "disable-grammar-support",
        Kind.SWITCH,
        "Refuse requests for structured output.",
        default=False,
    ),
    Flag(
        "watermark-gamma",
        Kind.NUMBER,
        "Share of the vocabulary that a watermark favours.",
        default=0.5,
        minimum=0.01,
        maximum=1,
    ),
    Flag(
        "watermark-delta",
        Kind.NUMBER,
        "By how much a watermark raises the logits of favoured tokens.",
        default=2.0,
        minimum=-100,
        maximum=100,
    ),
)
