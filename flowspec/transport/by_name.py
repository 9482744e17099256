"""The transports that processes of one machine may use, by name."""

from flowspec.transport.base import Transport
from flowspec.transport.torch_dist import TorchDistTransport, meet_in_folder
from flowspec.transport.zmq import ZmqTransport, local_addresses

TRUSTED_ONLY = "torch.distributed neither encrypts nor authenticates: for trusted networks only"


def local_transport(
    name: str, rank: int, *, num_stages: int, folder: str, device: str
) -> Transport:
    """Return the transport zmq, gloo or nccl of rank `rank`; the ranks meet in `folder`.

    The folder belongs to this cluster alone. Raises ValueError when torch or this machine does not
    support it.
    """
    if name == "zmq":
        return ZmqTransport(rank, local_addresses(folder, num_stages))
    meeting = meet_in_folder(folder, gpu=device if name == "nccl" else "")
    return TorchDistTransport(rank, num_stages, meeting)


def rank_device(name: str, device: str, rank: int) -> str:
    """Return the device of the `rank`-th process on this machine; nccl needs a GPU for each."""
    return f"cuda:{rank}" if name == "nccl" else device
