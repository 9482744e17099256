"""The contract of stage backends: rows see their own paths, whatever their caches hold.

The rows of the table, and two more: the whole numbers of tests/support/integer_model.py, and one
that computes in a thread of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowspec.engine.engine import generate_all
from flowspec.engine.simulated import SimulatedEngine
from flowspec.model.backend import COMMITTED, CacheFull, RequestRows, StageBackend
from flowspec.protocol.messages import AddRequest, Failed, FreeRequest, Reset, Segment
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.backends import BACKENDS, StageSource, find_backend
from flowspec.stage.stage import Stage
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_stage_range
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support import families
from tests.support.clusters import check_empty, make_cluster
from tests.support.integer_model import integer_stages, next_token
from tests.support.remote_backend import RemoteBackend, RemoteError
from tests.support.scripted import drafter_named
from tests.support.tiny import PROMPT, T0, T1, VOCAB, expected, request, stage_models

Backend = StageBackend[Any]
TOLERANCE = 1e-4
TREE = ((3, COMMITTED), (8, COMMITTED), (5, 0), (9, 0), (2, 1), (7, 2), (1, 5))  # token, parent
SIZES = ((7,), (2, 1, 4), (1, 1, 1, 1, 1, 1, 1))  # segments that the tree may come in


@pytest.fixture(params=[*BACKENDS, "integers", "thread"])
def pieces(request: pytest.FixtureRequest) -> Iterator[Callable[[int], list[Backend]]]:
    """The tiny model in so many stages, each behind the backend of that name."""
    opened: list[RemoteBackend] = []

    def remote(count: int) -> list[Backend]:
        opened.extend(RemoteBackend(model) for model in stage_models(count))
        return list(opened[-count:])

    made: dict[str, Callable[[int], list[Backend]]] = {
        "torch": lambda count: list(stage_models(count)),
        "integers": lambda count: list(integer_stages(count)),
        "thread": remote,
    }
    assert made.keys() >= BACKENDS.keys(), "a backend without its contract"
    yield made[request.param]
    for backend in opened:
        assert backend.num_caches() == 0, "a cache was never freed"
        backend.end()


class Caches:
    """One request's caches on every stage, freed at the end."""

    def __init__(self, stages: Sequence[Backend], capacity: int = 64) -> None:
        self.stages = stages
        self.caches = [stage.new_cache(capacity) for stage in stages]
        self.depths: list[int] = []  # positions of the tree's rows

    def prefix(self, tokens: Sequence[int]) -> Tensor:
        """Commit these; logits [n, V]."""
        start = self.caches[0].prefix_length
        return self._run(tokens, range(start, start + len(tokens)), None)

    def tree(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """Run rows (token, parent) of the tree; logits [n, V]."""
        for _, parent in rows:
            base = self.caches[0].prefix_length - 1 if parent == COMMITTED else self.depths[parent]
            self.depths.append(base + 1)
        places = self.depths[-len(rows) :]
        return self._run([t for t, _ in rows], places, [parent for _, parent in rows])

    def reroot(self, path: Sequence[int], keep: Sequence[int]) -> None:
        """Commit a path on every stage."""
        for cache in self.caches:
            cache.reroot(path, keep)
        self.depths = [self.depths[row] for row in keep]

    def free(self) -> None:
        """Free the caches on every stage."""
        for cache in self.caches:
            cache.free()

    def _run(self, tokens: Sequence[int], places: Sequence[int], parents: Any) -> Tensor:
        return run_together(self.stages, [(self, tokens, places, parents)])


def run_together(
    stages: Sequence[Backend], parts: Sequence[tuple[Caches, Sequence[int], Sequence[int], Any]]
) -> Tensor:
    """Rows of several requests in one forward per stage; logits of all of them."""
    x = torch.tensor([token for _, tokens, _, _ in parts for token in tokens])
    for place, stage in enumerate(stages):
        rows = [RequestRows(own.caches[place], where, above) for own, _, where, above in parts]
        x, _ = stage.run(rows, x)
    return stages[-1].logits(x)


def alone(stages: Sequence[Backend], text: Sequence[int]) -> Tensor:
    """Logits [V] after a text that is run from nothing."""
    caches = Caches(stages)
    logits = caches.prefix(text)[-1]
    caches.free()
    return logits


def path_of(row: int) -> list[int]:
    """The tokens from the committed row down to row `row` of TREE."""
    token, parent = TREE[row]
    return [*([] if parent == COMMITTED else path_of(parent)), token]


def check(found: Tensor, wanted: Tensor) -> None:
    """The same but for the order of sums."""
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=TOLERANCE), float((found - wanted).abs().max())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_row_sees_its_own_path(pieces, num_stages: int, sizes: Sequence[int]) -> None:
    """Committed rows, ancestors and itself; siblings and other branches do not exist for it."""
    stages = pieces(num_stages)
    caches, first, found = Caches(stages), 0, []
    caches.prefix(PROMPT[:4])
    caches.prefix(PROMPT[4:])
    for size in sizes:
        found.append(caches.tree(TREE[first : first + size]))
        first += size
    assert caches.caches[0].extent == (len(PROMPT), len(TREE))
    for row, logits in enumerate(torch.cat(found)):
        check(logits, alone(stages, [*PROMPT, *path_of(row)]))
    caches.free()


