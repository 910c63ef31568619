"""What the launcher tells the router: a frozen dataclass, read from RUN/router.json."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Lengths and budgets in tokens, times in seconds. The launcher has checked the values."""

    model_path: str  # checkpoint directory: tokenizer and chat template are read from it
    model_id: str
    served_model_name: str
    control_address: str  # the launcher's socket, a path
    gateway_address: str  # "unix:/..." for gateways
    grpc_host: str
    grpc_port: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    num_shards: int = 1
    model_sha: str = ""
    revision: str = ""
    tokenizer_config_path: str = ""  # overrides the model's own tokenizer_config.json
    api_key: str = ""  # empty: none asked for
    dtype: str = "bfloat16"
    device: str = "cpu"
    quantize: str = ""
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_batch_size: int = 0  # 0: no limit
    max_client_batch_size: int = 4
    grammar_support: bool = True  # False: grammars are refused
    validation_workers: int = 2  # threads that tokenise
    block_size: int = 16
    kv_overcommit: float = 0.1
    speculate: int = 0  # draft tokens that a step may add to a row
    pooling: str = "auto"  # of embeddings: "mean", "last", or "auto": the model's own, else mean
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0
    prefix_caching: bool = True
    heartbeat_timeout: float = 10.0
    log_prompts: bool = False
