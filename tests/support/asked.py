"""A head without devices, for clients that choose the strategy, and its stages' statuses."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flowspec.cluster.controller.epochs import CancelTicket, Ended, Event, HeadEngine, NewRequest

import flowspec
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, load_head_parts
from flowspec.protocol.control import Ask, Decoding, Done, Turn, pack, unpack
from flowspec.protocol.messages import Status
from flowspec.speculation.strategies import STRATEGIES
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support.checkpoints import save_checkpoint

CONFIG = EngineConfig(strategy="flowspec", decode={"draft_topk": 7})  # what `serve` was given


def tiny_parts(folder: Path) -> HeadParts:
    """Load the head's part of a tiny model."""
    save_checkpoint(folder / "tiny", num_layers=2)
    plan = plan_split(open_checkpoint(folder / "tiny" / "target"), layers=(1, 1), dtype=None)
    run_split(plan, folder / "split", model_id="tiny")
    draft = str(folder / "tiny" / "eagle")
    return load_head_parts(CONFIG.changed(draft=draft), folder / "split")


class Asking:
    """A head without devices: requests wait, which suffices to check what will answer them."""

    def __init__(self, parts: HeadParts) -> None:
        self.told: list[Event] = []
        self.engine = HeadEngine(CONFIG, parts, None, self.told.append)  # type: ignore[arg-type]
        self.engine._suspend("no device has joined")
        self.tickets = 0

    def ask(self, decoding: Decoding | None, **fields: Any) -> Done | None:
        """Send a request; return its end if it has come at once."""
        self.tickets += 1
        ask = Ask(
            **{
                "id": 1,
                "version": flowspec.__version__,
                "turns": (Turn(role="user", content="a fox"),),
                "max_new_tokens": 8,
                "decoding": decoding,
                **fields,
            }
        )
        self.engine._do(NewRequest(self.tickets, unpack(pack(ask))))  # type: ignore[arg-type]
        ends = [e.done for e in self.told if isinstance(e, Ended) and e.ticket == self.tickets]
        return ends[0] if ends else None

    def cancel(self) -> None:
        """Cancel the newest request."""
        self.engine._do(CancelTicket(self.tickets))

    @property
    def chosen(self) -> tuple[Any, Any]:
        """Return the strategy and drafter of the next request."""
        return self.engine.head.spec, self.engine.head.config


def decoding(strategy: str = "streaming", run: str = "1", **parameters: Any) -> Decoding:
    """Return all parameters of the strategy, some of them changed."""
    effective = {**asdict(STRATEGIES[strategy].defaults), **parameters}
    return Decoding(strategy=strategy, parameters=effective, run=run)


def status(stage: int, busy_s: float, rows: int, pruned: int, num_closes: int = 0) -> Status:
    """Return a stage's totals."""
    return Status(
        stage=stage,
        busy_s=busy_s,
        num_segments=1,
        num_rows_run=rows,
        num_rows_pruned=pruned,
        num_requests=0,
        num_closes=num_closes,
    )


def watched(*before: Status) -> Any:
    """Return a head of two stages that has received these statuses."""
    return SimpleNamespace(
        statuses={one.stage: one for one in before},
        heard_at={one.stage: 0.0 for one in before},
        pipe=SimpleNamespace(num_stages=2, num_closes=0),
        outage=None,
    )


def hear(head: Any, *statuses: Status) -> None:
    """Send new totals to the head."""
    for one in statuses:
        head.statuses[one.stage], head.heard_at[one.stage] = one, float("inf")
