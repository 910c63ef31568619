"""BatchLimits: what a plan may ask of a shard's rows."""

from __future__ import annotations

from dataclasses import dataclass

from headgate.proto.messages import NewRow
from headgate.shard.sampling.problems import sampling_problem


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a plan may refer to."""

    num_blocks: int
    block_size: int  # tokens per KV block
    vocab_size: int
    max_total_tokens: int  # prompt and output of one row
    max_step_tokens: int  # computed in one step, of all rows
    expected_rows: int = 32  # held at once; room for more is made when it is needed

    @property
    def max_row_blocks(self) -> int:
        return -(-self.max_total_tokens // self.block_size)

    def problem_of(self, row: NewRow) -> str:
        """Why the row cannot be held; empty where it can."""
        known, sampling = len(row.prompt_ids) + len(row.output_ids), row.sampling
        if not row.prompt_ids:
            return "has no prompt"
        if len(row.output_ids) >= sampling.max_new_tokens:
            return f"has all of its {sampling.max_new_tokens} tokens already"
        if len(row.prompt_ids) + sampling.max_new_tokens > self.max_total_tokens:
            return f"may grow beyond {self.max_total_tokens} tokens"
        if row.num_computed_tokens >= known:
            return f"has {row.num_computed_tokens} of its {known} tokens computed"
        if row.num_computed_tokens > len(row.block_ids) * self.block_size:
            return f"has more tokens computed than its {len(row.block_ids)} blocks hold"
        if row.adapter_id:
            return f"asks for adapter {row.adapter_id!r}, and none is loaded"
        return sampling_problem(sampling, self.vocab_size)
