"""A tiny random Llama on ``flash_attention_2`` beside "sdpa", as JSON. Run by test_transformers.py:

python -m flash_attn_plus.as_flash_attn test/transformers_llama.py cuda
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

BATCH, LENGTH, STEPS = 4, 192, 20


def make(implementation: str, device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation=implementation,
    )
    return transformers.LlamaForCausalLM(config).to(device, dtype)


def batch(device: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that can be learned (each follows from the one before), and a mask of right padding."""
    tokens = [torch.randint(0, 64, (BATCH,), generator=torch.Generator().manual_seed(step))]
    for _ in range(LENGTH - 1):
        tokens.append((5 * tokens[-1] + 1) % 64)
    tokens = torch.stack(tokens, 1)
    lengths = torch.tensor([LENGTH, LENGTH - 7, LENGTH // 2, 33])
    return tokens.to(device), (torch.arange(LENGTH) < lengths[:, None]).long().to(device)


@torch.no_grad()
def logits(implementation: str, device: str, dtype: torch.dtype, padded: bool) -> torch.Tensor:
    tokens, mask = batch(device, 0)
    model = make(implementation, device, dtype).eval()
    result = model(input_ids=tokens, attention_mask=mask if padded else None, use_cache=False).logits.float()
    return result[mask.bool()] if padded else result


def losses(implementation: str, device: str) -> list[float]:
    model = make(implementation, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    result = []
    for step in range(STEPS):
        tokens, mask = batch(device, step)
        with torch.autocast(device, torch.bfloat16):
            loss = model(
                input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100), use_cache=False
            ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def main(device: str) -> None:
    result: dict[str, object] = {"transformers": transformers.__version__}
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for padded in (False, True):
            exact = logits("eager", device, torch.float32, padded)
            errors = {
                name: (logits(name, device, torch.bfloat16, padded) - exact).abs().max().item()
                for name in ("flash_attention_2", "sdpa")
            }
            result["padded" if padded else "full"] = errors
    names = {event.key for event in seen.key_averages()}
    result["operators"] = sorted(name for name in names if name.startswith("flash_attn_plus::"))
    result["losses"] = {name: losses(name, device) for name in ("flash_attention_2", "sdpa")}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
