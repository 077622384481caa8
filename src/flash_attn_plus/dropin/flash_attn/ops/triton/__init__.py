"""``flash_attn.ops.triton``: rotary embeddings."""
