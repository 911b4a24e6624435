import pytest
import torch
from torch.nn import functional

from lorafleet.serve.engine.slots import RowInputs, without_adapters

E4M3 = torch.float8_e4m3fn
RANKS = [0, 20, 3, 16]
ROWS = [[(1, 0.7), (2, -1.0)], [], [(3, 0.5)]]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def case(tokens: int, in_features: int, out_features: int, parts: int) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, and what adapters are made of."""
    torch.manual_seed(0)
    apart = in_features + out_features + 8
    storage = (noise(len(RANKS), 24, parts * apart + 16) / in_features**0.5).bfloat16()
    for slot, rank in enumerate(RANKS):
        storage[slot, rank:] = 0
    slots, lines, width = storage.shape
    inputs = RowInputs(4, 2, torch.device("cuda"))
    inputs.write(ROWS, RANKS)

    def view(at: int, features: int) -> torch.Tensor:
        return storage.as_strided((slots, lines, parts, features), (lines * width, width, apart, 1), at)

    x, weight = noise(len(ROWS), tokens, in_features).to(E4M3), noise(parts * out_features, in_features).to(E4M3)
    bias = noise(parts * out_features).bfloat16()
    adapters = view(8, in_features), view(8 + in_features, out_features), inputs.slots, inputs.weights, inputs.ranks
    return x, weight, bias, *adapters


def expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, with_adapters: bool
) -> torch.Tensor:
    """For an x that stands for half of itself, and a weight for a tenth."""
    x = x.double() / 2
    y = x @ weight.double().T / 10 + bias.double()
    for row, adapters in enumerate(ROWS if with_adapters else ()):
        for slot, strength in adapters:
            for part, columns in enumerate(y[row].chunk(a.shape[2], dim=1)):
                columns += strength * (x[row] @ a[slot, :, part].double().T) @ b[slot, :, part].double()
    return y


def scales() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(0.5, device="cuda"), torch.tensor(0.1, device="cuda")


@pytest.mark.parametrize("with_adapters", [True, False])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features", "parts"),
    [(1024, 1280, 1280, 3), (988, 640, 640, 3), (77, 144, 48, 1), (4096, 640, 640, 1)],
)
def test_a_linear_and_its_adapters(
    tokens: int, in_features: int, out_features: int, parts: int, with_adapters: bool
) -> None:
    from lorafleet.serve.engine.fp8_kernels import fp8_linear

    x, weight, bias, a, b, *rows = case(tokens, in_features, out_features, parts)
    wanted = expected(x, weight, bias, a, b, with_adapters)
    x_scale, weight_scale = scales()
    if with_adapters:
        y = fp8_linear(x, x_scale, weight, weight_scale, bias, a, b, *rows)
    else:
        with without_adapters():
            y = fp8_linear(x, x_scale, weight, weight_scale, bias, a, b, *rows)
    assert y.shape == wanted.shape
    assert (y.double() - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("with_adapters", [True, False])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"), [(1024, 1280, 10240), (988, 640, 5120), (9, 64, 96)]
)
def test_a_gated_activation(tokens: int, in_features: int, out_features: int, with_adapters: bool) -> None:
    from lorafleet.serve.engine.fp8_kernels import arranged, fp8_geglu

    x, weight, bias, a, b, *rows = case(tokens, in_features, out_features, 1)
    value, gate = expected(x, weight, bias, a, b, with_adapters).chunk(2, dim=2)
    wanted = value * functional.gelu(gate)
    y_scale = (wanted.abs().amax() / 400).float()
    adapters = [a, b, *rows] if with_adapters else []
    y = fp8_geglu(x, scales()[0], arranged(weight), scales()[1], bias, y_scale, out_features // 2, adapters)
    assert (y.dtype, y.shape) == (E4M3, wanted.shape)
    assert (y.double() * y_scale - wanted).norm() / wanted.norm() < 0.04  # 3 bits of mantissa
