"""The table of acceptance rules, and `choose`, which turns logits into tokens.

A new rule takes one file here and one row in the table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowspec.protocol.messages import Candidates
from flowspec.request import SamplingParams
from flowspec.speculation.acceptance.base import AcceptanceRule, CandidateNeeds
from flowspec.speculation.acceptance.greedy import GREEDY
from flowspec.speculation.acceptance.gumbel_coupled import GUMBEL_COUPLED
from flowspec.speculation.processors import warp
from flowspec.speculation.processors.base import PathState

RULES: dict[str, AcceptanceRule] = {"gumbel_coupled": GUMBEL_COUPLED, "greedy": GREEDY}


def find_rule(name: str) -> AcceptanceRule:
    """Return a row of the table. Raises ValueError listing the known names."""
    if name not in RULES:
        raise ValueError(f"unknown acceptance rule {name!a}; known: {', '.join(RULES)}")
    return RULES[name]


def rule_of(sampling: SamplingParams) -> AcceptanceRule:
    """Return the rule that chooses a request's tokens; at temperature 0 it is always greedy.

    Raises ValueError if the name is unknown, at any temperature.
    """
    rule = find_rule(sampling.acceptance)
    return GREEDY if sampling.temperature == 0.0 else rule


def choose(
    logits: Tensor,
    positions: Sequence[int],
    sampling: SamplingParams,
    *,
    states: Sequence[PathState] = (),
    candidates: Sequence[Candidates] = (),
) -> list[int]:
    """Choose the tokens at `positions` [n] from logits [n, V]; row k decides positions[k].

    `states` are the rows' processor states, empty if no processor has one. `candidates` came with
    the rows; without them a rule that needs some finds a row without children. Returns n token ids.
    """
    if states:
        rows = zip(states, logits, strict=True)
        logits = torch.stack([state.apply(row) for state, row in rows])
    rule = rule_of(sampling)
    if rule.needs is not CandidateNeeds.NOTHING and not candidates:
        candidates = [Candidates()] * len(positions)
    if sampling.temperature > 0.0:
        logits = warp(logits, sampling)
    return rule.choose(logits, positions, sampling.seed, candidates)
