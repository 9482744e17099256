"""Made-up samples of a benchmark."""

from typing import Any

from flowspec.bench.records import Sample, hash_of, hash_tokens


def sample(**changes: Any) -> Sample:
    """Return a sample of 21 tokens in 2 s of decoding, with `changes`, which give its key."""
    values: dict[str, Any] = {
        "cluster": "testbed",
        "model": "vicuna-7b",
        "drafter": "eagle",
        "strategy": "streaming",
        "dataset": "gsm8k",
        "question": "30",
        "turn": 0,
        "temperature": 0.0,
        "seed": 1,
        "stages": 2,
        "table": "main",
        "parameters": {"num_draft_tokens": 60},
        "max_tokens": 32,
        "warm": False,
        "emulated": True,
        "prompt_tokens": 7,
        "tokens": 21,
        "token_hash": hash_tokens(range(21)),
        "mismatch": False,
        "finish": "length",
        "ttft_s": 0.5,
        "decode_s": 2.0,
        "inter_token_ms": {"p50": 0.0, "p95": 180.0, "p99": 250.0},
        "tau": 2.5,
        "runs": (1, 4, 0, 2),
        "alpha": (0.75, 0.66, 0.5),
        "mu": 0.2,
        "mu_not_drafted": 0.15,
        "mu_not_in_flight": 0.05,
        "rows_sent": 200,
        "rows_pruned": 90,
        "rows_wasted": 60,
        "segments": 30,
        "draft_forwards": 25,
        "drafter_busy": 0.3,
        "stage_busy": (0.8, 0.7),
        "stage_idle": ({"waiting for link": 0.2}, {"upstream busy": 0.3}),
        "link_bytes": {"0-1": 4000.0, "1-2": 900000.0},
        "tree_size": 41.5,
        "bound_tokens_per_s": None,
        "bound_share": None,
        "versions": {"flowspec": "0.1.0"},
        "revision": "",
        "host": "here",
        "started_at": "2026-01-01T00:00:00+00:00",
        "code": "c0de",
        "target": "7a26e7",
        "draft": "d2af7",
        "emulation": "e31",
    }
    values |= changes
    speed = (values["tokens"] - 1) / values["decode_s"] if values["decode_s"] else 0.0
    values.setdefault("decode_tokens_per_s", speed)
    whole = values["ttft_s"] + values["decode_s"]
    values.setdefault("end_to_end_tokens_per_s", values["tokens"] / whole)
    values.setdefault("key", hash_of({k: values[k] for k in sorted(values) if k != "started_at"}))
    return Sample(**values)
