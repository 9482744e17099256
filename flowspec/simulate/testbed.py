"""The reference testbed's times for the simulator: what a message and a piece of work cost.

After the published testbed (arXiv 2507.02620): head and 4 boards, a quarter of Vicuna-7B in fp16 on
each. Rows are free up to the knee, where reading the weights takes as long as computing. Figures
from it are emulated, not measured.
"""

from dataclasses import dataclass

from flowspec.effects import Work
from flowspec.wire import Batch, Features, Message, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """Times in seconds; `work` and `link` are the simulator's two cost models."""

    stage_weight_bytes: float = 3.24e9
    bandwidth: float = 55e9  # bytes/s of a board's memory
    knee_rows: int = 80
    overhead_s: float = 2e-3  # per forward
    lm_head_s: float = 5e-3
    draft_s: float = 14e-3  # one EAGLE forward on the head; 0: lookups, which cost nothing here
    latency_s: float = 0.3e-3
    rate: float = 125e6  # bytes/s of a link
    hidden_bytes: int = 8192  # of one row: 4096 in fp16

    def work(self, rank: int, work: Work) -> float:
        """Seconds of a forward."""
        del rank
        beyond_knee = max(1.0, work.rows / self.knee_rows)
        if work.kind == "draft":  # of no rows where all was known: nothing runs
            return max(1e-6, self.draft_s * beyond_knee if work.rows else 0.0)
        forward = self.stage_weight_bytes / self.bandwidth * beyond_knee + self.overhead_s
        return forward + (self.lm_head_s if work.kind == "verify" else 0.0)

    def link(self, source: int, to: int, message: Message) -> float:
        """Seconds from sending to having."""
        del source, to
        num_bytes = 64.0
        match message:
            case Segment():
                num_bytes += self._segment_bytes(message)
            case Batch():
                num_bytes += sum(self._segment_bytes(segment) for segment in message.segments)
            case Features():
                num_bytes += len(message.nodes) * (self.hidden_bytes + 8)
        return self.latency_s + num_bytes / self.rate

    def _segment_bytes(self, segment: Segment) -> float:
        hidden = self.hidden_bytes if segment.hidden is not None else 0
        return float(len(segment.nodes) * (20 + hidden))
