"""The executor runs a stage's layers over the rows of one or several requests."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowspec.model.backend import RequestRows, StageBackend, StageCache
from flowspec.protocol.messages import Segment
from flowspec.request import check_token_ids
from flowspec.runtime.failures import attempt
from flowspec.stage.stage_request_state import StageRequestState


@dataclass(slots=True)
class Part:
    """One request's segment as it came; `state` is None if the request is over."""

    state: StageRequestState | None
    segment: Segment


@dataclass(slots=True)
class Share:
    """The rows of one request in a forward, and their results."""

    segment: Segment
    state: StageRequestState
    rows: RequestRows[StageCache]
    inputs: Tensor  # tokens [n] or hidden states [n, H]
    hidden: Tensor | None = None  # [n, H] for the next stage
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)  # [n, H] by layer
    choices: list[int] = field(default_factory=list)  # the target's tokens after the asked rows

    @property
    def num_asked(self) -> int:
        """Number of rows, counted from the end, whose next token is chosen."""
        if self.segment.prefix:
            return 1 if self.segment.verify else 0
        return len(self.segment.nodes)


class Forward:
    """One forward: rows in, hidden states out, and with `choose` the target's token after each row.

    A request whose rows cannot be computed is left out; its exception is in `errors`.
    """

    def __init__(
        self,
        model: StageBackend[Any],
        parts: Sequence[Part],
        *,
        choose: bool,
        batch_invariant: bool,
    ) -> None:
        self.model = model
        self.parts = parts
        self.num_rows = sum(len(part.segment.nodes) for part in parts)
        self.shares: list[Share] = []
        self.errors: dict[int, Exception] = {}  # by request
        self._choose = choose
        self._batch_invariant = batch_invariant

    def run(self) -> None:
        """Compute. All changes of a request's state happen here, except those by a verdict."""
        for part in self.parts:
            if part.state is None or not part.segment.nodes:
                continue
            share = attempt(partial(self._enter, part.state, part.segment))
            if isinstance(share, Exception):
                self.errors[part.segment.request] = share
            else:
                self.shares.append(share)
        if not self.shares:
            return
        before = [share.state.cache.extent for share in self.shares]
        error = attempt(partial(self._compute, self.shares))
        if error is not None:
            for share, extent in zip(self.shares, before, strict=True):
                share.state.cache.cut_back(extent)
            self._run_apart(error)

    def _run_apart(self, error: Exception) -> None:
        """Run each request alone after the joint forward has failed, to find the cause."""
        alone = len(self.shares) == 1
        done = []
        for share in self.shares:
            failed = error if alone else attempt(partial(self._compute, [share]))
            if failed is None:
                done.append(share)
            else:
                self.errors[share.segment.request] = failed
        self.shares = done

    def observe(self, share: Share) -> None:
        """Tell the request's verifier which tokens the target chose."""
        verifier, segment, choices = share.state.verifier, share.segment, share.choices
        if verifier is None or not choices:
            return
        if segment.prefix:
            verifier.begin(segment.nodes[-1], choices[-1])
        else:
            verifier.observe(segment.nodes, segment.parents, segment.tokens, choices)

    def outgoing(self, elapsed_ms: float, failed: Container[int]) -> list[Part]:
        """Return the parts with their hidden states; parts of requests that `failed` are empty."""
        hidden = {share.segment.request: share.hidden for share in self.shares}
        parts = []
        for part in self.parts:
            segment = replace(part.segment, hidden=hidden.get(part.segment.request))
            if segment.request in failed:
                parts.append(Part(None, segment.select([])))
            else:
                parts.append(Part(part.state, segment))
        first = parts[0].segment
        if elapsed_ms > first.slowest_ms:
            parts[0].segment = replace(first, slowest_rows=self.num_rows, slowest_ms=elapsed_ms)
        return parts

    def _enter(self, state: StageRequestState, segment: Segment) -> Share:
        """Add the rows of one request to its cache. Raises CacheFull if there is no room."""
        if segment.hidden is None:
            vocab_size = self.model.config.vocab_size
            check_token_ids(segment.tokens, vocab_size, of="a row")
        state.cache.check_room(len(segment.nodes))
        tokens = torch.tensor(segment.tokens, dtype=torch.int64)
        inputs = tokens if segment.hidden is None else segment.hidden
        positions, parents = state.enter(segment)
        return Share(segment, state, RequestRows(state.cache, positions, parents), inputs)

    def _compute(self, shares: Sequence[Share]) -> None:
        """Run one forward over the rows of `shares`."""
        layers = {layer for share in shares for layer in share.state.aux_hidden_state_layers}
        rows = [share.rows for share in shares]
        inputs = torch.cat([share.inputs for share in shares])
        hidden, hidden_states = self.model.run(rows, inputs, aux_hidden_state_layers=layers)
        sizes = [len(share.rows.positions) for share in shares]
        own_hidden = hidden.split(sizes)
        own_hidden_states = {layer: whole.split(sizes) for layer, whole in hidden_states.items()}
        if self._choose:
            self._choose_tokens(shares, own_hidden)
        elif hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)  # here, where its time is measured
        for place, share in enumerate(shares):
            share.hidden = None if self._choose else own_hidden[place]
            share.hidden_states = {
                layer: pieces[place] for layer, pieces in own_hidden_states.items()
            }

    def _choose_tokens(self, shares: Sequence[Share], hidden: Sequence[Tensor]) -> None:
        """Choose the target's token after each row; of a prompt only after the last row."""
        asked = [(share, own) for share, own in zip(shares, hidden, strict=True) if share.num_asked]
        if not asked:
            return
        rows = torch.cat([own[-share.num_asked :] for share, own in asked])
        logits = self.model.logits(rows, batch_invariant=self._batch_invariant)
        counts = [share.num_asked for share, _ in asked]
        for (share, _), own in zip(asked, logits.split(counts), strict=True):
            positions = [position + 1 for position in share.rows.positions[-share.num_asked :]]
            assert share.state.sampler is not None, "tokens are chosen on the last stage alone"
            share.choices = share.state.sampler.choose(own, positions, share.segment)
