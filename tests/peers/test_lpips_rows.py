"""The rows of LPIPS in `make bench`: benchmarks/peer_losses.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gate
import peer_losses
import providers
import report
import run
import sweeps

from gpl_fast.tools import measure

EAGER = [name for name in peer_losses.PROVIDERS if name not in sweeps.COMPILED]
SHAPE = (2, 3, 64, 48)


def test_images_are_in_range_and_near_their_targets():
    pred, target = providers.make_inputs(SHAPE, "images")
    assert pred.shape == target.shape == SHAPE
    assert -1 <= pred.min() < pred.max() <= 1
    assert -1 <= target.min() < target.max() <= 1
    assert 0 < (pred - target).abs().mean() < 0.2


def test_all_providers_give_one_value():
    made = {name: peer_losses.PROVIDERS[name]() for name in EAGER}
    found = gate.errors(made, *providers.make_inputs(SHAPE, "images"), providers.LPIPS)
    assert set(found) == set(EAGER)
    assert not gate.complaints(found)


def bytes_of_a_pixel(name, shape=(1, 3, 128, 128)):
    provider = peer_losses.PROVIDERS[name]()
    inputs = providers.make_inputs(shape, "images")
    measure.step(provider, *inputs)
    _, saved = measure.memory(provider, *inputs, provider.weights)
    return saved / (shape[0] * shape[2] * shape[3])


def test_bytes_that_are_kept_for_the_backward():
    """One tensor a tap in the compute dtype, bits of ReLUs and pools; of lpips what its operators
    are, of which ours keeps a quarter, in bfloat16 an eighth."""
    theirs = bytes_of_a_pixel("eager-fp32")
    assert theirs == pytest.approx(2439, rel=1e-3)
    for name, size in (("gpl_fast-fp32", 4), ("gpl_fast-bf16", 2)):
        ours = bytes_of_a_pixel(name)
        assert ours == 15 + 33.75 + 122 * size
        assert ours <= theirs / (16 / size)


def test_the_sweep_runs(monkeypatch, tmp_path):
    words = ["--sweep", "lpips", "--dry", "--no-memory", "--out", str(tmp_path / "rows.csv")]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    monkeypatch.setattr(run, "hopeless", set)
    assert run.main() == 0
    rows = report.read_csv(tmp_path / "rows.csv")
    cases = [case.on_few_pixels() for case in sweeps.SWEEPS["lpips"]]
    assert [row["provider"] for row in rows] == EAGER * len(cases)
    assert {report.sizes_of(row)[1] for row in rows} == {3}
    for row in rows:
        assert row["net"] == providers.LPIPS
        assert row["value_error"] < 0.2
        assert row["seconds_median"] > 0


def test_nothing_of_the_package_is_trained():
    assert not any(p.requires_grad for p in peer_losses.peer().parameters())
    assert peer_losses.peer() is peer_losses.peer()
    state = torch.get_rng_state()
    peer_losses.peer.cache_clear()
    peer_losses.peer()
    assert torch.equal(torch.get_rng_state(), state)
