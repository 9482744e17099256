"""The draft model proposes what the model alone says after the same text, computed anew."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.model.attention_metadata import run_rows
from flowspec.request import NO_NODE, Request, SamplingParams
from flowspec.speculation.acceptance.gumbel_coupled import draft_scores
from flowspec.speculation.drafters import DraftSource, find_drafter
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal
from flowspec.speculation.drafters.draft_model import (
    DraftModelDrafter,
    DraftModelSession,
    check_vocabulary,
)
from flowspec.speculation.tree import DraftTree, Node
from flowspec.weights.load import HeadPart, load_whole
from tests.support.checkpoints import save_checkpoint
from tests.support.tiny import PROMPT, T0, T1, VOCAB
from tests.support.tiny_drafters import draft_model

TOLERANCE = 1e-4


def scores_after(
    drafter: DraftModelDrafter, text: Sequence[int], sampling: SamplingParams
) -> list[float]:
    """log-probabilities [V] of the token after `text`, without a tree or an old cache."""
    model = drafter.model
    ids = torch.tensor(text).clamp(max=model.config.vocab_size - 1)
    hidden, _ = run_rows(model, model.new_cache(len(text)), ids, range(len(text)), parents=None)
    logits = model.logits(hidden[-1:])[:, :VOCAB]
    return draft_scores(logits, [len(text)], sampling, coupled=True)[0].tolist()


class Play:
    """A generation; every proposal is compared, and the rows that were computed are counted."""

    def __init__(
        self,
        prompt: Sequence[int] = PROMPT,
        *,
        drafter: DraftModelDrafter | None = None,
        sampling: SamplingParams = T0,
    ) -> None:
        self.drafter = drafter or draft_model()
        asked = Request(id=1, prompt=tuple(prompt), sampling=sampling, max_new_tokens=60)
        self.session: DraftModelSession = self.drafter.open(
            Opening(request=asked, draft_topk=VOCAB, coupled=True)
        )
        self.sampling = sampling
        self.tree = DraftTree()
        self.tokens = list(prompt)
        self.session.accept(prompt)

    def plant(self, token: int) -> None:
        """The prompt's verdict."""
        self.tree.plant(NO_NODE, token, len(self.tokens))
        self.tokens.append(token)
        self.session.accept([token])

    def verdict(self, parent: Node, token: int) -> None:
        """Append a true token."""
        path, _ = self.tree.reroot(parent.id, token)
        new = [*(node.token for node in path[1:]), token]
        self.tokens += new
        self.session.accept(new)

    def run(self, nodes: Sequence[Node] | None) -> tuple[list[Proposal], int]:
        """One job: its proposals, and how many rows of the model it took."""
        job = DraftJob(self.session, self.tree, nodes or (), prefills=nodes is None)
        with torch.inference_mode():
            share = self.session.begin(job)
            (output,) = self.drafter.run([share])
            proposals = self.session.finish(job, share, *output)
        for proposal in proposals:
            self.check(proposal)
        return proposals, len(share.tokens)

    def check(self, proposal: Proposal) -> None:
        """Against the model run over the whole text."""
        path = [node.token for node in self.tree.path(proposal.node)[1:]]
        text = [*self.tokens, *path]
        if len(text) > self.drafter.max_positions:
            assert proposal.children == ()
            return
        want = scores_after(self.drafter, text, self.sampling)
        got = dict(proposal.children)
        assert got.keys() == {t for t, value in enumerate(want) if value > float("-inf")}
        for token, value in got.items():
            assert value == pytest.approx(want[token], abs=TOLERANCE)

    def grow(self, parent: Node, tokens: Sequence[int]) -> list[Node]:
        """Children by the test's choice."""
        return [self.tree.add(parent.id, token, -1.0) for token in tokens]


def begun(**options: object) -> Play:
    """The root's children are known."""
    play = Play(**options)  # type: ignore[arg-type]
    play.plant(4)
    (proposal,), num_rows = play.run(None)
    assert proposal.node == play.tree.root.id
    assert num_rows == len(play.tokens)
    return play


@given(st.integers(0, 10**6), st.sampled_from([T0, T1]))
@settings(max_examples=15)
def test_a_generation_equals_computing_anew(seed: int, sampling: SamplingParams) -> None:
    """Growing, drafting again, verdicts that hit and miss, rounds that drop the tree."""
    random = Random(seed)
    play = begun(sampling=sampling)
    play.grow(play.tree.root, [0, 1])
    drafted = {play.tree.root.id}
    for _ in range(20):
        nodes = list(play.tree.nodes.values())
        kind = random.choice(["grow", "grow", "grow", "verdict", "drop", "prefill"])
        if kind == "verdict" and len(play.tokens) < len(PROMPT) + 50:
            play.verdict(random.choice(nodes), random.randrange(3))
        elif kind == "drop" and play.tree.root.id in drafted:
            play.tree.drop_descendants()
            play.grow(play.tree.root, [0, 1])
        elif kind == "prefill" and play.session.num_rows_ready:
            for proposal in play.run(None)[0]:
                drafted.add(proposal.node)
                play.grow(play.tree.root, random.sample(range(3), 2))
        else:
            ready = [n for n in nodes if n is not play.tree.root and n.parent in drafted]
            picked = random.sample(ready, min(len(ready), 3))
            if not picked:
                continue
            for proposal in play.run(picked)[0]:
                drafted.add(proposal.node)
                play.grow(play.tree[proposal.node], random.sample(range(3), 2))