def test_a_reroot_commits_the_path_and_keeps_a_subtree(pieces) -> None:
    """Rows that come later stand behind what is kept; the dead are forgotten."""
    stages = pieces(2)
    caches = Caches(stages)
    caches.prefix(PROMPT)
    caches.tree(TREE)
    caches.reroot([0], [2, 5, 6])
    assert caches.caches[1].extent == (len(PROMPT) + 1, 3)
    logits = caches.tree([(11, 2), (12, COMMITTED), (13, 0)])
    check(logits[0], alone(stages, [*PROMPT, *path_of(6), 11]))
    check(logits[1], alone(stages, [*PROMPT, 3, 12]))
    check(logits[2], alone(stages, [*PROMPT, 3, 5, 13]))
    caches.reroot([0, 1, 2, 3], [])
    logits = caches.tree([(4, COMMITTED)])
    check(logits[0], alone(stages, [*PROMPT, *path_of(6), 11, 4]))
    caches.free()


def test_requests_that_run_together_do_not_see_one_another(pieces) -> None:
    """A prompt beside a tree beside another tree."""
    stages = pieces(2)
    one, two, three = Caches(stages), Caches(stages), Caches(stages)
    one.prefix(PROMPT)
    two.prefix(PROMPT[::-1])
    n = len(PROMPT)
    tree = ([7, 8], [n, n + 1], [COMMITTED, 0])
    logits = run_together(stages, [(one, *tree), (three, [5, 6, 1], range(3), None), (two, *tree)])
    check(logits[1], alone(stages, [*PROMPT, 7, 8]))
    check(logits[4], alone(stages, [5, 6, 1]))
    check(logits[6], alone(stages, [*PROMPT[::-1], 7, 8]))
    for caches in (one, two, three):
        caches.free()


def test_another_cache_begins_with_committed_rows_of_this_one(pieces) -> None:
    """It grows by itself, and the first one stays as it is, also when that is freed first."""
    stages = pieces(2)
    first, other = Caches(stages), Caches(stages[:0])
    first.prefix(PROMPT)
    first.tree(TREE[:2])
    other.stages = stages
    other.caches = [cache.resized(32, prefix_length=5) for cache in first.caches]
    assert other.caches[0].extent == (5, 0)
    check(other.prefix([1, 2])[-1], alone(stages, [*PROMPT[:5], 1, 2]))
    check(first.tree([(5, 0)])[0], alone(stages, [*PROMPT, 3, 5]))
    first.free()
    check(other.tree([(9, COMMITTED)])[0], alone(stages, [*PROMPT[:5], 1, 2, 9]))
    other.free()


def test_what_a_failed_forward_added_can_be_cut_back(pieces) -> None:
    """The same rows are then run again, in the same places."""
    (stage,) = pieces(1)
    caches = Caches([stage])
    caches.prefix(PROMPT)
    caches.tree(TREE[:3])
    extent, depths = caches.caches[0].extent, list(caches.depths)
    caches.tree(TREE[3:])
    caches.caches[0].cut_back(extent)
    caches.depths = depths
    assert caches.caches[0].extent == extent
    check(caches.tree(TREE[3:])[-1], alone([stage], [*PROMPT, *path_of(6)]))
    caches.free()


def test_room_is_known_before_rows_run(pieces) -> None:
    """Committed rows and tree rows count alike; the error names both numbers."""
    (stage,) = pieces(1)
    caches = Caches([stage], capacity=6)
    caches.prefix(PROMPT[:4])
    caches.tree([(3, COMMITTED)])
    (cache,) = caches.caches
    cache.check_room(1)
    with pytest.raises(CacheFull, match="holds 6 rows, 7 are needed"):
        cache.check_room(2)
    cache.reroot([], [])
    cache.check_room(2)
    caches.free()


def test_layers_give_their_outputs_where_they_lie(pieces) -> None:
    """Each stage those that it has; the last one also what follows the norm."""
    stages = pieces(2)
    assert [stage.owned_hidden_states((1, 5, -1)) for stage in stages] == [(1,), (5, -1)]
    x = torch.tensor(PROMPT)
    for stage in stages:
        rows = RequestRows(stage.new_cache(16), range(len(PROMPT)), None)
        x, taps = stage.run([rows], x, aux_hidden_state_layers=(1, 5, -1))
        assert taps.keys() == set(stage.owned_hidden_states((1, 5, -1)))
        assert all(len(own) == len(PROMPT) for own in taps.values())
        rows.cache.free()
    assert torch.equal(taps[-1], x)


