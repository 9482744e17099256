"""DraftTree against the plainest model of it: a dictionary from token paths to scores."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.request import NodeId
from flowspec.speculation.tree import DraftTree, Node

Path = tuple[int, ...]
# Sums of these are exact in binary, so equal scores are equal and ties are real ties.
LOGPROBS = st.sampled_from([0.0, 0.0, -0.5, -0.5, -1.0, -2.0, -4.0])
TOKENS = st.integers(0, 3)
PICK = st.integers(0, 1000)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PICK, TOKENS, LOGPROBS),
        st.tuples(st.just("add"), PICK, TOKENS, LOGPROBS),
        st.tuples(st.just("add"), PICK, TOKENS, LOGPROBS),
        st.tuples(st.just("rescore"), PICK, TOKENS, LOGPROBS),
        st.tuples(st.just("send"), st.integers(0, 4), TOKENS, LOGPROBS),
        st.tuples(st.just("remove"), PICK, TOKENS, LOGPROBS),
        st.tuples(st.just("keep_best"), st.integers(0, 12), TOKENS, LOGPROBS),
        st.tuples(st.just("reroot"), PICK, TOKENS, LOGPROBS),
        st.tuples(st.just("drop"), st.just(0), TOKENS, LOGPROBS),
    ),
    min_size=5,
    max_size=40,
)


@dataclass
class Guess:
    """The model's record of one node."""

    id: int
    logprob: float
    sent: bool = False


@dataclass
class Model:
    """Paths of tokens below the root; () is the root."""

    position: int
    guesses: dict[Path, Guess] = field(default_factory=dict)

    def score(self, path: Path) -> float:
        """Summed anew each time."""
        return sum(self.guesses[path[: n + 1]].logprob for n in range(len(path)))

    def ranked(self, paths: list[Path]) -> list[Path]:
        """Best first; the elder first among equals."""
        return sorted(paths, key=lambda path: (-self.score(path), self.guesses[path].id))

    def forget(self, path: Path) -> None:
        """`path` and what is below it."""
        self.guesses = {p: g for p, g in self.guesses.items() if p[: len(path)] != path}


class Pair:
    """A tree and its model, changed together."""

    def __init__(self) -> None:
        self.tree = DraftTree()
        root = self.tree.plant(NodeId(-7), 9, 100)
        self.model = Model(100, {(): Guess(root.id, 0.0)})
        self.newest = root.id

    def pick(self, number: int) -> Path:
        """Some path of the model."""
        paths = sorted(self.model.guesses)
        return paths[number % len(paths)]

    def fresh(self, node: Node) -> int:
        """A new node's id, which must be above all before it."""
        assert node.id > self.newest, "an id was used again"
        self.newest = node.id
        return node.id

    def run(self, name: str, number: int, token: int, logprob: float) -> None:
        """One operation on both."""
        getattr(self, name)(number, token, logprob)

    def add(self, number: int, token: int, logprob: float) -> None:
        parent = self.pick(number)
        node = self.tree.add(NodeId(self.model.guesses[parent].id), token, logprob)
        path = (*parent, token)
        if path in self.model.guesses:
            assert node.id == self.model.guesses[path].id, "an existing child was doubled"
            self.model.guesses[path].logprob = logprob
        else:
            self.model.guesses[path] = Guess(self.fresh(node), logprob)

    def rescore(self, number: int, token: int, logprob: float) -> None:
        if path := self.pick(number):
            guess = self.model.guesses[path]
            self.tree.rescore(self.tree[NodeId(guess.id)], logprob)
            guess.logprob = logprob

    def send(self, number: int, token: int, logprob: float) -> None:
        self.tree.send(self.tree.best_unsent(number))
        unsent = [path for path, guess in self.model.guesses.items() if not guess.sent]
        for path in self.model.ranked(unsent)[:number]:
            self.model.guesses[path].sent = True

    def remove(self, number: int, token: int, logprob: float) -> None:
        path = self.pick(number)
        if path and not self.model.guesses[path].sent:
            self.tree.remove(self.tree[NodeId(self.model.guesses[path].id)])
            self.model.forget(path)

    def keep_best(self, number: int, token: int, logprob: float) -> None:
        self.tree.keep_best(number)
        below = [path for path in self.model.guesses if path]
        for path in self.model.ranked(below)[number:]:
            if path in self.model.guesses and not self.model.guesses[path].sent:
                self.model.forget(path)

    def drop(self, number: int, token: int, logprob: float) -> None:
        self.tree.drop_descendants()
        self.model.guesses = {(): self.model.guesses[()]}

    def reroot(self, number: int, token: int, logprob: float) -> None:
        parent = self.pick(number)
        model = self.model
        line = [model.guesses[parent[:n]].id for n in range(len(parent) + 1)]
        path, hit = self.tree.reroot(NodeId(model.guesses[parent].id), token)
        assert [node.id for node in path] == line, "the committed path, old root to parent"
        base = (*parent, token)
        assert hit == (base in model.guesses)
        alive = {p[len(base) :]: g for p, g in model.guesses.items() if p[: len(base)] == base}
        if not hit:
            alive = {(): Guess(self.fresh(self.tree.root), 0.0)}
        alive[()].logprob = 0.0
        self.model = Model(model.position + len(base), alive)

    def check(self) -> None:
        """The tree is what the model says."""
        tree, model = self.tree, self.model
        assert len(tree) == len(model.guesses)
        assert tree.num_sent == sum(guess.sent for guess in model.guesses.values())
        assert tree.root.id == model.guesses[()].id
        for path, guess in model.guesses.items():
            node = tree[NodeId(guess.id)]
            assert node.id in tree
            assert node.sent == guess.sent
            assert (node.logprob, node.score) == (guess.logprob, model.score(path))
            assert node.position == model.position + len(path)
            assert [n.token for n in tree.path(node.id)[1:]] == list(path)
            children = {p[-1]: g.id for p, g in model.guesses.items() if p and p[:-1] == path}
            assert node.children == children
            below = [n.id for n in tree.subtree(node)]
            expected = [g.id for p, g in model.guesses.items() if p[: len(path)] == path]
            assert sorted(below) == sorted(expected)
            assert all(n == node.id or below.index(tree[n].parent) < below.index(n) for n in below)
        self.check_orders()

    def check_orders(self) -> None:
        """Every ranking of nodes, ties included."""
        tree, model = self.tree, self.model
        unsent = [path for path, guess in model.guesses.items() if not guess.sent]
        ranked = [model.guesses[path].id for path in model.ranked(unsent)]
        assert sorted(node.id for node in tree.unsent()) == sorted(ranked)
        for count in (0, 1, 3, len(ranked), len(ranked) + 5):
            assert [node.id for node in tree.best_unsent(count)] == ranked[:count]
        seen: set[int] = set()
        for node in tree.best_unsent(len(tree)):
            if node is not tree.root and not tree[node.parent].sent:
                assert node.parent in seen, "a child before its parent"
            seen.add(node.id)
        for depth in range(4):
            at = model.ranked([path for path in model.guesses if len(path) == depth])
            ids = [model.guesses[path].id for path in at]
            level = tree.level(model.position + depth, 3)
            assert [node.id for node in level] == ids[:3]
        leaves = model.ranked([path for path in model.guesses if path])
        assert [n.id for n in tree.best_unexpanded(4)] == [model.guesses[p].id for p in leaves][:4]


