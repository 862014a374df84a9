"""What drafting did: counts and seconds of one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class DraftStats:
    """Counts and seconds since the call began.

    Two definitions of acceptance stand side by side:

    * ``acceptance``: accepted / proposed, drafted tokens only.
    * ``acceptance_with_anchor``: each step's first token (the anchor, which the target itself chose) counted as proposed and as
      accepted, as DFlash servers have published it.

    Attributes:
        draft_steps: draft forward passes, each followed by one verification.
        plain_steps: evaluations of a token without a draft (no row in the window yet, or no room left in the context).
        proposed, accepted: drafted tokens.
        accepted_by_position: how often the token at block position 1, 2, ... was accepted.
        steps: per draft step, how many tokens were accepted.
    """

    prompt_tokens: int = 0
    prefix_reused: int = 0
    tokens: int = 0
    draft_steps: int = 0
    plain_steps: int = 0
    proposed: int = 0
    accepted: int = 0
    accepted_by_position: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    capture_s: float = 0.0
    read_s: float = 0.0
    sample_s: float = 0.0
    rollback_s: float = 0.0
    decode_s: float = 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def acceptance_with_anchor(self) -> float:
        proposed = self.proposed + self.draft_steps
        return (self.accepted + self.draft_steps) / proposed if proposed else 0.0

    @property
    def tau(self) -> float:
        """Mean committed tokens per draft step, the bonus token included."""
        return 1.0 + self.accepted / self.draft_steps if self.draft_steps else 0.0

    @property
    def prefill_tok_s(self) -> float:
        return (self.prompt_tokens - self.prefix_reused) / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tok_s(self) -> float:
        """Generated tokens, but the first, per second after the prefill, the consumer's own time left out."""
        return (self.tokens - 1) / self.decode_s if self.decode_s and self.tokens > 1 else 0.0

    def add_step(self, proposed: int, accepted: int) -> None:
        self.draft_steps += 1
        self.proposed += proposed
        self.accepted += accepted
        self.steps.append(accepted)
        missing = proposed - len(self.accepted_by_position)
        self.accepted_by_position.extend([0] * max(missing, 0))
        for i in range(accepted):
            self.accepted_by_position[i] += 1

    def to_dict(self) -> dict[str, Any]:
        names = ("acceptance", "acceptance_with_anchor", "tau", "prefill_tok_s", "decode_tok_s")
        return {**self.__dict__, **{name: getattr(self, name) for name in names}}
