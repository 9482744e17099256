"""DraftTree: the draft tree of one request, rooted at the newest known token.

Nodes are never renumbered or reused. `score` is the drafter's log-probability that a node is on the
true path given the root. A child never scores above its parent and is always younger, so ordering
by (-score, id) puts ancestors first, ties included.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from flowspec.request import NO_NODE, NodeId


@dataclass(slots=True, eq=False)
class Node:
    """One drafted token, or the known token at the root. `position` is absolute in the text."""

    id: NodeId
    parent: NodeId
    token: int
    position: int
    logprob: float  # of this token given its parent, never above 0
    score: float  # sum of logprobs from the root's child down to here
    sent: bool = False
    expanded: bool = False  # the drafter has proposed its children
    expandable: bool = True  # it has proposed this node, not only a merged branch
    children: dict[int, NodeId] = field(default_factory=dict)  # by token, in the order of proposal
    # The distribution of the children, as (token, probability); empty: they were not drawn.
    drawn_from: tuple[tuple[int, float], ...] = ()


def by_score(node: Node) -> tuple[float, int]:
    """Return a sort key, best last: ancestors beat descendants, elder beats younger on ties."""
    return node.score, -node.id


_SCORE = attrgetter("score")


class DraftTree:
    """Alive nodes by id, in order of age; nodes outside the root's subtree are forgotten.

    The ranking of all nodes is kept between questions, because a tree of a thousand nodes is asked
    several times per segment and changes little in between.
    """

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        self._next_id = 0
        self._root = NO_NODE
        self.num_sent = 0  # alive nodes that were sent
        self._ranked: list[Node] | None = None  # None: scores or nodes have changed since
        self._unranked: list[Node] = []  # added since, so younger than all ranked ones

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node: NodeId) -> bool:
        return node in self.nodes

    def __getitem__(self, node: NodeId) -> Node:
        return self.nodes[node]

    @property
    def root(self) -> Node:
        """The newest known token: accepted by the target, with an unknown successor."""
        return self.nodes[self._root]

    def new_id(self) -> NodeId:
        """Return an id that was never used in this request."""
        self._next_id += 1
        return NodeId(self._next_id - 1)

    def plant(self, parent: NodeId, token: int, position: int) -> Node:
        """Begin with a known token behind the prompt's last node `parent`."""
        assert not self.nodes, "the tree already has a root"
        node = Node(self.new_id(), parent, token, position, logprob=0.0, score=0.0)
        self.nodes[node.id] = node
        self._root = node.id
        self._ranked = None
        return node

    def add(self, parent: NodeId, token: int, logprob: float) -> Node:
        """Add the child of `parent` with `token`; an existing one is rescored instead."""
        return self.extend(self.nodes[parent], [(token, logprob)])[0]

    def extend(
        self,
        above: Node,
        children: Iterable[tuple[int, float]],
        *,
        floor: float = float("-inf"),
        expandable: bool | None = None,
    ) -> list[Node]:
        """Add children (token, logprob) of a living node: new ones that score `floor` or more.

        Existing ones are rescored instead of doubled. Returns both, marked `expandable` if that is
        given.
        """
        found = []
        known, score, position = above.children, above.score, above.position + 1
        for token, logprob in children:
            if logprob > 0.0:
                logprob = 0.0
            if token in known:
                node = self.nodes[known[token]]
                self.rescore(node, logprob)
            elif score + logprob < floor:
                continue
            else:
                new = NodeId(self._next_id)
                self._next_id += 1
                node = Node(new, above.id, token, position, logprob, score + logprob)
                self.nodes[new] = node
                known[token] = new
                self._unranked.append(node)
            if expandable is not None:
                node.expandable = expandable
            found.append(node)
        return found

    def child(self, parent: NodeId, token: int) -> Node | None:
        """Return the child of a living node with `token`, or None."""
        child = self.nodes[parent].children.get(token)
        return None if child is None else self.nodes[child]

    def send(self, nodes: Iterable[Node]) -> None:
        """Mark nodes as sent."""
        for node in nodes:
            self.num_sent += not node.sent
            node.sent = True

    def rescore(self, node: Node, logprob: float) -> None:
        """Give `node` another logprob and carry the change down its subtree."""
        logprob = min(logprob, 0.0)
        if logprob == node.logprob:
            return
        node.logprob = logprob
        self._ranked = None
        for below in self.subtree(node):
            below.score = self.nodes[below.parent].score + below.logprob

    def subtree(self, node: Node) -> Iterator[Node]:
        """Yield `node` and its descendants, parents first."""
        stack = [node]
        while stack:
            top = stack.pop()
            yield top
            stack.extend(self.nodes[child] for child in top.children.values())

    def path(self, node: NodeId) -> list[Node]:
        """Return the nodes from the root to `node`, both included; `node` must be alive."""
        path = [self.nodes[node]]
        while path[-1].id != self._root:
            path.append(self.nodes[path[-1].parent])
        path.reverse()
        return path

    def reroot(self, parent: NodeId, token: int) -> tuple[list[Node], bool]:
        """Commit the path down to `parent`, which `token` follows, and forget all other nodes.

        Returns the path (old root to parent) and whether the new root was in the tree.
        """
        path = self.path(parent)
        child = path[-1].children.get(token)
        if child is None:
            root = Node(self.new_id(), parent, token, path[-1].position + 1, 0.0, 0.0)
            self.nodes = {root.id: root}
        else:
            root = self.nodes[child]
            base, root.logprob, root.score = root.score, 0.0, 0.0
            alive = {root.id: root}
            for node in self.nodes.values():  # parents are elder, so they come first
                if node.parent in alive:
                    alive[node.id] = node
                    node.score -= base
            self.nodes = alive
        root.expandable = True
        self._root = root.id
        self.num_sent = sum(node.sent for node in self.nodes.values())
        self._ranked = None
        return path, child is not None

    def remove(self, node: Node) -> None:
        """Forget an unsent node and its (unsent) descendants."""
        assert node.id != self._root, "the root is known to be true"
        for below in list(self.subtree(node)):
            assert not below.sent, f"node {below.id} is in flight"
            del self.nodes[below.id]
        del self.nodes[node.parent].children[node.token]
        self._ranked = None

    def keep_best(self, count: int) -> None:
        """Forget unsent nodes outside the `count` best below the root (ancestor-closed)."""
        ranked = self.ranked()
        kept = ranked[: count + 1]  # the root is the first
        for node in ranked[count + 1 :]:
            if node.sent:
                kept.append(node)
                continue
            # Nodes below are unsent and worse, so they are removed too.
            del self.nodes[node.id]
            if (above := self.nodes.get(node.parent)) is not None:
                del above.children[node.token]
        self._ranked = kept

    def drop_descendants(self) -> None:
        """Forget everything below the root, in-flight nodes included; it will be drafted anew."""
        root = self.root
        root.children.clear()
        root.drawn_from = ()
        root.expanded = False
        self.nodes = {root.id: root}
        self.num_sent = int(root.sent)
        self._ranked = None

    def ranked(self) -> list[Node]:
        """Return all nodes, best first, the elder first among equals; do not change the list."""
        if self._ranked is None:
            self._ranked = sorted(self.nodes.values(), key=_SCORE, reverse=True)
            self._unranked.clear()
        elif self._unranked:
            self._ranked = self._ranked + self._unranked
            self._ranked.sort(key=_SCORE, reverse=True)  # stable, and fast on sorted input
            self._unranked.clear()
        return self._ranked

    def level(self, position: int, count: int) -> list[Node]:
        """Return the `count` best expandable nodes at an absolute position, best first."""
        at = (n for n in self.ranked() if n.position == position and n.expandable)
        return list(islice(at, count))

    def unsent(self) -> Iterable[Node]:
        """Return the nodes that were not sent yet, in no order."""
        return (node for node in self.nodes.values() if not node.sent)

    def best_unsent(self, count: int) -> list[Node]:
        """Return the `count` best unsent nodes, best first: parents come before children."""
        return list(islice((node for node in self.ranked() if not node.sent), count))

    def best_unexpanded(self, count: int) -> list[Node]:
        """Return the `count` best unexpanded nodes below the root that can be expanded."""
        open_nodes = (
            n for n in self.ranked() if not n.expanded and n.expandable and n.id != self._root
        )
        return list(islice(open_nodes, count))
