"""docs/gpu.md's CUDA graph, captured and replayed by a graph of the CPU's; tests/gpu has the real
one."""

from __future__ import annotations

import pytest
import torch
from cases import make_target
from graph_recipe import capture, on_the_cpu, scaled_backward

import gpl_fast
from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)

SHAPE = (2, 5, 37, 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_replays_on_new_inputs_equal_eager_losses(kind, dtype):
    loss = gpl_fast.GenericPerceptualLoss(5, backend="fast", compute_dtype=dtype)
    logits, target = torch.randn(SHAPE, requires_grad=True), make_target(kind, SHAPE)
    said = []
    with on_the_cpu(said):
        graph, value, gradient = capture()(loss, logits, target)
    assert said == ["side waits for current", "on side", "off", "current waits for side", "capture"]
    assert not value.requires_grad
    for _ in range(3):
        new, other = torch.randn(SHAPE, requires_grad=True), make_target(kind, SHAPE)
        with torch.no_grad():
            logits.copy_(new)
        target.copy_(other)
        graph.replay()
        wanted = loss(new, other)
        wanted.backward()
        assert torch.equal(value, wanted)
        assert torch.equal(gradient, new.grad)


def test_a_student_is_trained_by_the_graph_as_without_it():
    """The page's loop: the loss' gradient goes on into a student."""
    loss = gpl_fast.GenericPerceptualLoss(5, backend="fast")
    images, target = torch.randn(2, 3, 37, 45), make_target("dense", SHAPE)
    first, second = (torch.nn.Conv2d(3, 5, 1) for _ in range(2))
    second.load_state_dict(first.state_dict())
    logits = torch.zeros(SHAPE, requires_grad=True)
    with on_the_cpu([]):
        graph, _, gradient = capture()(loss, logits, target)
    for student, by_graph in ((first, True), (second, False)):
        for _ in range(2):
            out = student(images)
            if by_graph:
                with torch.no_grad():
                    logits.copy_(out)
                graph.replay()
                out.backward(gradient)
            else:
                loss(out, target).backward()
            with torch.no_grad():
                for p in student.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_with_a_scaler_gradients_are_scaled_as_the_loss_would_have_been():
    loss = gpl_fast.GenericPerceptualLoss(5, backend="fast")
    images, target = torch.randn(2, 3, 37, 45), make_target("dense", SHAPE)
    student = torch.nn.Conv2d(3, 5, 1)
    loss(student(images), target).backward()
    wanted = [p.grad.clone() for p in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    optimizer.zero_grad()
    logits = torch.zeros(SHAPE, requires_grad=True)
    with on_the_cpu([]):
        graph, _, gradient = capture()(loss, logits, target)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    out = student(images)
    with torch.no_grad():
        logits.copy_(out)
    graph.replay()
    scaled_backward(out, gradient, scaler)
    scaler.unscale_(optimizer)
    assert all(map(torch.equal, (p.grad for p in student.parameters()), wanted))


def test_a_recipe_that_makes_its_input_anew_is_found_out():
    """Or the graph of the CPU proves nothing."""
    x, graph = torch.ones(3), None
    with on_the_cpu([]):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            right = 2 * x
            wrong = 2 * torch.tensor(x.tolist())
    x.fill_(5)
    graph.replay()
    assert right.tolist() == [10, 10, 10]
    assert wrong.tolist() == [2, 2, 2]
