"""Stage: a filter. Rows come in, rows go out; a `Reroot` says which of them are dead.

A sans-IO core (see effects.py). It knows nothing of the head's tree or strategy. Per request it
keeps the cache of its layers and which node lies in which tree row. Rows of dead or unknown parents
are dropped just before their forward; an emptied segment still travels on, so that the head's
counts stay right. The last stage also holds the verifier and makes the verdicts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowspec.acceptance.coupled import choose
from flowspec.effects import EVERY_STAGE, HEAD, Send, Step, Work
from flowspec.model.kv_cache import COMMITTED, CacheFull, TreeKVCache
from flowspec.model.rows import STABLE_ROWS, run_logits, run_rows
from flowspec.model.stage_model import StageModel
from flowspec.request import NO_NODE, NodeId
from flowspec.verifier import Verifier
from flowspec.wire import (
    Close,
    Exit,
    Failed,
    Features,
    Message,
    Open,
    Ping,
    Reroot,
    Segment,
    Started,
    Status,
)

MAX_QUEUED = 256  # segments; the head keeps far fewer in flight, so more is a broken peer
MAX_TREE_ROWS = 4096  # of one request, beside its context
STATUS_INTERVAL_S = 0.25


@dataclass(slots=True)
class StageRequest:
    """One request on one stage. Lists run parallel to the cache's tree rows."""

    opened: Open
    cache: TreeKVCache
    feature_layers: tuple[int, ...]
    verifier: Verifier | None
    tip: NodeId = NO_NODE  # newest committed node
    tip_position: int = -1
    next_token: int | None = None  # the verdict after the tip, once known
    verdict_position: int = -1
    nodes: list[NodeId] = field(default_factory=list)
    parents: list[NodeId] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: dict[NodeId, int] = field(default_factory=dict)
    features: dict[int, list[Tensor]] = field(default_factory=dict)

    def is_alive(self, parent: NodeId, token: int) -> bool:
        """Whether a row under `parent` may still be true, as far as this stage knows."""
        if parent == self.tip:
            return self.next_token is None or token == self.next_token
        return parent in self.rows

    def admit(self, segment: Segment) -> list[int]:
        """Indices of the segment's rows that are alive; a row's parent may be in the segment."""
        admitted: set[NodeId] = set()
        alive = []
        rows = zip(segment.nodes, segment.parents, segment.tokens, strict=True)
        for index, (node, parent, token) in enumerate(rows):
            if parent in admitted or self.is_alive(parent, token):
                admitted.add(node)
                alive.append(index)
        return alive

    def add_rows(self, segment: Segment) -> list[int]:
        """Enter the rows; returns each one's parent as a row of the cache."""
        above = []
        for node, parent, token in zip(segment.nodes, segment.parents, segment.tokens, strict=True):
            row = self.rows.get(parent, COMMITTED)
            above.append(row)
            depth = self.tip_position if row == COMMITTED else self.positions[row]
            self.rows[node] = len(self.nodes)
            self.nodes.append(node)
            self.parents.append(parent)
            self.tokens.append(token)
            self.positions.append(depth + 1)
        return above

    def reroot(self, verdict: Reroot) -> list[int]:
        """Commit the path to the verdict's parent, forget the dead; returns the path's rows."""
        path: list[int] = []
        node = verdict.parent
        while node != self.tip:
            assert node in self.rows, f"verdict on node {node}, which this stage never ran"
            path.append(self.rows[node])
            node = self.parents[path[-1]]
        path.reverse()
        keep: list[int] = []
        alive: set[NodeId] = set()
        for row, (node, parent) in enumerate(zip(self.nodes, self.parents, strict=True)):
            is_root = parent == verdict.parent and self.tokens[row] == verdict.token
            if is_root or parent in alive:
                alive.add(node)
                keep.append(row)
        self.cache.reroot(path, keep)
        if path:
            self.tip_position = self.positions[path[-1]]
        self.tip, self.next_token = verdict.parent, verdict.token
        self.verdict_position = verdict.position
        self.nodes = [self.nodes[row] for row in keep]
        self.parents = [self.parents[row] for row in keep]
        self.tokens = [self.tokens[row] for row in keep]
        self.positions = [self.positions[row] for row in keep]
        self.rows = {node: row for row, node in enumerate(self.nodes)}
        return path


