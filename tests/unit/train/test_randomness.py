"""Numbers by key: the same for the same key, unrelated otherwise, whatever stands beside a sample."""

import torch

from lorafleet.train.randomness import KeyedDropout, SampleKeys, hash_bits, key_bits, key_int32, keyed


def test_a_key_says_everything() -> None:
    first = torch.randn(5, generator=keyed(1, "sample", 2, 3))
    assert torch.equal(first, torch.randn(5, generator=keyed(1, "sample", 2, 3)))
    keys = [(1, "sample", 2, 3), (2, "sample", 2, 3), (1, "order", 2, 3), (1, "sample", 23), (1, "sample", 3, 2)]
    assert len({key_bits(*key) for key in keys}) == len(keys)


def dropout(p: float, seed: int = 0) -> KeyedDropout:
    layer = KeyedDropout(p, key_int32(seed, "dropout", "a"), SampleKeys())
    layer.train()
    return layer


def test_a_samples_mask_does_not_depend_on_its_neighbours() -> None:
    layer, x = dropout(0.3), torch.ones(3, 7, 5)
    layer.keys.rows = torch.tensor([11, 22, 33], dtype=torch.int32)
    together = layer(x)
    layer.keys.rows = torch.tensor([22], dtype=torch.int32)
    assert torch.equal(layer(x[1:2])[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_the_wanted_share_is_dropped_and_the_rest_scaled_up() -> None:
    layer, x = dropout(0.1), torch.ones(4, 300, 300)
    layer.keys.rows = torch.arange(4, dtype=torch.int32)
    y = layer(x)
    assert abs((y == 0).float().mean().item() - 0.1) < 0.002  # 4 standard deviations of 360,000 draws
    assert abs(y.mean().item() - 1) < 0.003
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.9))
    layer.eval()
    assert layer(x) is x


def test_neighbouring_keys_and_places_are_uncorrelated() -> None:
    bits = hash_bits(torch.arange(64, dtype=torch.int32), 4096)
    ones = torch.stack([(bits >> shift) & 1 for shift in range(32)]).double()
    assert (ones.mean((1, 2)) - 0.5).abs().max() < 0.005
    low = ones[0] - 0.5
    assert (low[1:] * low[:-1]).mean().abs() < 0.004
    assert (low[:, 1:] * low[:, :-1]).mean().abs() < 0.004
