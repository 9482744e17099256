"""StageRequestState: a request's cache on a stage, and the node of each of its rows."""

from dataclasses import dataclass, field

from torch import Tensor

from flowspec.model.backend import COMMITTED, StageCache
from flowspec.protocol.messages import AddRequest, Reroot, Segment
from flowspec.request import NO_NODE, NodeId
from flowspec.stage.sampler import Sampler
from flowspec.stage.verifier import Verifier


@dataclass(slots=True)
class StageRequestState:
    """One request on one stage. The lists are parallel to the cache's tree rows."""

    opened: AddRequest
    cache: StageCache
    aux_hidden_state_layers: tuple[int, ...]
    verifier: Verifier | None  # on the last stage, like the sampler
    sampler: Sampler | None = None
    tip: NodeId = NO_NODE  # the newest committed node
    tip_position: int = -1
    next_token: int | None = None  # the verdict after `tip`, once known
    verdict_position: int = -1
    nodes: list[NodeId] = field(default_factory=list)
    parents: list[NodeId] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: dict[NodeId, int] = field(default_factory=dict)
    hidden_states: dict[int, list[Tensor]] = field(default_factory=dict)

    def is_alive(self, parent: NodeId, token: int) -> bool:
        """Return whether a row under `parent` may still be true, as far as this stage knows."""
        if parent == self.tip:
            return self.next_token is None or token == self.next_token
        return parent in self.rows

    def admit(self, segment: Segment) -> list[int]:
        """Return the indices of the rows that are alive; a row's parent may be in the segment."""
        admitted: set[NodeId] = set()
        alive = []
        rows = zip(segment.nodes, segment.parents, segment.tokens, strict=True)
        for index, (node, parent, token) in enumerate(rows):
            if parent in admitted or self.is_alive(parent, token):
                admitted.add(node)
                alive.append(index)
        return alive

    def enter(self, segment: Segment) -> tuple[list[int], list[int] | None]:
        """Add a segment's rows; return their positions and their parents' rows (None: prefix)."""
        if not segment.prefix:
            parents = self.add_rows(segment)
            if self.sampler is not None:
                self.sampler.enter(segment)
            return self.positions[-len(segment.nodes) :], parents
        first, n = self.tip_position + 1, len(segment.nodes)
        self.tip, self.tip_position = segment.nodes[-1], first + n - 1
        if self.sampler is not None:
            self.sampler.extend(segment.tokens, is_end=segment.verify)
        return list(range(first, first + n)), None

    def add_rows(self, segment: Segment) -> list[int]:
        """Add tree rows; return the cache row of each one's parent."""
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
        """Commit the path to the verdict's parent and forget dead rows; return the path's rows."""
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
        if self.sampler is not None:
            committed = [self.tokens[row] for row in path]
            self.sampler.reroot(committed, verdict.parent, [self.nodes[row] for row in keep])
        self.nodes = [self.nodes[row] for row in keep]
        self.parents = [self.parents[row] for row in keep]
        self.tokens = [self.tokens[row] for row in keep]
        self.positions = [self.positions[row] for row in keep]
        self.rows = {node: row for row, node in enumerate(self.nodes)}
        return path
