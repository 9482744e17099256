"""Where a device's layers come from, and what of them it keeps in memory between epochs."""

from collections.abc import Callable
from pathlib import Path

from flowspec.cluster.messages import Assign, FromDevice, Progress
from flowspec.model.load import _empty_stage, _fill_stage, _part_config, read_tensors
from flowspec.model.manifest import read_manifest, stage_folder
from flowspec.model.stage_model import StageModel


class FolderLayers:
    """Layers of a model that lies on this device, split into one-layer stages."""

    def __init__(self, folder: Path, *, device: str, dtype: str) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._loaded: tuple[tuple[str, int, int], StageModel] | None = None

    def load(self, assign: Assign, report: Callable[[FromDevice], None]) -> StageModel:
        """See LayerSource.load."""
        key = (assign.model.model_hash, assign.first_layer, assign.last_layer)
        if self._loaded is not None and self._loaded[0] == key:
            return self._loaded[1]
        self._loaded = None  # before the new ones come, the old ones go
        manifest = read_manifest(self._folder)
        tensors = {}
        total = assign.last_layer - assign.first_layer
        for k in range(assign.first_layer, assign.last_layer):
            path = self._folder / stage_folder(k + 1) / "model.safetensors"
            tensors.update(read_tensors(path, device=self._device, dtype=self._dtype))
            report(Progress(epoch=assign.epoch, phase="load", done_bytes=k + 1 - assign.first_layer, total_bytes=total))
        config = _part_config(self._folder, manifest, "head", verify=True)
        model = _fill_stage(_empty_stage(config, assign.first_layer, assign.last_layer), tensors, self._folder)
        self._loaded = (key, model)
        return model
