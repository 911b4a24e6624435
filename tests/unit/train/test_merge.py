"""Merging adapters: the changes that come out are those of PEFT's papers, checked on the products B A themselves."""

import pytest
import torch

from lorafleet.core.errors import AdapterIncompatible, InvalidRequest
from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.train.merge import Method, merge


def adapter(seed: int, rank: int = 4, *, names: tuple[str, ...] = ("unet.x", "unet.y"), alpha: float = 8.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: LowRank(torch.randn(rank, 12, generator=generator), torch.randn(10, rank, generator=generator), alpha)
        for name in names
    }
    return Adapter(modules, name=f"a{seed}", trigger_words=(f"word{seed}",), base_fingerprint="base")


def delta(made: Adapter, name: str = "unet.x") -> torch.Tensor:
    module = made.modules[name]
    return module.scale * module.b @ module.a


def test_svd_of_enough_rank_is_the_weighted_sum() -> None:
    left, right = adapter(1), adapter(2, rank=3, alpha=5.0)
    merged = merge([(left, 0.75), (right, -0.5)], rank=8, name="both")
    for name in ("unet.x", "unet.y"):
        torch.testing.assert_close(delta(merged, name), 0.75 * delta(left, name) - 0.5 * delta(right, name))
    assert (merged.rank, merged.base_fingerprint, merged.trigger_words) == (8, "base", ("word1", "word2"))


def test_svd_of_less_rank_is_the_nearest_there_is() -> None:
    left, right = adapter(1), adapter(2)
    whole = 0.5 * delta(left) + 0.5 * delta(right)
    missed = delta(merge([(left, 0.5), (right, 0.5)], rank=4)) - whole
    values = torch.linalg.svdvals(whole)
    torch.testing.assert_close(missed.norm(), values[4:].norm())  # Eckart-Young


def test_what_only_one_has_is_its_own_change_weighted() -> None:
    merged = merge([(adapter(1, names=("unet.x",)), 0.5), (adapter(2, names=("unet.y",)), 2.0)])
    torch.testing.assert_close(delta(merged, "unet.y"), 2.0 * delta(adapter(2, names=("unet.y",)), "unet.y"))
    assert set(merged.modules) == {"unet.x", "unet.y"}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_leave_half_out(method: Method) -> None:
    left = adapter(1)
    merged = delta(merge([(left, 1.0), (left, 0.0)], method=method, density=0.5, rank=10))  # of full rank
    whole = delta(left)
    kept = merged.abs() > 1e-4
    if method == "ties":  # the largest half
        assert torch.equal(kept, whole.abs() >= whole.abs().flatten().sort().values[60])
        torch.testing.assert_close(merged[kept], 0.5 * whole[kept], atol=1e-4, rtol=1e-4)  # a mean over the two
    else:  # a random half, twice as strong
        assert 0.3 < kept.float().mean() < 0.7
        torch.testing.assert_close(merged[kept], 2 * whole[kept], atol=1e-4, rtol=1e-4)


def test_dare_is_its_seeds() -> None:
    sources = [(adapter(1), 0.5), (adapter(2), 0.5)]
    first, again, other = (merge(sources, method="dare", density=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(delta(first), delta(again))
    assert not torch.equal(delta(first), delta(other))


def test_linear_of_the_same_adapter_is_that_adapter() -> None:
    left = adapter(1)
    merged = merge([(left, 0.25), (left, 0.75)], method="linear")
    assert merged.rank == 4
    # PEFT takes roots of the weights: (sqrt(.25) + sqrt(.75))^2 times the change
    torch.testing.assert_close(delta(merged), (0.25**0.5 + 0.75**0.5) ** 2 * delta(left))


def test_what_cannot_be_merged_is_said() -> None:
    with pytest.raises(AdapterIncompatible, match="linear needs equal ranks, unet.x has 4, 3"):
        merge([(adapter(1), 1.0), (adapter(2, rank=3), 1.0)], method="linear")
    other = Adapter(adapter(2).modules, base_fingerprint="another")
    with pytest.raises(AdapterIncompatible, match="different bases"):
        merge([(adapter(1), 1.0), (other, 1.0)])
    with pytest.raises(InvalidRequest, match="two adapters or more"):
        merge([(adapter(1), 1.0)])
