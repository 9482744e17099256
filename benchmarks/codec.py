"""What a message costs the codec: encode plus decode, and bytes on the wire.

    python -m benchmarks.codec [--rounds 2000] [--json FILE] [--most-ms 0.1]

"segment" is 32 rows x 4096 fp16, with a verdict, as a stage sends it on; "batch" is four of them;
"prompt" has 512 rows and no hidden states, as the head sends it. A tensor is not copied: its frame
is a view, on both sides. Median and 99th percentile in milliseconds.
Exit code 1 where the median of "segment" is above --most-ms.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flowspec.protocol.codec import decode, encode
from flowspec.protocol.messages import Exit, Reroot, Segment, WireMessage, together
from flowspec.request import NodeId

ROWS, HIDDEN_SIZE = 32, 4096
PROMPT_ROWS = 512


def make_segment(request: int, rows: int) -> Segment:
    """Rows below a tree's root, no hidden states."""
    first = 1000
    return Segment(
        epoch=1,
        source=1,
        number=77,
        request=request,
        seq_no=300,
        nodes=tuple(NodeId(first + k) for k in range(rows)),
        parents=(NodeId(17), *(NodeId(first + (k - 1) // 2) for k in range(1, rows))),
        tokens=tuple(4000 + k for k in range(rows)),
        slowest_rows=rows,
        slowest_ms=12.345678,
        verdict=Reroot(epoch=1, request=request, position=250, parent=NodeId(17), token=4000),
    )


def examples() -> dict[str, WireMessage]:
    """Messages by name."""
    hidden = torch.randn(ROWS, HIDDEN_SIZE).half()
    segments = [replace(make_segment(k, ROWS), hidden=hidden) for k in range(1, 5)]
    verdict = segments[0].verdict
    assert verdict is not None
    return {
        "segment": segments[0],
        "batch": together(segments),
        "prompt": replace(make_segment(1, PROMPT_ROWS), prefix=True),
        "verdict": verdict,
        "exit": Exit(request=1, seq_no=300, rows=3, slowest_rows=32, slowest_ms=12.345678),
    }


def times_ms(message: WireMessage, rounds: int) -> list[float]:
    """Encode plus decode, once a round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        decode(encode(message))
        times.append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, the first tenth (warm-up) left out."""
    warm = sorted(times[len(times) // 10 :])
    return {"median_ms": statistics.median(warm), "p99_ms": warm[int(len(warm) * 0.99) - 1]}


def main() -> int:
    """A line per message."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--most-ms", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, message in examples().items():
        header, *tensors = encode(message)
        found = summary(times_ms(message, arguments.rounds))
        results[name] = {
            **found,
            "header_bytes": len(header),
            "tensor_bytes": sum(map(len, tensors)),
        }
        print(
            f"{name:8s} median {found['median_ms']:.4f} ms, p99 {found['p99_ms']:.4f} ms; "
            f"header {len(header):,} bytes, tensors {results[name]['tensor_bytes']:,} bytes"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(results["segment"]["median_ms"] > arguments.most_ms)


if __name__ == "__main__":
    sys.exit(main())
