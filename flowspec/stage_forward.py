"""Forward: one run of a stage's layers over the rows of one or several requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowspec.acceptance.coupled import choose
from flowspec.model.kv_cache import CacheFull
from flowspec.model.rows import RequestRows, run_batch, run_logits
from flowspec.model.stage_model import StageModel
from flowspec.stage_request import StageRequest
from flowspec.wire import Segment


@dataclass(slots=True)
class Part:
    """One request's share of what came down the pipe; without a state the request is over."""

    state: StageRequest | None
    segment: Segment


@dataclass(slots=True)
class Share:
    """A part whose rows are really run, and where they begin in the forward."""

    segment: Segment
    state: StageRequest
    start: int
    rows: RequestRows

    def of(self, tensor: Tensor) -> Tensor:
        """This request's rows of a tensor [n, ...] over all rows."""
        return tensor[self.start : self.start + len(self.rows.positions)]

    @property
    def num_asked(self) -> int:
        """Of how many of its last rows the next token is asked for."""
        if self.segment.prefix:
            return 1 if self.segment.verify else 0
        return len(self.segment.nodes)


class Forward:
    """Rows in, hidden states out; where `choose`, also the target's token after each row."""

    def __init__(
        self, model: StageModel, parts: Sequence[Part], *, choose: bool, shape_stable: bool
    ) -> None:
        self.model = model
        self.parts = parts
        self.num_rows = sum(len(part.segment.nodes) for part in parts)
        self.shares: list[Share] = []
        self.errors: dict[int, str] = {}  # by request: why its rows were not run
        self.features: Mapping[int, Tensor] = {}  # [n, H] by layer
        self._hidden: Tensor | None = None
        self._choose = choose
        self._shape_stable = shape_stable
        self._choices: dict[int, list[int]] = {}  # by request

    def run(self) -> None:
        """Compute; everything that changes a request's state but the verdict happens here."""
        inputs = self._enter_rows()
        if not self.shares:
            return
        layers = {layer for share in self.shares for layer in share.state.feature_layers}
        rows = [share.rows for share in self.shares]
        hidden, self.features = run_batch(self.model, rows, torch.cat(inputs), features=layers)
        if self._choose:
            self._choose_tokens(hidden)
            return
        if hidden.is_cuda:
            torch.cuda.synchronize(hidden.device)  # here, where its time is measured
        self._hidden = hidden

    def observe(self, share: Share) -> None:
        """Tell the request's verifier which tokens the target chose."""
        verifier, segment = share.state.verifier, share.segment
        choices = self._choices.get(segment.request)
        if verifier is None or not choices:
            return
        if segment.prefix:
            verifier.begin(segment.nodes[-1], choices[-1])
        else:
            verifier.observe(segment.nodes, segment.parents, segment.tokens, choices)

    def outgoing(self, elapsed_ms: float) -> list[Part]:
        """The parts as they leave: with their hidden states, emptied where they failed."""
        hidden = {}
        if self._hidden is not None:
            hidden = {share.segment.request: share.of(self._hidden) for share in self.shares}
        parts = []
        for part in self.parts:
            segment = replace(part.segment, hidden=hidden.get(part.segment.request))
            if segment.request in self.errors:
                parts.append(Part(None, segment.select([])))
            else:
                parts.append(Part(part.state, segment))
        first = parts[0].segment
        if elapsed_ms > first.slowest_ms:
            parts[0].segment = replace(first, slowest_rows=self.num_rows, slowest_ms=elapsed_ms)
        return parts

    def _enter_rows(self) -> list[Tensor]:
        """Give every row its place; a request without room is left out and fails alone."""
        inputs: list[Tensor] = []
        start = 0
        for part in self.parts:
            state, segment = part.state, part.segment
            if state is None or not segment.nodes:
                continue
            try:
                state.cache.check_room(len(segment.nodes))
            except CacheFull as error:
                self.errors[segment.request] = str(error)
                continue
            positions, parents = state.enter(segment)
            rows = RequestRows(state.cache, positions, parents)
            self.shares.append(Share(segment, state, start, rows))
            start += len(positions)
            tokens = torch.tensor(segment.tokens, dtype=torch.int64)
            inputs.append(tokens if segment.hidden is None else segment.hidden)
        return inputs

    def _choose_tokens(self, hidden: Tensor) -> None:
        """The target's token after each row; of a prompt only the last row matters."""
        asked = [share for share in self.shares if share.num_asked]
        if not asked:
            return
        counts = [share.num_asked for share in asked]
        rows = torch.cat([share.of(hidden)[-share.num_asked :] for share in asked])
        logits = run_logits(self.model, rows, shape_stable=self._shape_stable)
        for share, own in zip(asked, logits.split(counts), strict=True):
            positions = [position + 1 for position in share.rows.positions[-share.num_asked :]]
            sampling = share.state.opened.sampling
            self._choices[share.segment.request] = choose(own, positions, sampling)
