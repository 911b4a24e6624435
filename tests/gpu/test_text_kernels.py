import pytest
import torch
from torch.nn import functional


@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "features", "keys"),
    [(2, 1024, 20, 64, 77), (16, 1000, 20, 64, 77), (3, 50, 4, 32, 40), (1, 1, 1, 128, 128)],
)
def test_attention_to_a_prompt(rows: int, tokens: int, heads: int, features: int, keys: int) -> None:
    from lorafleet.serve.engine.text_kernels import attend_to_text

    torch.manual_seed(0)
    q = torch.randn(rows, tokens, heads * features, device="cuda").bfloat16()
    stored = torch.randn(rows + 1, 2, keys, heads * features, device="cuda").bfloat16()
    k, v = stored[:rows, 0], stored[:rows, 1]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.double().view(rows, -1, heads, features).transpose(1, 2)

    expected = functional.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v)).transpose(1, 2).flatten(2)
    y = attend_to_text(q, k, v, heads, None)
    assert (y.dtype, y.shape) == (q.dtype, q.shape)
    assert (y - expected).norm() / expected.norm() < 1e-2
    scale = (expected.abs().amax() / 400).float()
    y = attend_to_text(q, k, v, heads, scale)
    assert y.dtype == torch.float8_e4m3fn
    assert (y.double() * scale - expected).norm() / expected.norm() < 0.04  # 3 bits of mantissa
    clamped = attend_to_text(q, k, v, heads, scale / 8)
    assert clamped.float().abs().max() == 448
