"""How many launches a step on a GPU has: counted on tensors without memory, and held."""

from __future__ import annotations

import pytest
import torch

from gpl_fast import cli, ops
from gpl_fast.tools import launches
from gpl_fast.tools.launches import SMALL, Recorder, Workload, launches_around
from gpl_fast.tools.recorder import count_of

# Inside the two operators, with 2 GiB; and around them.
MOST = {"cityscapes": 45, "ade20k": 60, "lvis": 90}
OUTSIDE = {"dense": 12, "labels": 12, "topk": 16}  # whose values become probabilities


def names(recorder: Recorder) -> list[str]:
    return [launch.operator or launch.name for launch in recorder.launches]


def test_the_counter_counts_what_runs_a_kernel():
    x = torch.empty(2, 3, 8, 8, device="meta")
    w = torch.empty(4, 3, 3, 3, device="meta")
    with Recorder() as recorder:
        y = torch.empty_like(x)
        y.zero_()
        y[:, :2].view(2, -1).add_(1)
        y[:, 1] = 3
        z = x.flatten(1).t().contiguous()
        z.detach().reshape(-1).unsqueeze(0).expand(3, -1)
        x.new_zeros(3)
        x.new_empty(3).copy_(x[0, 0, 0, :3])
        torch.conv2d(x, w, padding=1)
        recorder.relu_bwd(x, mask=x, dz=y)
        torch.cat([x, x]).sum(dim=1, dtype=torch.float64)
    assert names(recorder) == [
        "zero_", "add_", "copy_", "clone", "new_zeros", "copy_", "convolution (ATen)", "relu_bwd",
        "cat", "sum",
    ]  # fmt: skip
    small = [launch for launch in recorder.launches if launch.name == SMALL]
    assert len(small) == 8
    assert all(launch.flops == 0 for launch in small)
    # Tensors once: in place, and into another.
    assert small[0].bytes == y.nbytes
    assert small[-1].bytes == 2 * x.nbytes + 2 * 8 * 8 * 2 * 8
    zeros = next(launch for launch in small if launch.operator == "new_zeros")
    assert zeros.bytes == 3 * 4  # not what they are to be like


def test_what_gathers_does_not_read_its_whole_source():
    x, rows = torch.empty(100, 8, device="meta"), torch.empty(3, device="meta", dtype=torch.long)
    with Recorder() as recorder:
        x[rows]
    assert [launch.bytes for launch in recorder.launches] == [2 * 3 * 8 * 4]


def test_convolutions_are_one_launch_whatever_layout_they_come_in():
    x = torch.empty(2, 8, 8, 16, device="meta").permute(0, 3, 1, 2)
    w = torch.empty(4, 16, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)
    with Recorder() as recorder:
        torch.conv2d(x, w, padding=1).permute(0, 2, 3, 1).contiguous()
    assert names(recorder) == ["convolution (ATen)"]


@pytest.mark.parametrize("name", MOST)
def test_a_step_has_few_launches(name):
    forward, backward = launches.launches(launches.WORKLOADS[name], 2048)
    assert 20 < len(forward) + len(backward) <= MOST[name]
    assert [launch.name for launch in forward].count("carry_target_fwd") == 2


@pytest.mark.parametrize("name", launches.WORKLOADS)
@pytest.mark.parametrize("workspace_mb", [640, 1280, 2224])  # the default of 24, 80 and 139 GiB
def test_the_default_workspace_makes_few(name, workspace_mb):
    assert sum(map(len, launches.launches(launches.WORKLOADS[name], workspace_mb))) <= 100


def test_a_launch_more_is_a_chunk_more():
    """What is counted follows the plan: of each chunk the first segment's launches."""
    work = launches.WORKLOADS["ade20k"]
    once, twice = (launches.launches(work, mb) for mb in (4096, 2048))
    there = ["softmax_pack_fwd", "conv_block_fwd"]
    back = ["relu_pool_bwd", "data gradient (ATen)", "softmax_bwd"]
    for few, many, more in zip(once, twice, (there, back), strict=True):
        assert sorted(v.name for v in many) == sorted([*(v.name for v in few), *more])


@pytest.mark.parametrize("kind", OUTSIDE)
def test_few_launches_are_around_the_operators(kind):
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    around = launches_around(kind)
    assert "sum" in around  # the reduction over images
    assert not any(name.startswith("check_") for name in around)  # a GPU is not waited for
    assert 0 < len(around) <= OUTSIDE[kind]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("select_backward", (0, 1)),
        ("slice_backward", (0, 1, 3, 1)),
        ("diagonal_backward", (0, 0, 1)),
    ],
)
def test_a_views_gradient_is_as_many_kernels_as_it_runs(name, args):
    """By the operators that it calls, of which a profile tells."""
    backward = getattr(torch.ops.aten, name).default
    small = {"select_backward": (6,), "slice_backward": (2, 6), "diagonal_backward": (4,)}[name]
    shape = (4, 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        backward(torch.ones(small), shape, *args)
    run = {"aten::zero_", "aten::copy_"}
    calls = sum(event.count for event in watched.key_averages() if event.key in run)
    assert count_of(backward) == calls == 2


def test_a_command_prints_the_count(capsys):
    words = ["bench", "--roofline", "--mine", "2", "5", "64", "64", "--target", "dense"]
    assert cli.main([*words, "--workspace-mb", "2048"]) == 0
    inside = sum(map(len, launches.launches(Workload((2, 5, 64, 64), "dense"), 2048.0)))
    outside = "" if ops.load() else f", {len(launches_around())} outside"
    assert f"launches: {inside} inside{outside}\n" in capsys.readouterr().out
