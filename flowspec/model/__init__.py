"""The decoder: one Llama block for every supported family, and its KV cache."""
