"""``flash_attn.ops``: what is named after Triton there."""