def answers(cluster: SimulatedEngine, sampling) -> list[list[int]]:
    """Two requests at once, and then the next turn of the first."""
    first, second = (request(n, prompt=PROMPT[n:], sampling=sampling) for n in (1, 2))
    done = generate_all(cluster, [first, second])
    said = (*first.prompt, *done[0].tokens, 7, 3)
    (last,) = generate_all(cluster, [request(3, prompt=said, sampling=sampling)])
    assert last.stats.num_prompt_reused > len(PROMPT)
    return [list(one.tokens) for one in (*done, last)]


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_says_what_torch_says(pieces, strategy: str, sampling) -> None:
    """Events come in any order; requests share the pipe, and a prefix is used again."""
    texts = []
    for parts in (pieces(3), integer_stages(3) if is_integers(pieces) else stage_models(3)):
        cluster = make_cluster(
            3,
            strategy,
            drafter=drafter_named("mixed"),
            charges=adversarial(len(strategy)),
            backends=parts,
            limits={"max_cached": 2},
        )
        texts.append(answers(cluster, sampling))
        for stage in cluster.stages:
            stage.handle(Reset(epoch=7), 0.0)  # the kept ones go, too
        check_empty(cluster)
    assert texts[0] == texts[1]
    if not is_integers(pieces):
        asked = request(1, prompt=PROMPT[1:], sampling=sampling)
        assert texts[0][0] == expected(asked)


def is_integers(pieces: Callable[[int], list[Backend]]) -> bool:
    """Whether the text is that of the integer model."""
    return isinstance(pieces(1)[0], type(integer_stages(1)[0]))


def test_the_integer_model_says_its_own_text() -> None:
    """So the matrix above compares with something that is known."""
    cluster = make_cluster(
        2, "streaming", drafter=drafter_named("mixed"), backends=integer_stages(2)
    )
    (done,) = generate_all(cluster, [request(1)])
    token, tokens = PROMPT[-1], []
    for position in range(len(PROMPT) - 1, len(PROMPT) + 13):
        token = next_token(token, position)
        tokens.append(token)
    assert list(done.tokens) == tokens
    assert max(tokens) < VOCAB


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
def test_a_joint_forward_that_fails_elsewhere_runs_again_apart(sampling) -> None:
    """Its rows are cut back over there, and each request runs them alone; the texts are right."""
    backends = [RemoteBackend(model) for model in stage_models(2)]
    joint: list[int] = []

    def fails(num_requests: int) -> bool:
        joint.append(num_requests)
        return num_requests > 1

    for backend in backends:
        backend.worker.fails = fails
    cluster = make_cluster(2, drafter=drafter_named("mixed"), backends=backends)
    asked = [request(n, prompt=PROMPT[n:], sampling=sampling) for n in (1, 2, 3)]
    for one, done in zip(asked, generate_all(cluster, asked), strict=True):
        assert list(done.tokens) == expected(one)
    assert sum(count > 1 for count in joint) > 5
    check_empty(cluster)
    for backend in backends:
        assert backend.num_caches() == 0
        backend.end()


def test_a_forward_that_fails_elsewhere_ends_its_request() -> None:
    """A failed request is freed in the backend too, and the stage serves on."""
    backend = RemoteBackend(stage_models(1)[0])
    stage = Stage(1, 1, backend)
    stage.handle(AddRequest(request=1, capacity=64, context=64), 0.0)
    stage.poll(0.0)
    rows = Segment(
        request=1,
        seq_no=0,
        nodes=tuple(range(len(PROMPT))),
        parents=tuple(range(-1, len(PROMPT) - 1)),
        tokens=PROMPT,
        prefix=True,
    )
    backend.worker.fails = lambda num_requests: True
    stage.handle(rows, 0.0)
    step = stage.poll(0.0)
    assert step is not None
    assert step.work is not None
    step.work.run()
    sends = [send.message for send in step.work.finish(0.5, 0.5)]
    (failed,) = [message for message in sends if isinstance(message, Failed)]
    assert "RemoteError: MemoryError: no memory for the next layer" in failed.text
    assert backend.num_caches() == 0, "the failed request's cache is still held"
    backend.worker.fails = lambda num_requests: False
    stage.handle(AddRequest(request=2, capacity=64, context=64), 0.0)
    stage.poll(0.0)
    assert backend.num_caches() == 1
    stage.handle(FreeRequest(request=2), 0.0)
    assert backend.num_caches() == 0
    with pytest.raises(RemoteError):
        backend._ask("run", [(99, [0], None)], torch.tensor([1]), set())
    backend.end()


def test_the_table_loads_a_backend_from_disk(tmp_path: Path) -> None:
    """The named backend over a range of layers; an unknown name is refused with the known ones."""
    families.save(tmp_path / "hf")
    plan = plan_split(open_checkpoint(tmp_path / "hf"), layers=(3, 1))
    run_split(plan, tmp_path / "split", model_id="tiny")
    source = StageSource(folder=tmp_path / "split", first_layer=0, last_layer=4)
    wanted = load_stage_range(tmp_path / "split", 0, 4)
    for name in BACKENDS:
        backend = find_backend(name).load(source)
        check(alone([backend], PROMPT), alone([wanted], PROMPT))
    with pytest.raises(ValueError, match="unknown stage backend 'abacus'; known: torch"):
        find_backend("abacus")
