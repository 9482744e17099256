"""A device's layers, from memory, its disk, its own copy of the model, or the head."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowspec.model.backend import StageBackend
from flowspec.protocol.control import Assign, FromDevice, ModelCard, Progress
from flowspec.request import ClusterError
from flowspec.stage.backends import StageSource, find_backend
from flowspec.transport.secure.keys import Keys
from flowspec.weights.manifest import MANIFEST_NAME, Manifest, read_manifest
from flowspec.weights.transfer.cache import ShardCache
from flowspec.weights.transfer.shards import FetchProgress, fetch_manifest, fetch_shards

log = logging.getLogger(__name__)
MANIFEST_TIMEOUT_S = 30.0


class DeviceLayers:
    """Keeps the newest layers in memory, so that a new epoch with the same ones loads nothing.

    `folder` is a copy of the model on this device, split or not. With `may_fetch` False, only that
    copy and the cache are used.
    """

    def __init__(
        self,
        cache: ShardCache,
        keys: Keys,
        *,
        device: str,
        folder: Path | None = None,
        may_fetch: bool = True,
    ) -> None:
        self._cache, self._keys, self._device = cache, keys, device
        self._folder, self._may_fetch = folder, may_fetch
        self._loaded: tuple[tuple[str, str, int, int], StageBackend[Any]] | None = None
        self._converted = False  # layers in another dtype than the files cannot be mapped

    @property
    def held_bytes(self) -> int:
        """Return the bytes of memory that unloading would free; mapped files take none."""
        if self._loaded is None:
            return 0
        model = self._loaded[1]
        is_mapped = self._device == "cpu" and not self._converted
        return 0 if is_mapped else model.weight_bytes

    def load(self, assign: Assign, report: Callable[[FromDevice], None]) -> StageBackend[Any]:
        """Load the assigned layers. Raises ClusterError or ValueError that says what is missing."""
        card, first, last = assign.model, assign.first_layer, assign.last_layer
        key = (card.model_hash, card.numerics.fingerprint, first, last)
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded[1]
        self._loaded = None  # unload the old layers before the new ones come
        manifest = fetch_manifest(
            assign.shards, self._keys, assign.manifest_sha256, MANIFEST_TIMEOUT_S
        )
        if manifest.model_hash != card.model_hash:
            raise ClusterError(
                "head", f"serves {card.model_hash[:12]}, but its manifest is of "
                f"{manifest.model_hash[:12]}; restart it"
            )  # fmt: skip
        self._fetch(assign, manifest, report)
        size = _num_bytes(manifest, first, last)
        report(Progress(epoch=assign.epoch, phase="load", done_bytes=0, total_bytes=size))
        source = StageSource(
            folder=self._cache.folder(manifest),
            first_layer=first,
            last_layer=last,
            device=self._device,
            dtype=card.numerics.dtype,
            quantization=card.numerics.quantization,
            verify=False,  # all hashes have just been compared
        )
        model = find_backend(card.numerics.backend).load(source)
        report(Progress(epoch=assign.epoch, phase="load", done_bytes=size, total_bytes=size))
        self._loaded, self._converted = (key, model), manifest.dtype != card.numerics.dtype
        return model

    def _fetch(
        self, assign: Assign, manifest: Manifest, report: Callable[[FromDevice], None]
    ) -> None:
        shards = manifest.stages_of(assign.first_layer, assign.last_layer)
        if self._folder is not None:
            missing = self._cache.adopt(self._folder, manifest, shards)
            log.info("%s lacks only %d files of these layers", self._folder, len(missing))
        if not self._may_fetch:
            self._check_here(manifest, shards)

        def tell(progress: FetchProgress) -> None:
            report(
                Progress(
                    epoch=assign.epoch,
                    phase="fetch",
                    done_bytes=progress.done_bytes,
                    total_bytes=progress.total_bytes,
                    cached_bytes=min(progress.cached_bytes, progress.done_bytes),
                )
            )

        fetch_shards(assign.shards, self._keys, manifest, shards, self._cache, tell)

    def _check_here(self, manifest: Manifest, shards: range) -> None:
        missing = [
            name
            for shard in shards
            for name in (f"stage_{shard}/config.json", f"stage_{shard}/model.safetensors")
            if not self._cache.has(manifest.files[name])
        ]
        if missing:
            raise ValueError(
                f"not on this device: {missing[0]} and {len(missing) - 1} more files of "
                f"{manifest.model_id}; copy the head's split folder here and name it with --model, "
                "or join without --no-fetch"
            )


def folder_card(folder: Path | None, may_fetch: bool) -> ModelCard | None:
    """Return the only model that a device without fetching can serve, if its folder names one."""
    if folder is None or may_fetch or not (folder / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(folder)
    return ModelCard(
        model_id=manifest.model_id,
        model_hash=manifest.model_hash,
        stored_dtype=manifest.dtype,
    )


def _num_bytes(manifest: Manifest, first: int, last: int) -> int:
    shards = manifest.stages_of(first, last)
    return sum(manifest.files[f"stage_{shard}/model.safetensors"].bytes for shard in shards)
