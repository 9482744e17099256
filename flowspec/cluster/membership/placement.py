"""Placement of layers on devices: pure functions of devices and model sizes.

It minimises the predicted time per token of pipelined speculation,

    miss x (time through all stages) + (1 - miss) x ticks x (time of the slowest stage),

within each device's memory: a token that is in no branch in flight costs a whole trip, any other
token its share of the slowest stage's ticks. Stage and line times are those of
cost_model/emulation.py. The search is exact: for every possible time of the slowest stage, a
dynamic program over devices finds the least total. Sizes are in bytes, times in seconds.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from flowspec.cluster.membership.roster import DoesNotFitError, Place, Placement
from flowspec.cost_model.emulation import Emulation
from flowspec.cost_model.profiles import ClusterProfile, DeviceProfile, LinkProfile, ModelProfile

# Between the values of `streaming` on the emulated testbed (docs/schedule.md), greedy and
# sampled: 0.05 and 0.08 misses per token, 0.6 and 1.0 slots of the slowest stage per other token.
MISS = 0.07  # 1 is plain decoding
TICKS = 0.8
ROWS = 16  # rows of a segment
WORTH = 1.02  # a pipeline must be this factor faster than a single device

# [L + 1] seconds by count of layers, infinite where a count is impossible
Cost: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a stage's memory must hold besides weights."""

    context: int = 2048  # rows of KV cache per request: prompt, answer and tree
    requests: int = 1  # requests decoded at the same time
    bytes_per_weight: float = 2.0  # of lm_head and embedding; layers have the model's own
    kv_bytes_per_number: float = 2.0
    reserve_bytes: float = 0.6e9  # for the system, the runtime and the device driver
    activation_rows: int = 1024  # most rows of a prefill segment

    def kv_bytes(self, model: ModelProfile) -> float:
        """Return the bytes of one layer's caches."""
        numbers = 2 * model.num_kv_heads * model.head_dim
        return self.context * self.requests * numbers * self.kv_bytes_per_number

    def end_bytes(self, model: ModelProfile) -> float:
        """Return the bytes of the embedding; the lm_head has as many."""
        return model.lm_head_weights * self.bytes_per_weight

    def fixed_bytes(self, model: ModelProfile) -> float:
        """Return the bytes that every device needs, whatever it holds."""
        wide = model.intermediate_size + 4 * model.hidden_size
        return self.reserve_bytes + self.activation_rows * wide * 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device that may hold layers; `drafter_bytes` is what the head beside it needs."""

    name: str
    device: DeviceProfile
    link: LinkProfile
    drafter_bytes: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Return the bytes that may be filled."""
        return self.device.memory_gb * 2**30 - self.drafter_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of a trip and of a slot in the objective; `miss` 1 is plain decoding."""

    miss: float = MISS
    ticks: float = TICKS


def needed_bytes(
    model: ModelProfile, needs: Needs, layers: int, *, first: bool, last: bool
) -> float:
    """Return the bytes of a stage with so many layers."""
    ends = (first + last) * needs.end_bytes(model)
    return layers * (model.layer_bytes + needs.kv_bytes(model)) + ends + needs.fixed_bytes(model)


def too_small(candidate: Candidate, model: ModelProfile, needs: Needs, layers: int = 1) -> str:
    """Return why a device cannot hold so many middle layers; empty if it can."""
    needed = needed_bytes(model, needs, layers, first=False, last=False)
    if needed <= candidate.memory_bytes:
        return ""
    what = "one layer" if layers == 1 else f"{layers} layers"
    return (
        f"too small: {what} with caches for {needs.context} tokens and the system's share need "
        f"{needed / 1e9:.2f} GB, {candidate.name} has {candidate.memory_bytes / 1e9:.2f} GB"
    )


def plan_layers(
    candidates: Sequence[Candidate],
    model: ModelProfile,
    needs: Needs,
    *,
    weights: Weights | None = None,
    spares: int = 0,
) -> Placement:
    """Return the best placement; leave out the slowest `spares` devices if the rest can hold it.

    Raises DoesNotFitError with the numbers.
    """
    weights = weights or Weights()
    usable = [c for c in candidates if not too_small(c, model, needs)]
    left_out = {c.name: too_small(c, model, needs) for c in candidates if c not in usable}
    by_speed = sorted(usable, key=lambda c: -c.device.bandwidth_gb_s)
    about = []
    for num_spares in range(min(spares, len(usable) - 1), -1, -1):
        working = by_speed[: len(by_speed) - num_spares] if num_spares else by_speed
        chosen = [c for c in usable if c in working]  # in order of arrival
        places = _search(chosen, model, needs, weights)
        if places is not None:
            break
    else:
        raise DoesNotFitError(_why_not(candidates, model, needs))
    if num_spares < spares:
        about.append(f"{spares} spares were asked for, but the layers leave {num_spares}")
    used = {place.name for place in places}
    for c in usable:
        if c.name not in used:
            spare = "spare: takes over when a device is lost"
            slower = "spare: with it the pipeline would be slower"
            left_out[c.name] = spare if c not in chosen else slower
    if len(places) == 1 and len(chosen) > 1:
        about.append(f"one device alone ({places[0].name}) is faster than any pipeline of these")
    return Placement(tuple(places), left_out, "; ".join(about))


def fixed_layers(
    candidates: Sequence[Candidate], model: ModelProfile, needs: Needs, layers: Sequence[int]
) -> Placement:
    """Place these counts of layers in order, each on the smallest device that can hold it.

    Raises DoesNotFitError when there are too few devices, or one is too small.
    """
    if len(candidates) < len(layers):
        raise DoesNotFitError(
            f"--layers names {len(layers)} stages, devices that have joined: {len(candidates)}"
        )
    left = list(candidates)
    taken: dict[int, Candidate] = {}
    for index in sorted(range(len(layers)), key=lambda i: -layers[i]):
        ends = {"first": index == 0, "last": index == len(layers) - 1}
        needed = needed_bytes(model, needs, layers[index], **ends)
        fitting = [c for c in left if c.memory_bytes >= needed]
        if not fitting:
            most = max(left, key=lambda c: c.memory_bytes)
            raise DoesNotFitError(
                f"stage {index + 1} with {layers[index]} layers needs {needed / 1e9:.2f} GB, the "
                f"largest device left, {most.name}, has {most.memory_bytes / 1e9:.2f} GB"
            )
        # in order of arrival among equals
        taken[index] = max(fitting, key=lambda c: c.device.bandwidth_gb_s)
        left.remove(taken[index])
    places, start = [], 0
    for index, count in enumerate(layers):
        places.append(Place(taken[index].name, start, start + count))
        start += count
    spare = "spare: takes over when a device is lost"
    return Placement(tuple(places), {c.name: spare for c in left})


def time_per_token(
    candidates: Sequence[Candidate],
    model: ModelProfile,
    needs: Needs,
    layers: Sequence[int],
    weights: Weights | None = None,
) -> float:
    """Return the predicted seconds per token with `layers` on these devices, in this order."""
    weights = weights or Weights()
    stages = [_Stage(c, model, needs) for c in candidates]
    times = [
        stage.seconds(count, last=k == len(layers) - 1)
        for k, (stage, count) in enumerate(zip(stages, layers, strict=True))
    ]
    trip = sum(times) + sum(stage.hop_s for stage in stages)
    return weights.miss * trip + (1 - weights.miss) * weights.ticks * max(times)


class _Stage:
    """Times and memory of one device as a stage of any number of layers."""

    def __init__(self, candidate: Candidate, model: ModelProfile, needs: Needs) -> None:
        self.candidate, self.model, self.needs = candidate, model, needs
        roomy = replace(candidate.device, memory_gb=1e9)  # memory is checked here, caches included
        cluster = ClusterProfile(
            name="alone", devices=(roomy, roomy), links=(candidate.link, candidate.link)
        )
        alone = Emulation(cluster=cluster, model=model, drafter="eagle", layers=(model.layers,))
        self.layer_s = alone.forward_s(1, ROWS, needs.context // 2) / model.layers
        self.lm_head_s = alone.lm_head_s(1, ROWS)
        row_bytes = ROWS * model.hidden_size * 2
        self.hop_s = (
            candidate.link.latency_ms / 1e3
            + row_bytes / (candidate.link.rate_mbps * 1e6 / 8)
            + candidate.device.host_overhead_ms / 1e3
        )

    def seconds(self, layers: int, *, last: bool) -> float:
        """Return the seconds of a segment's forward."""
        return layers * self.layer_s + (self.lm_head_s if last else 0.0)

    def most_layers(self, *, first: bool, last: bool) -> int:
        """Return the most layers that its memory holds."""
        free = self.candidate.memory_bytes - needed_bytes(
            self.model, self.needs, 0, first=first, last=last
        )
        each = self.model.layer_bytes + self.needs.kv_bytes(self.model)
        return max(0, min(self.model.layers, math.floor(free / each)))

    def costs(self, slowest_s: float, *, first: bool, last: bool) -> Cost:
        """Return the seconds of 0..L layers; infinite beyond memory or `slowest_s`."""
        num_layers = self.model.layers
        costs = np.full(num_layers + 1, np.inf)
        for count in range(1, self.most_layers(first=first, last=last) + 1):
            seconds = self.seconds(count, last=last)
            if seconds > slowest_s * (1 + 1e-9):
                break
            costs[count] = seconds + self.hop_s
        return costs


