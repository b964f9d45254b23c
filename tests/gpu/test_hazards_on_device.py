"""What is shared between calls, streams, graphs and threads, and what a GPU reads while it is
written: wrong results here would come without an error."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from cases import make_target
from policies import in_force
from test_loss import SMALL, loss_of, run

import gpl_fast
from gpl_fast import ops
from gpl_fast.fast import policy

LARGE = (4, 19, 256, 384)


def inputs(device, kind="dense", shape=SMALL):
    target = make_target(kind, shape)
    if isinstance(target, gpl_fast.TopK):
        target = gpl_fast.TopK(target.values.to(device), target.indices.to(device), target.rest)
    else:
        target = target.to(device)
    return torch.randn(shape, device=device), target


def same(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_weights_packed_on_one_stream_are_there_for_another(cuda, kind, dtype):
    x, target = inputs(cuda, kind)
    x = x.to(dtype)
    wanted = run(loss_of(), x, target)
    loss = loss_of()
    loss.net.weights_on(cuda, dtype)  # what is left are kernels, which wait for nothing
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        loss(x, target)
    with torch.cuda.stream(torch.cuda.Stream()):
        got = run(loss, x, target)
    torch.cuda.synchronize()
    assert same(got, wanted)


def test_weights_that_are_freed_are_read_to_the_end(cuda):
    x, target = inputs(cuda, shape=LARGE)
    wanted = run(loss_of(channels=19), x, target)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(10):
        loss = loss_of(channels=19)
        with torch.cuda.stream(first):
            run(loss, x, target)
        first.synchronize()
        sizes = {t.shape: t.dtype for t in loss.net.cached_tensors()}
        with torch.cuda.stream(second):
            torch.cuda._sleep(50_000_000)
            got = run(loss, x, target)
        del loss
        with torch.cuda.stream(first):  # the stream that the memory was allocated for
            for shape, dtype in sizes.items():
                torch.full(shape, float("nan"), device=cuda, dtype=dtype)
        torch.cuda.synchronize()
        assert same(got, wanted)


@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_a_cold_capture_is_refused_and_a_warm_one_is_right(cuda, kind):
    x, target = inputs(cuda, kind)
    wanted = run(loss_of(), x, target)  # Triton's kernels are compiled
    loss = loss_of()
    refused = pytest.raises(RuntimeError, match="run the loss once before the capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        loss(x, target)
    assert not loss.net.cached_tensors()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(loss, x, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(loss, x, target)
    graph.replay()
    assert same(got, wanted)


def test_the_driver_is_known_and_new_enough(cuda):
    driver = ops.driver_version()
    assert driver is not None
    assert driver[0] >= int(torch.version.cuda.split(".")[0])
    if (reason := ops.cuda_obstacle(cuda)) is not None:
        assert "driver" in reason or "built" in reason or "hold" in reason
    else:
        assert ops.old_driver(cuda) is None


def test_threads_leave_cudnns_switch_alone(device):
    x, target = inputs(device)
    loss = loss_of(pool="avg")
    wanted, got = run(loss, x, target), []

    def work():
        for _ in range(10):
            got.append(run(loss, x, target))

    with torch.backends.cudnn.flags(deterministic=False, allow_tf32=False):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not torch.backends.cudnn.deterministic
    assert len(got) == 40
    assert all(same(each, wanted) for each in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_one_pipelined_tile_gives_the_bits_of_an_unpipelined_one(cuda, kind, dtype):
    """Products that read what is still being written differ from run to run and from those that
    wait. The sums are the same ones, in the same order."""
    torch.backends.cudnn.allow_tf32 = True
    x, target = inputs(cuda, kind, LARGE)
    x = x.to(dtype)
    loss = loss_of(channels=19)
    shipped = [run(loss, x, target) for _ in range(10)]

    class ByPointers(policy.Policy):
        def tile(self, *layer):
            return replace(super().tile(*layer), stages=1, descriptors=False)

    with policy.injected(ByPointers(**vars(in_force("cuda")))):
        plain = run(loss, x, target)
    assert all(same(each, plain) for each in shipped)
