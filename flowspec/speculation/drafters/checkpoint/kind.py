"""Recognises the kind of a draft checkpoint by its tensors.

The configs published with draft heads name a Llama model in any case, so the names and shapes of
the tensors decide.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowspec.weights.load import read_tensors
from flowspec.weights.tensor_files import load_bin

_FILES = ("model.safetensors", "pytorch_model.bin")
_MEDUSA_FILE = "medusa_lm_head.pt"
_MEDUSA_NAME = re.compile(r"(medusa_head\.)?\d+\.\d+\.(linear\.)?weight")
_BLOCK_MARKS = ("markov_head.", "confidence_head.", "prefix_gru.", "embed_proj.", "logit_head.")
_EAGLE3_NAMES = ("d2t", "t2d", "draft_id_to_target_id", "input_norm.weight")
_EAGLE3_MARKS = ("midlayer.", "fc_norm.", ".hidden_norm.", "lm_head.")


@dataclass(frozen=True, slots=True)
class Family:
    """A family of draft checkpoints; `drafter` is its name for --drafter, "" if it has none."""

    title: str
    drafter: str = ""


FAMILIES: dict[str, Family] = {
    "eagle": Family("EAGLE-1/2 head", "eagle"),
    "eagle3": Family("EAGLE-3 head", "eagle3"),
    "p_eagle": Family("P-EAGLE head (parallel drafting)"),
    "dflash": Family("DFlash head or one of its kin (JetSpec, DSpark, Domino)"),
    "medusa": Family("Medusa head"),
    "model": Family("language model of its own", "draft_model"),
    "unknown": Family("draft checkpoint of no known kind"),
}


@dataclass(frozen=True, slots=True)
class DraftKind:
    """A family, and the evidence for it: names of tensors, with shapes if these decide."""

    family: str
    evidence: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name for users."""
        return FAMILIES[self.family].title


def draft_weights(folder: Path) -> Path:
    """Return the file with a draft checkpoint's tensors. Raises ValueError if there is none."""
    names = (*_FILES, _MEDUSA_FILE)
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        if not folder.exists():
            raise ValueError(f"{folder} does not exist; give the folder of a draft checkpoint")
        raise ValueError(
            f"{folder} has none of {', '.join(names)}; is it the folder of a draft checkpoint?"
        )
    return path


def read_draft(
    path: Path, *, device: torch.device | str = "cpu", dtype: str | None = None
) -> dict[str, Tensor]:
    """Return the tensors of that file. Raises ValueError if it is damaged."""
    if path.name == _MEDUSA_FILE:
        return load_bin(path)
    return read_tensors(path, device=device, dtype=dtype)


def recognise(tensors: Mapping[str, Tensor]) -> DraftKind:
    """Return the family of a checkpoint with these tensors; "unknown" if nothing fits."""
    if marks := [name for name in tensors if _MEDUSA_NAME.fullmatch(name)]:
        return DraftKind("medusa", _few(marks))
    if "mask_hidden" in tensors:
        return DraftKind("p_eagle", ("mask_hidden",))
    if block := _block_marks(tensors):
        return DraftKind("dflash", block)
    if eagle3 := _eagle3_marks(tensors):
        return DraftKind("eagle3", eagle3)
    for fc, layer in (("fc.weight", "layers.0."), ("fusion_fc.weight", "transformer.")):
        if fc in tensors and any(name.startswith(f"{layer}self_attn.") for name in tensors):
            shape = list(tensors[fc].shape)
            return DraftKind("eagle", (f"{fc} {shape}", f"{layer}self_attn.*"))
    if "model.embed_tokens.weight" in tensors:
        return DraftKind("model", _few(name for name in tensors if ".layers." in name))
    return DraftKind("unknown", _few(tensors))


def require(kind: DraftKind, family: str, path: Path) -> None:
    """Raise ValueError, naming what to use instead, unless `kind` is of `family`."""
    if kind.family == family:
        return
    drafter = FAMILIES[kind.family].drafter
    advice = (
        f"use --drafter {drafter}"
        if drafter
        else f"--drafter {FAMILIES[family].drafter} needs an {FAMILIES[family].title}"
    )
    raise ValueError(
        f"{path} is no {FAMILIES[family].title}, found: {kind.title} (it has "
        f"{', '.join(kind.evidence)}); {advice}"
    )


def refuse_head(folder: Path) -> None:
    """Raise ValueError if `folder` holds a draft head; a language model is needed."""
    for path in (folder / name for name in _FILES):
        if path.exists():
            kind = recognise(read_draft(path))
            if kind.family not in ("model", "unknown"):
                require(kind, "model", path)


def _block_marks(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the evidence of a one-forward head: norms of hidden states, and no lm_head."""
    own = _few(name for name in tensors if name.startswith(_BLOCK_MARKS))
    if own:
        return own
    fits = "hidden_norm.weight" in tensors and "lm_head.weight" not in tensors
    return ("fc.weight", "hidden_norm.weight") if fits and "fc.weight" in tensors else ()


def _eagle3_marks(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    fc = tensors.get("fc.weight")
    if fc is None and not any(name.startswith("midlayer.") for name in tensors):
        return ()
    marks = [name for name in tensors if name in _EAGLE3_NAMES]
    marks += [n for n in tensors if n.startswith(_EAGLE3_MARKS) or ".hidden_norm." in n]
    narrow = fc is not None and fc.dim() == 2 and fc.shape[1] == 2 * fc.shape[0]
    if marks == ["lm_head.weight"] and narrow:
        return ()  # an EAGLE-1/2 head with a copy of the target's lm_head
    wide = fc is not None and fc.dim() == 2 and fc.shape[1] >= 3 * fc.shape[0]
    shape = (f"fc.weight {list(fc.shape)}",) if wide and fc is not None else ()
    return (*shape, *_few(marks))


def _few(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names)[:3])
