"""`flowspec status`: what scripts read of it."""

from flowspec.cli.status import as_json
from flowspec.config import NumericsConfig
from flowspec.protocol.control import (
    ClusterStatus,
    DeviceReport,
    DeviceStatus,
    ModelCard,
    ModelSizes,
)

SIZES = ModelSizes(**dict.fromkeys(ModelSizes.model_fields, 1))
REPORT = DeviceReport(hostname="a", kind="x", memory_available_bytes=1, memory_total_bytes=2)
STATUS = ClusterStatus(
    version="1",
    healthy=True,
    why="",
    epoch=1,
    model=ModelCard(model_id="m", model_hash="h", numerics=NumericsConfig(dtype="float16")),
    sizes=SIZES,
    strategy="ar",
    drafter="none",
    uptime_s=1.0,
    probe_age_s=None,
    requests_active=0,
    requests_waiting=0,
    requests_done=0,
    requests_failed=0,
    devices=(
        DeviceStatus(
            name="a", state="serving", report=REPORT, num_kv_tokens=9, num_kv_tokens_used=4
        ),
    ),
)


def test_the_json_has_the_keys_of_the_version_before_too() -> None:
    """Scripts that read them go on; all else is what the head said."""
    found = as_json(STATUS)
    assert found["model"]["dtype"] == found["model"]["numerics"]["dtype"] == "float16"
    assert found["model"].pop("quantization") == "none"
    (device,) = found["devices"]
    assert (device.pop("kv_rows"), device.pop("kv_rows_used")) == (9, 4)
    del found["model"]["dtype"]
    assert found == STATUS.model_dump(mode="json")