_Role: TypeAlias = tuple[bool, bool]  # is the first stage, is the last stage
# state after a device -> layers placed -> (layers it took, its role)
_Chosen: TypeAlias = dict[_Role, dict[int, tuple[int, _Role]]]
_STATES: tuple[_Role, ...] = ((False, False), (True, False), (False, True), (True, True))
_ROLES = _STATES[:3]  # of a stage among several; a stage alone is both first and last


def _search(
    candidates: Sequence[Candidate], model: ModelProfile, needs: Needs, weights: Weights
) -> list[Place] | None:
    """Return the best places, or None if the model does not fit."""
    stages = [_Stage(c, model, needs) for c in candidates]
    loosest = _cheapest(stages, model.layers, math.inf)
    if loosest is None:
        return None
    best: tuple[float, list[tuple[int, int]]] | None = None
    slot = (1 - weights.miss) * weights.ticks
    for slowest_s in sorted(set(_stage_times(stages))):
        if best is not None and weights.miss * loosest[0] + slot * slowest_s >= best[0]:
            break
        found = _cheapest(stages, model.layers, slowest_s)
        if found is None:
            continue
        total, counts = found
        value = weights.miss * total + slot * slowest_s
        # A single device has no links that may fail, so a pipeline must be worth it.
        bar = value * (WORTH if best is not None and len(best[1]) == 1 < len(counts) else 1.0)
        if best is None or bar < best[0]:
            best = value, counts
    assert best is not None
    places, start = [], 0
    for index, count in best[1]:
        places.append(Place(candidates[index].name, start, start + count))
        start += count
    return places