class Stage:
    """Rank 1..num_stages of the pipeline; `model` holds its layers."""

    def __init__(
        self, rank: int, num_stages: int, model: StageModel, *, shape_stable: bool = False
    ) -> None:
        self.rank = rank
        self.num_stages = num_stages
        self.model = model
        self.shape_stable = shape_stable
        self.requests: dict[int, StageRequest] = {}
        self.queue: deque[Open | Segment | Close] = deque()
        self.busy_s = 0.0
        self.num_segments = 0
        self.num_rows_run = 0
        self.num_rows_pruned = 0
        self._status_due = 0.0

    @property
    def is_last(self) -> bool:
        """Whether verdicts are made here."""
        return self.rank == self.num_stages

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Verdicts act at once; what came down the pipe waits for its turn."""
        match message:
            case Reroot():
                return self._reroot(message)
            case Ping():
                return [self._status(now)]
            case Open() | Segment() | Close():
                if len(self.queue) >= MAX_QUEUED:
                    return self._fail(message.request, f"{MAX_QUEUED} segments are waiting already")
                self.queue.append(message)
        return ()

    def poll(self, now: float) -> Step | None:
        """The next message from the pipe."""
        if not self.queue:
            return None
        match message := self.queue.popleft():
            case Open():
                return Step(sends=self._open(message))
            case Close():
                self.requests.pop(message.request, None)
                return Step(sends=[*self._pass_on(message), self._status(now)])
            case Segment():
                return self._forward(message)
        return None

    def _open(self, message: Open) -> Sequence[Send]:
        assert message.request not in self.requests, f"request {message.request} is already open"
        error = self._refusal(message)
        if error:
            return self._fail(message.request, error)
        layers = self.model.owned_features(message.feature_layers)
        capacity = message.capacity + (STABLE_ROWS if self.shape_stable else 0)
        self.requests[message.request] = StageRequest(
            opened=message,
            cache=self.model.new_cache(
                capacity, stable_context=message.context if self.shape_stable else None
            ),
            feature_layers=layers,
            features={layer: [] for layer in layers},
            verifier=Verifier() if self.is_last else None,
        )
        return self._pass_on(message)

    def _refusal(self, message: Open) -> str:
        """Why this request cannot have the cache it asks for; checked before memory is taken."""
        longest = self.model.config.max_position_embeddings
        if message.context > longest:
            return f"a context of {message.context} was asked for, the model holds {longest}"
        if message.capacity > message.context + MAX_TREE_ROWS:
            return (
                f"a cache of {message.capacity} rows was asked for, a context of "
                f"{message.context} needs at most {message.context + MAX_TREE_ROWS}"
            )
        return ""

    def _pass_on(self, message: Open | Close) -> list[Send]:
        return [] if self.is_last else [Send(self.rank + 1, message)]

    def _forward(self, segment: Segment) -> Step:
        """Drop the dead rows, run the living ones, hand them on."""
        started = [Send(HEAD, Started(request=segment.request, seq_no=segment.seq_no))]
        sends = started if self.rank == 1 else []
        if segment.verdict is not None:  # the control message may be late; rows must not pile up
            sends += self._reroot(segment.verdict)
        state = self.requests.get(segment.request)
        if state is None or not segment.prefix:
            alive = state.admit(segment) if state is not None else []
            self.num_rows_pruned += len(segment.nodes) - len(alive)
            segment = segment.select(alive)
        if state is None or not segment.nodes:
            return Step(sends=[*sends, *self._hand_on(replace(segment, hidden=None), state)])
        job = _Job(self, state, segment)
        work = Work(
            kind="verify" if self.is_last else "forward",
            rows=len(segment.nodes),
            context=state.tip_position + 1,
            run=job.run,
            finish=job.finish,
            about={"segments": (segment,)},
        )
        return Step(sends=sends, work=work)

    def _hand_on(self, segment: Segment, state: StageRequest | None) -> list[Send]:
        """After this stage: on to the next, or out of the pipe with a verdict if one is due."""
        if not self.is_last:
            return [Send(self.rank + 1, segment)]
        sends = self._verdict(state, segment) if state is not None else []
        left = Exit(
            request=segment.request,
            seq_no=segment.seq_no,
            rows=len(segment.nodes),
            slowest_rows=segment.slowest_rows,
            slowest_ms=segment.slowest_ms,
        )
        return [*sends, Send(HEAD, left)]

    def _verdict(self, state: StageRequest, segment: Segment) -> list[Send]:
        assert state.verifier is not None
        is_prompt_end = segment.prefix and segment.verify and segment.nodes
        if not segment.verify or not (state.verifier.walk() or is_prompt_end):
            return []
        position = state.tip_position + 1
        if not segment.prefix:
            position = state.positions[state.rows[state.verifier.tip]] + 1
        verdict = Reroot(
            request=segment.request,
            position=position,
            parent=state.verifier.tip,
            token=state.verifier.next_token,
        )
        to_head = Send(HEAD, verdict)
        return [to_head, *self._reroot(verdict), Send(EVERY_STAGE, verdict)]

    def _reroot(self, verdict: Reroot) -> list[Send]:
        """Apply a verdict; a late or doubled one changes nothing. Returns the features it freed."""
        state = self.requests.get(verdict.request)
        if state is None or verdict.position <= state.verdict_position:
            return []
        features = state.features
        nodes_before, rows_before = state.nodes, state.rows
        path = state.reroot(verdict)
        path_nodes = [nodes_before[row] for row in path]
        sends = []
        for layer in state.feature_layers:
            rows = features[layer]
            if path:
                hidden = torch.stack([rows[row] for row in path])
                sends.append(self._features(verdict.request, layer, path_nodes, hidden))
            features[layer] = [rows[rows_before[node]] for node in state.nodes]
        return sends

    def _features(self, request: int, layer: int, nodes: Sequence[NodeId], hidden: Tensor) -> Send:
        message = Features(request=request, layer=layer, nodes=tuple(nodes), hidden=hidden.cpu())
        return Send(HEAD, message)

    def _status(self, now: float) -> Send:
        self._status_due = now + STATUS_INTERVAL_S
        status = Status(
            stage=self.rank,
            busy_s=self.busy_s,
            num_segments=self.num_segments,
            num_rows_run=self.num_rows_run,
            num_rows_pruned=self.num_rows_pruned,
            num_requests=len(self.requests),
        )
        return Send(HEAD, status)

    def _fail(self, request: int, text: str) -> list[Send]:
        return [Send(HEAD, Failed(stage=self.rank, request=request, text=text))]


@dataclass(slots=True)
class _Job:
    """One segment's forward on one stage."""

    stage: Stage
    state: StageRequest
    segment: Segment
    hidden: Tensor | None = None
    owned: dict[int, Tensor] = field(default_factory=dict)
    choices: list[int] = field(default_factory=list)
    error: str = ""

    def run(self) -> None:
        """Compute; everything that changes the request's state but the verdict happens here."""
        stage, state, segment = self.stage, self.state, self.segment
        try:
            positions, parents = self._enter_rows()
            if segment.hidden is None:
                x = torch.tensor(segment.tokens, dtype=torch.int64)
            else:
                x = segment.hidden
            self.hidden, owned = run_rows(
                stage.model,
                state.cache,
                x,
                positions,
                parents=parents,
                features=state.feature_layers,
            )
            self.owned = dict(owned)
            if not stage.is_last:
                # waits for an accelerator here, where its time is measured
                self.hidden = self.hidden.cpu()
        except CacheFull as error:
            self.error = str(error)
            return
        if stage.is_last:
            self._choose(positions)

    def _enter_rows(self) -> tuple[list[int], list[int] | None]:
        state, segment = self.state, self.segment
        first = state.tip_position + 1
        if not segment.prefix:
            parents = state.add_rows(segment)
            return state.positions[-len(segment.nodes) :], parents
        state.tip, state.tip_position = segment.nodes[-1], first + len(segment.nodes) - 1
        return list(range(first, first + len(segment.nodes))), None

    def _choose(self, positions: list[int]) -> None:
        """The target's token after each row; of a prompt only the last row matters."""
        assert self.hidden is not None
        hidden = self.hidden
        if self.segment.prefix:
            if not self.segment.verify:
                return
            hidden, positions = hidden[-1:], positions[-1:]
        logits = run_logits(self.stage.model, hidden, shape_stable=self.stage.shape_stable)
        sampling = self.state.opened.sampling
        self.choices = choose(logits, [position + 1 for position in positions], sampling)

    def finish(self, now: float, elapsed: float) -> Sequence[Send]:
        """What follows: rows on, features of prompt rows, and on the last stage the verdict."""
        stage, state, segment = self.stage, self.state, self.segment
        stage.busy_s += elapsed
        if self.error:
            stage.requests.pop(segment.request, None)
            return stage._fail(segment.request, self.error)
        stage.num_segments += 1
        stage.num_rows_run += len(segment.nodes)
        if elapsed * 1e3 > segment.slowest_ms:
            segment = replace(segment, slowest_rows=len(segment.nodes), slowest_ms=elapsed * 1e3)
        sends = self._keep_features()
        if state.verifier is not None and self.choices:
            if segment.prefix:
                state.verifier.begin(segment.nodes[-1], self.choices[-1])
            else:
                state.verifier.observe(segment.nodes, segment.parents, segment.tokens, self.choices)
        hidden = None if stage.is_last else self.hidden
        sends += stage._hand_on(replace(segment, hidden=hidden), state)
        if now >= stage._status_due:
            sends.append(stage._status(now))
        return sends

    def _keep_features(self) -> list[Send]:
        """Prompt rows are true: their features leave now; others wait for their verdict."""
        sends = []
        for layer in self.state.feature_layers:
            if self.segment.prefix:
                sends.append(
                    self.stage._features(
                        self.segment.request, layer, self.segment.nodes, self.owned[layer]
                    )
                )
            else:
                self.state.features[layer].extend(self.owned[layer])
        return sends
