"""Placements that move as few layers as possible: pure functions of what the devices hold."""

from collections.abc import Mapping, Sequence

from flowspec.cluster.membership.roster import Device, Place, Placement, Planner
from flowspec.protocol.control import ModelCard


def patched(
    places: Sequence[Place], devices: Mapping[str, Device], planner: Planner, model: ModelCard
) -> Placement | None:
    """Return the last placement, with each lost device's layers on a spare or a returned device.

    No other device has to load anything. Returns None if no free device can hold a gap, or if there
    is no last placement.
    """
    if not places:
        return None
    held = {device.place: device for device in devices.values() if device.place}
    holders = {held[place].name for place in places if place in held}
    spares = [device for name, device in devices.items() if name not in holders]
    kept = []
    for place in places:
        if place in held:
            kept.append(place)
            continue
        taker = _best_taker(spares, place, planner, model)
        if taker is None:
            return None
        spares.remove(taker)
        kept.append(Place(taker.name, place.first, place.last))
    return Placement(tuple(kept), {device.name: device.about or "spare" for device in spares})


def as_held(devices: Mapping[str, Device], planner: Planner, model: ModelCard) -> Placement | None:
    """Return the placement of the layers that devices still hold, if they make the whole model.

    Nobody has to load anything then, for instance after a restart of the head.
    """
    holders = {
        device.hello.layers: name
        for name, device in reversed(list(devices.items()))
        if device.hello.model == model and device.hello.layers is not None
    }
    places: list[Place] = []
    end = 0
    while span := next((held for held in holders if held[0] == end < held[1]), None):
        places.append(Place(holders[span], *span))
        end = span[1]
    if end != planner.num_layers or not planner.accepts(places):
        return None
    used = {place.name for place in places}
    spares = {name: "spare" for name in devices if name not in used}
    return Placement(tuple(places), spares, "the devices still hold all layers")


def _best_taker(
    spares: Sequence[Device], place: Place, planner: Planner, model: ModelCard
) -> Device | None:
    """Return a device that can hold these layers: one that has them already, else the fastest."""
    span = (place.first, place.last)
    fitting = [d for d in spares if not planner.too_small(d.report, span[1] - span[0])]
    return max(
        fitting,
        key=lambda d: (
            d.hello.model == model and d.hello.layers == span,
            d.report.bandwidth_bytes_per_s,
        ),
        default=None,
    )
