import pytest
import torch

from lorafleet.serve.engine.slots import RowInputs


@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"), [(4096, 640, 640), (77, 2048, 1280), (50, 72, 136), (1, 320, 1280)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rows_get_what_their_adapters_add(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype, tolerance: float
) -> None:
    from lorafleet.serve.engine.slot_kernels import add_low_rank

    draw = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=draw).to(dtype)

    ranks = [0, 3, 64, 16, 17]
    storage = noise(len(ranks), 64, in_features + out_features + 32) / in_features**0.5
    for slot, rank in enumerate(ranks):
        storage[slot, rank:] = 0
    a, b = storage[:, :, None, 8 : 8 + in_features], storage[:, :, None, 16 + in_features :][..., :out_features]
    inputs = RowInputs(8, 4, torch.device("cuda"))
    rows = [[(1, 0.7)], [], [(2, -1.5), (3, 0.3), (4, 1.0), (4, 0.5)], [(0, 2.0)], [(2, 0.0), (3, 1.0)]]
    inputs.write(rows, ranks)
    x, y = noise(len(rows), in_features, tokens).transpose(1, 2), noise(len(rows), tokens, out_features)
    expected = y.double()
    for row, adapters in enumerate(rows):
        for slot, weight in adapters:
            expected[row] += weight * (x[row].double() @ a[slot, :, 0].double().T) @ b[slot, :, 0].double()
    untouched = y[[1, 3]].clone()

    add_low_rank(y, x, a, b, inputs.slots, inputs.weights, inputs.ranks)

    error = (y.double() - expected).norm() / expected.norm()
    assert error < tolerance
    assert torch.equal(y[[1, 3]], untouched)
