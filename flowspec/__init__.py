"""FlowSpec: pipeline-parallel speculative decoding for clusters of weak machines, lossless."""

__version__ = "0.1.0"
