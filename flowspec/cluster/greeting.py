"""What a head makes of a device's hello: refuse it, or introduce it to whoever watches."""

from flowspec.cluster.messages import PROTOCOL_VERSION, Hello, ModelCard, Refuse
from flowspec.cluster.roster import Device, MembershipConfig


def refuse(hello: Hello, config: MembershipConfig) -> Refuse | None:
    """Why a device cannot be part of this cluster, with both values; None where it can."""
    if hello.protocol != PROTOCOL_VERSION:
        return Refuse(
            why=f"the head speaks control protocol {PROTOCOL_VERSION}, the device "
            f"{hello.protocol}; install the same FlowSpec on both ({config.version} is here, "
            f"{hello.version} there)"
        )
    if hello.version != config.version:
        return Refuse(
            why=f"the head runs FlowSpec {config.version}, the device {hello.version}; "
            "install the same version on both"
        )
    held = hello.model
    if hello.pinned and (held is None or not held.is_same_weights(config.model)):
        have = _card(held) if held is not None else "none"
        return Refuse(
            why=f"the head serves {_card(config.model)}, the device is offline and holds "
            f"{have}; let it fetch, or copy the head's model there"
        )
    return None


def introduce(device: Device) -> str:
    """A device in one line."""
    report = device.report
    rate = report.bandwidth_bytes_per_s / 1e9
    return (
        f"joined: {report.kind}, {report.torch_device}, "
        f"{report.memory_available_bytes / 1e9:.1f} of {report.memory_total_bytes / 1e9:.1f} GB "
        f"free, {rate:.1f} GB/s"
    )


def _card(card: ModelCard) -> str:
    return f"{card.model_id} ({card.model_hash[:12]}, {card.stored_dtype}, {card.quantization})"