@given(OPERATIONS)
@settings(max_examples=200)
def test_tree_is_a_set_of_paths(operations: list[tuple[str, int, int, float]]) -> None:
    """Any sequence of operations gives what plain paths give; ids only ever grow."""
    pair = Pair()
    for operation in operations:
        pair.run(*operation)
        pair.check()


@given(
    st.lists(st.tuples(PICK, TOKENS, st.floats(-30, 0)), max_size=40),
    st.lists(st.tuples(PICK, st.floats(-30, 0)), max_size=10),
    st.lists(st.tuples(PICK, TOKENS), max_size=4),
)
def test_ancestors_never_rank_below_descendants(
    adds: list[tuple[int, int, float]],
    rescores: list[tuple[int, float]],
    verdicts: list[tuple[int, int]],
) -> None:
    """Rounding included: a segment cut anywhere from the ranking holds parents before children."""
    tree = DraftTree()
    tree.plant(NodeId(-1), 0, 5)

    def pick(number: int) -> Node:
        return list(tree.nodes.values())[number % len(tree)]

    for number, token, logprob in adds:
        tree.add(pick(number).id, token, logprob)
    for number, logprob in rescores:
        if (node := pick(number)) is not tree.root:
            tree.rescore(node, logprob)
            assert node.logprob == logprob, "the new value exactly, not up to rounding"
    for number, token in verdicts:
        tree.reroot(pick(number).id, token)
        ranked = [node.id for node in tree.best_unsent(len(tree))]
        for node in tree.nodes.values():
            if node is not tree.root:
                assert ranked.index(node.parent) < ranked.index(node.id)
                above = tree[node.parent]
                assert node.score <= above.score
                assert node.score == pytest.approx(above.score + node.logprob, abs=1e-9)


def test_positive_logprobs_are_cut() -> None:
    """log softmax may round to slightly above 0; a child must not rank above its parent for it."""
    tree = DraftTree()
    root = tree.plant(NodeId(-1), 0, 5)
    child = tree.add(root.id, 1, 1e-7)
    assert (child.logprob, child.score) == (0.0, 0.0)
    tree.rescore(child, 1e-7)
    assert child.score == 0.0
    assert tree.best_unsent(1) == [root]


def test_rescoring_from_and_to_impossible() -> None:
    """A token the filters forbid may become possible later; no NaN may come of it."""
    tree = DraftTree()
    root = tree.plant(NodeId(-1), 0, 5)
    child = tree.add(root.id, 1, float("-inf"))
    below = tree.add(child.id, 2, -1.0)
    tree.rescore(child, -0.5)
    assert (child.score, below.score) == (-0.5, -1.5)
    tree.rescore(child, float("-inf"))
    assert below.score == float("-inf")


def test_what_is_known_or_in_flight_is_not_removed() -> None:
    """Forgetting a node the stages hold would leave verdicts without a node to name."""
    tree = DraftTree()
    root = tree.plant(NodeId(-1), 0, 5)
    child = tree.add(root.id, 1, -1.0)
    tree.send([child])
    with pytest.raises(AssertionError, match="in flight"):
        tree.remove(child)
    with pytest.raises(AssertionError, match="root"):
        tree.remove(root)
    with pytest.raises(AssertionError, match="already"):
        tree.plant(NodeId(-1), 0, 5)


def test_expanded_nodes_are_not_proposed_again() -> None:
    """The drafter is asked for each node once; the root's children come with its hidden states."""
    tree = DraftTree()
    root = tree.plant(NodeId(-1), 0, 5)
    first, second = tree.add(root.id, 1, -1.0), tree.add(root.id, 2, -2.0)
    assert tree.best_unexpanded(5) == [first, second]
    first.expanded = True
    assert tree.best_unexpanded(5) == [second]
    root.expanded = True
    tree.drop_descendants()
    assert not tree.root.expanded
