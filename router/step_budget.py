"""How many tokens a step may have: the configured number, and fewer for a while after a refusal."""

from __future__ import annotations

STEPS_BEFORE_GROWTH = 8  # steps that must run before a cut budget is doubled


class StepBudget:
    """Shards refuse a step that needs more memory than they have; a smaller one may fit."""

    def __init__(self, full: int) -> None:
        self._full = full
        self._steps = 0  # that ran since the last change
        self.tokens = full
        self.refusals_in_a_row = 0

    @property
    def is_cut(self) -> bool:
        return self.tokens < self._full

    def cut(self, refused_tokens: int) -> None:
        """A step of that many tokens was refused: half of it from now on."""
        self.tokens = max(min(self.tokens, refused_tokens) // 2, 1)
        self._steps = 0
        self.refusals_in_a_row += 1

    def grow(self) -> None:
        """A step ran."""
        self.refusals_in_a_row = 0
        if self.tokens < self._full:
            self._steps += 1
            if self._steps == STEPS_BEFORE_GROWTH:
                self.tokens = min(self.tokens * 2, self._full)
                self._steps = 0

    def restore(self) -> None:
        """New shards: what the old ones lacked says nothing about them."""
        self.tokens = self._full
        self._steps = self.refusals_in_a_row = 0