def test_rows_of_right_guesses_are_not_computed_again() -> None:
    """A hit whose root was drafted costs no row; one beyond the drafted path costs the rest."""
    play = begun()
    one, two = play.grow(play.tree.root, [1, 2])
    play.run([one, two])
    (three,) = play.grow(one, [3])
    play.run([three])
    play.verdict(play.tree.root, 1)
    assert play.session.num_rows_ready == 1
    (proposal,), num_rows = play.run(None)
    assert proposal.node == one.id
    assert num_rows == 0
    (five,) = play.grow(three, [5])
    play.verdict(five, 6)  # 3 has a row, 5 and 6 have none
    _, num_rows = play.run(None)
    assert num_rows == 2
    assert play.session.cache.prefix_length == len(play.tokens)
    assert play.session.cache.num_tree_rows == 0


def test_a_node_drafted_before_keeps_its_children() -> None:
    """Drafting again, as `flowspec` does after each verdict, costs nothing: no row changed."""
    play = begun()
    nodes = play.grow(play.tree.root, [1, 2, 3])
    first, _ = play.run(nodes[:2])
    again, num_rows = play.run(nodes)
    assert again[:2] == first
    assert num_rows == 1


def test_a_token_guessed_again_under_another_id_is_a_node_of_its_own() -> None:
    """A round dropped the drafted node; its successor comes true before it is drafted."""
    play = begun()
    play.run(play.grow(play.tree.root, [1]))
    play.tree.drop_descendants()
    (one,) = play.grow(play.tree.root, [1])
    play.verdict(play.tree.root, 1)
    (proposal,), _ = play.run(None)
    assert proposal.node == one.id


def test_it_stops_at_the_end_of_its_own_context() -> None:
    """No row beyond the last position; the strategies learn that there is nothing to draft."""
    drafter = draft_model(max_positions=len(PROMPT) + 4)
    play = begun(drafter=drafter)
    node = play.tree.root
    rows = []
    for token in range(5):
        (node,) = play.grow(node, [token])
        rows.append(play.run([node])[1])
    assert rows == [1, 1, 1, 0, 0]
    for _ in range(6):
        play.verdict(play.tree.root, 9)
        (proposal,), _ = play.run(None)
        assert proposal.node == play.tree.root.id
        assert play.session.num_rows_ready == 0
    assert play.session.cache.prefix_length <= drafter.max_positions
    long = Play([7] * 40, drafter=drafter)
    long.plant(3)
    assert long.run(None) == ([Proposal(long.tree.root.id, ())], 0)


@pytest.mark.parametrize("vocab_size", [VOCAB - 3, VOCAB, VOCAB + 16])
def test_padding_of_either_vocabulary_is_no_token(vocab_size: int) -> None:
    """More embeddings than the target has tokens, or fewer: only shared ones are proposed."""
    drafter = draft_model(vocab_size=vocab_size)
    asked = Request(id=1, prompt=(*PROMPT, VOCAB - 1), sampling=T1, max_new_tokens=4)
    session = drafter.open(Opening(request=asked, draft_topk=1000, coupled=True))
    tree = DraftTree()
    tree.plant(NO_NODE, VOCAB - 1, len(asked.prompt))
    session.accept([*asked.prompt, VOCAB - 1])
    proposal = session.prefill(tree)
    assert proposal is not None
    shared = min(vocab_size, VOCAB)
    assert sorted(token for token, _ in proposal.children) == list(range(shared))


def test_vocabularies_are_compared_token_by_token() -> None:
    """Named with both ids; a padded embedding is fine, one too small is not."""
    config = draft_model(vocab_size=VOCAB).model.config
    words = {f"w{i}": i for i in range(VOCAB)}
    check_vocabulary(words, words, config)
    check_vocabulary({"a": 0}, {"a": 0}, config)
    other = {**words, "w3": 4, "w4": 3, "new": 47}
    del other["w9"], other["w47"]
    with pytest.raises(
        ValueError, match=r"5 tokens differ, first 'w3' \(3, 4\), 'w4' \(4, 3\), 'w9'"
    ):
        check_vocabulary(words, other, config)
    with pytest.raises(ValueError, match="48 tokens, its tokenizer has 49"):
        check_vocabulary({**words, "x": 48}, {**words, "x": 48}, config)


def test_a_folder_becomes_a_drafter(tmp_path: Path) -> None:
    """The target as its own draft model: loaded by the table, refused with another tokenizer."""
    folder = save_checkpoint(tmp_path) / "target"
    whole = load_whole(folder)
    assert whole.lm_head is not None
    part = HeadPart(
        embed_tokens=whole.model.embed_tokens.weight,
        lm_head=whole.lm_head.weight,
        config=whole.config,
    )
    source = DraftSource(
        folder=folder, target=part, target_folder=folder, device="cpu", dtype="float32"
    )
    drafter = find_drafter("draft_model").load(source)
    assert isinstance(drafter, DraftModelDrafter)
    assert drafter.vocab_size == whole.config.vocab_size
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][1]["content"] = "</t>"
    tokenizer["model"]["vocab"]["</t>"] = tokenizer["model"]["vocab"].pop("</s>")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="2 tokens differ"):
        find_drafter("draft_model").load(replace(source, folder=other))
    with pytest.raises(ValueError, match="found: EAGLE-1/2 head.*use --drafter eagle"):
        find_drafter("draft_model").load(replace(source, folder=tmp_path / "eagle"))
