"""Every field of both protocols has bounds, and a new field needs no code but its type."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import FailFast, Field, TypeAdapter

from flowspec.config import NumericsConfig
from flowspec.protocol import codec, control
from flowspec.protocol.schema import CutText, Int32, MessageCodec, TensorField, WireError

OWN_CHECKS = {"SamplingParams"}  # a dataclass that checks its numbers itself; see test_codec.py
CAPPED_TEXTS = {"NumericsConfig": NumericsConfig}  # a model whose configuration caps its texts


def parts_of(schema: Any, own: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part of a core schema with the name of the class that it is in."""
    if isinstance(schema, dict):
        own = getattr(schema.get("cls"), "__name__", own)
        if isinstance(schema.get("type"), str):
            yield own, schema
        for key, value in schema.items():
            if key not in ("serialization", "metadata"):
                yield from parts_of(value, own)
    elif isinstance(schema, list | tuple):
        for value in schema:
            yield from parts_of(value, own)


def unbounded(adapter: "TypeAdapter[Any]") -> list[str]:
    """The fields that may be long or large without end."""
    found = []
    for own, part in parts_of(adapter.core_schema):
        kind = part["type"]
        if kind == "tuple" and "variadic_item_index" not in part:
            continue
        wrong = (
            (kind in ("str", "dict") and "max_length" not in part and own not in CAPPED_TEXTS)
            or (kind in ("list", "tuple", "set", "frozenset", "generator") and not is_capped(part))
            or (kind == "int" and not (own in OWN_CHECKS or {"ge", "le"} <= part.keys()))
            or kind in ("any", "bytes", "json", "callable")
        )
        if wrong:
            found.append(f"{own}: {kind}")
    return found


def test_these_models_cap_their_texts() -> None:
    """Their own configuration does, for every text in them."""
    for model in CAPPED_TEXTS.values():
        assert model.model_config.get("str_max_length", 1 << 30) <= 4096


def is_capped(part: dict[str, Any]) -> bool:
    """A list has a cap, and one bad element ends its validation: no list of a million errors."""
    return "max_length" in part and bool(part.get("fail_fast"))


@pytest.mark.parametrize("module", [codec, control], ids=["data", "control"])
def test_every_text_list_and_number_has_a_cap(module: Any) -> None:
    """Without one a peer could make this side hold what it likes."""
    assert unbounded(module._CODEC.adapter) == []


@dataclass(frozen=True, slots=True, kw_only=True)
class Loose:
    """Has every fault that the check above looks for."""

    kind: Literal["loose"] = "loose"
    text: str = ""
    number: int = 0
    listed: tuple[Int32, ...] = ()
    slow: Annotated[tuple[Int32, ...], Field(max_length=4)] = ()
    table: dict[Int32, bool] = Field(default_factory=dict)
    anything: Any = None


def test_the_check_finds_what_has_none() -> None:
    """A check that could not fail would prove nothing."""
    found = unbounded(TypeAdapter(Loose))
    assert sorted(found) == sorted(
        f"Loose: {kind}" for kind in ("str", "int", "tuple", "tuple", "dict", "any")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A part of a message that the codec has not been told of."""

    token: Int32
    q: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A message that the codec has not been told of."""

    kind: Literal["draft"] = "draft"
    candidates: Annotated[
        tuple[Annotated[tuple[Candidate, ...], Field(max_length=3), FailFast()], ...],
        Field(max_length=2),
        FailFast(),
    ] = ()
    logits: "TensorField | None" = None
    about: CutText = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """Another one, so that there is a union."""

    kind: Literal["nothing"] = "nothing"


def test_a_new_field_needs_its_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of lists of dataclasses, a tensor and a text: there and back, caps included."""
    import torch

    monkeypatch.setattr(codec, "_CODEC", MessageCodec(Draft | Nothing, max_bytes=1000))
    candidates = ((Candidate(token=3, q=0.25), Candidate(token=4, q=1 / 3)), ())
    draft: Any = Draft(candidates=candidates, logits=torch.arange(6.0).view(1, 2, 3), about="é")
    frames = [bytes(frame) for frame in codec.encode(draft)]
    arrived: Any = codec.decode(frames)
    assert (arrived.candidates, arrived.about) == (candidates, "é")
    assert torch.equal(arrived.logits, draft.logits)
    too_many: Any = Draft(candidates=((), (), ()))
    with pytest.raises(WireError, match="draft.candidates: Tuple should have at most 2"):
        codec.decode(codec.encode(too_many))
    wrong: Any = Draft(candidates=((Candidate(token=3, q=1.5),),))
    with pytest.raises(WireError, match=r"draft.candidates.0.0.q: .* less than or equal to 1"):
        codec.decode(codec.encode(wrong))