def _stage_times(stages: "Sequence[_Stage]") -> Iterator[float]:
    for stage in stages:
        for last in (False, True):
            for count in range(1, stage.most_layers(first=False, last=last) + 1):
                yield stage.seconds(count, last=last)


def _cheapest(
    stages: Sequence[_Stage], num_layers: int, slowest_s: float
) -> tuple[float, list[tuple[int, int]]] | None:
    """Return the least sum of stage and hop times with no stage above `slowest_s`.

    Also returns (device, layers) of each stage in order. State: layers placed, whether the first
    and the last stage are chosen.
    """
    table = {state: np.full(num_layers + 1, np.inf) for state in _STATES}
    table[False, False][0] = 0.0
    # before[n, c]: layers placed before a device that takes c of n; the last entry is "impossible"
    counts = np.arange(num_layers + 1)
    before = counts[:, None] - counts[None, :]
    before[before < 0] = num_layers + 1
    steps: list[_Chosen] = []
    for stage in stages:
        new = {state: costs.copy() for state, costs in table.items()}
        chosen: _Chosen = {state: {} for state in _STATES}
        for role in _ROLES:
            costs = stage.costs(slowest_s, first=role[0], last=role[1])
            for state in _STATES:
                if (role[0] and state[0]) or (role[1] and state[1]):
                    continue
                after = (state[0] or role[0], state[1] or role[1])
                through = np.append(table[state], np.inf)[before] + costs[None, :]
                taken = through.argmin(axis=1)
                least = through[counts, taken]
                for n in np.flatnonzero(least < new[after] - 1e-12):
                    new[after][n] = least[n]
                    chosen[after][int(n)] = (int(taken[n]), role)
        steps.append(chosen)
        table = new
    options = [
        (float(stage.costs(slowest_s, first=True, last=True)[num_layers]), [(index, num_layers)])
        for index, stage in enumerate(stages)
    ]
    several = float(table[True, True][num_layers])
    if math.isfinite(several):
        options.append((several, _trace_back(steps, num_layers)))
    best = min(options)
    return best if math.isfinite(best[0]) else None


def _trace_back(steps: "Sequence[_Chosen]", num_layers: int) -> list[tuple[int, int]]:
    """Return (device, layers) of each stage in order."""
    middle: list[tuple[int, int]] = []
    first: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    state, left = (True, True), num_layers
    for index in range(len(steps) - 1, -1, -1):
        found = steps[index][state].get(left)
        if found is None:
            continue
        count, role = found
        kind = first if role[0] else last if role[1] else middle
        kind.insert(0, (index, count))
        left -= count
        state = (state[0] and not role[0], state[1] and not role[1])
    return [*first, *middle, *last]


def _why_not(candidates: Sequence[Candidate], model: ModelProfile, needs: Needs) -> str:
    """Explain with numbers, in total and per device, why the model does not fit."""
    weights = model.layers * model.layer_bytes + 2 * needs.end_bytes(model)
    caches = model.layers * needs.kv_bytes(model)
    each = needs.fixed_bytes(model)
    have = "; ".join(
        f"{c.name} has {c.memory_bytes / 1e9:.2f} GB, room for "
        f"{_Stage(c, model, needs).most_layers(first=False, last=False)} layers"
        for c in candidates
    )
    return (
        f"{model.name} needs {weights / 1e9:.2f} GB for its {model.layers} layers, embedding and "
        f"lm_head, {caches / 1e9:.2f} GB for caches of {needs.context} tokens x {needs.requests} "
        f"and {each / 1e9:.2f} GB more on each device; {have or 'no device has joined'}. Add "
        "devices or memory, or shorten --context"
    )
