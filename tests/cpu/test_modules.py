"""The losses as modules: state, copies, processes, layouts, autograd, the totals by hand.

Every property holds on each backend that runs on this machine (`cases.BACKENDS`).
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import NARROW, error, make_target, value_and_grad
from torch import nn
from torch.utils.checkpoint import checkpoint

import gpl_fast
from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss

C, H, W = 5, 37, 45
KINDS = ("dense", "labels", "topk", "features")
# The same arithmetic on another layout or in another order of sums.
SAME = 1e-4


def make_loss(backend="auto", channels=C, **options):
    return GenericPerceptualLoss(channels, widths=NARROW, backend=backend, **options)


def make_perceptual(backend="auto", **options):
    net = LossNet.vgg(C, (2, 2), widths=(4, 8))
    layers = {"feature_layers": {"relu2_2": 1.0}, "style_layers": {"relu1_2": 3.0, "relu2_2": 2.0}}
    return PerceptualLoss(net, **{**layers, "tv_weight": 0.5, "backend": backend, **options})


def all_losses(backend="auto"):
    total = SegmentationLoss(C, widths=NARROW, backend=backend, class_weight=[1, 2, 3, 4, 5])
    return {"gpl": make_loss(backend), "seg": total, "perceptual": make_perceptual(backend)}


LOSSES = tuple(all_losses())


def make_inputs(n=2):
    """Logits and labels with some pixels of 255."""
    labels = torch.randint(C, (n, H, W))
    labels[:, :4, 7:20] = 255
    return torch.randn(n, C, H, W), labels


def inputs_of(name):
    """Positional arguments for the loss called `name`: prediction, target."""
    logits, labels = make_inputs()
    return (logits, labels) if name == "seg" else (logits, torch.randn(2, C, H, W))


# ------------------------------------------------------------------------------------ module state


@pytest.mark.parametrize("name", LOSSES)
def test_holds_no_state(backend, name):
    loss = all_losses(backend)[name]
    for _ in range(2):  # before and after the weights are cached
        assert loss.state_dict() == {}
        assert list(loss.parameters()) == []
        assert list(loss.buffers()) == []
        loss(*inputs_of(name))
    loss.load_state_dict({})
    model = nn.Sequential(nn.Conv2d(3, C, 1))
    model.loss = loss
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "to": lambda loss: loss.to("cpu").to(torch.float64).to(memory_format=torch.channels_last),
    "half": lambda loss: loss.half(),
    "train": lambda loss: loss.eval().train(),
    "eval": lambda loss: loss.eval(),
    "requires_grad_": lambda loss: loss.requires_grad_(True),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", LOSSES)
def test_copies_and_casts_change_nothing(backend, name, how):
    loss, args = all_losses(backend)[name], inputs_of(name)
    value, grad = value_and_grad(loss, *args)
    other = COPIES[how](loss)
    assert other.fingerprint() == loss.fingerprint()
    again, grad_again = value_and_grad(other, *args)
    assert torch.equal(again, value)
    assert torch.equal(grad_again, grad)


def test_pickles_hold_no_cached_weights():
    loss = make_loss()
    small = len(pickle.dumps(loss))
    loss(torch.randn(1, C, 32, 32), torch.randn(1, C, 32, 32))
    assert len(pickle.dumps(loss)) <= small + 200  # the fingerprint may be remembered


def test_the_global_generator_is_neither_read_nor_advanced():
    before = torch.get_rng_state()
    first = make_loss().fingerprint()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert make_loss().fingerprint() == first
    assert make_loss(seed=1).fingerprint() != first


@pytest.mark.parametrize("name", LOSSES)
def test_is_deterministic(backend, name):
    loss, args = all_losses(backend)[name], inputs_of(name)
    value, grad = value_and_grad(loss, *args)
    for _ in range(3):
        again, grad_again = value_and_grad(all_losses(backend)[name], *args)
        assert torch.equal(again, value)
        assert torch.equal(grad_again, grad)


# --------------------------------------------------------------------------------- other processes

_IN_ANOTHER_PROCESS = """
import torch, gpl_fast
torch.set_num_threads({threads})
generator = torch.Generator().manual_seed(3)
x, y = torch.randn(2, 1, 5, 37, 45, generator=generator)
loss = gpl_fast.GenericPerceptualLoss(5, widths={widths}, backend={backend!r})
print(loss.fingerprint(), float(loss(x, y)).hex())
"""


def test_same_value_and_fingerprint_in_another_process(backend):
    code = _IN_ANOTHER_PROCESS.format(
        threads=torch.get_num_threads(), widths=NARROW, backend=backend
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 1, C, H, W, generator=generator)
    loss = make_loss(backend)
    assert run.stdout.split() == [loss.fingerprint(), float(loss(x, y)).hex()]


class Student(nn.Module):
    """A model that holds its loss inside, as distributed training often does."""

    def __init__(self, seed):
        super().__init__()
        self.head = nn.Conv2d(3, C, 1)
        self.loss = make_loss(seed=seed)

    def forward(self, image, target):
        return self.loss(self.head(image), target)


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 3, 32, 32, generator=generator)
    target = torch.randint(C, (1, 32, 32), generator=generator)
    torch.manual_seed(rank)  # DDP has to broadcast the head, the loss must agree by itself
    found = {}
    for case, seed in (("same", 0), ("own", rank)):
        ddp = nn.parallel.DistributedDataParallel(Student(seed))
        value = ddp(image, target)
        value.backward()
        grad = ddp.module.head.weight.grad
        found[case] = (ddp.module.loss.fingerprint(), value.item(), grad, list(ddp.buffers()))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    del ddp
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_ddp_broadcasts_nothing_and_ranks_agree(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["same"][0] == second["same"][0] == make_loss().fingerprint()
    assert first["same"][1] == second["same"][1]
    assert torch.equal(first["same"][2], second["same"][2])
    assert first["same"][3] == []
    # A loss of another seed on rank 1 stays what it is: nothing is sent over it.
    assert first["own"][0] != second["own"][0] == make_loss(seed=1).fingerprint()


# ----------------------------------------------------------------------------------------- layouts


def _sliced(x):
    """The same values at every second channel and between two columns more."""
    big = torch.full((x.shape[0], 2 * C, H, W + 2), 9.0)
    big[:, ::2, :, 1:-1] = x
    return big[:, ::2, :, 1:-1]


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": _sliced,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_layout_of_the_prediction(backend, name, layout):
    loss, (pred, *args) = all_losses(backend)[name], inputs_of(name)
    value, grad = value_and_grad(loss, pred, *args)
    x = LAYOUTS[layout](pred)
    assert not x.is_contiguous()
    value_x, grad_x = value_and_grad(loss, x, *args)
    torch.testing.assert_close(value_x, value)
    assert error(grad_x, grad) < SAME
    if x.is_contiguous(memory_format=torch.channels_last):
        assert grad_x.is_contiguous(memory_format=torch.channels_last)
    else:
        assert grad_x.is_contiguous()
    assert grad.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["dense", "labels", "topk"])
def test_layout_of_the_target(backend, kind, layout):
    loss = make_loss(backend)
    pred, target = torch.randn(2, C, H, W), make_target(kind, (2, C, H, W))
    if kind == "topk":
        reorder = LAYOUTS["channels_last" if layout == "sliced" else layout]
        other = gpl_fast.TopK(reorder(target.values), reorder(target.indices))
    elif kind == "labels":
        other = target.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        other = LAYOUTS[layout](target)
    value, grad = value_and_grad(loss, pred, target)
    value_other, grad_other = value_and_grad(loss, pred, other)
    torch.testing.assert_close(value_other, value)
    assert error(grad_other, grad) < SAME


def test_expanded_prediction_and_target(backend):
    loss = make_loss(backend)
    row = torch.randn(1, C, 1, W, requires_grad=True)
    target = make_target("dense", (1, C, H, W)).expand(3, -1, -1, -1)
    x = row.expand(3, C, H, W)
    (grad,) = torch.autograd.grad(loss(x, target), row)
    _, full = value_and_grad(loss, x.contiguous(), target.contiguous())
    assert error(grad, full.sum(dim=(0, 2), keepdim=True)) < SAME


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("channel", [False, True], ids=("NHW", "N1HW"))
def test_labels_of_any_integer_dtype(backend, dtype, channel):
    loss, pred = make_loss(backend), torch.randn(2, C, H, W)
    labels = make_target("labels", (2, C, H, W))
    other = labels.to(dtype).unsqueeze(1) if channel else labels.to(dtype)
    assert torch.equal(loss(pred, other), loss(pred, labels))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_callers_is_written_to(backend, kind):
    loss = make_loss(backend, reduction="none", ignore_index=255)
    pred, target = torch.randn(2, C, H, W), make_target(kind, (2, C, H, W), loss)
    mask = None if kind == "features" else torch.rand(2, H, W) > 0.2
    if kind == "labels":
        target[0, 0, 0] = 255
    tensors = {"pred": pred, "mask": mask, "incoming": torch.rand(2)}
    if kind == "topk":
        tensors |= {"values": target.values, "indices": target.indices}
    elif kind == "features":
        tensors |= dict(target.features)
    else:
        tensors["target"] = target
    tensors = {k: t for k, t in tensors.items() if t is not None}
    before = {k: (t.clone(), t._version) for k, t in tensors.items()}
    pred.requires_grad_()
    loss(pred, target, mask).backward(tensors["incoming"])
    for name, t in tensors.items():
        assert torch.equal(t, before[name][0]), name
        assert t._version == before[name][1], name


def test_segmentation_writes_to_nothing_of_the_callers(backend):
    weight = torch.rand(C)
    total = SegmentationLoss(C, widths=NARROW, backend=backend, class_weight=weight)
    logits, labels = make_inputs()
    teacher, mask = torch.randn(2, C, H, W), torch.rand(2, H, W) > 0.2
    tensors = (logits, labels, teacher, mask, weight)
    before = [t.clone() for t in tensors]
    total(logits.requires_grad_(), labels, teacher, mask).backward(torch.tensor(3.0))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_the_target_never_gets_a_gradient(backend, kind):
    source = torch.rand(2, C, H, W, requires_grad=True)
    target = source * 2
    if kind == "topk":
        values, indices = source.topk(2, dim=1)
        target = gpl_fast.TopK(values, indices)
    pred = torch.randn(2, C, H, W, requires_grad=True)
    make_loss(backend)(pred, target).backward()
    assert source.grad is None
    assert pred.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_activation_checkpointing(backend, name, reentrant):
    loss, (pred, *args) = all_losses(backend)[name], inputs_of(name)
    value, grad = value_and_grad(loss, pred, *args)
    x = pred.requires_grad_()
    again = checkpoint(loss, x, *args, use_reentrant=reentrant)
    again.backward()
    assert torch.equal(again.detach(), value)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_accumulate(backend, name):
    loss, (pred, *args) = all_losses(backend)[name], inputs_of(name)
    _, grad = value_and_grad(loss, pred, *args)
    x = pred.requires_grad_()
    loss(x, *args).backward()
    first = x.grad
    loss(x, *args).backward()
    assert x.grad is first
    torch.testing.assert_close(x.grad, 2 * grad)


@pytest.mark.parametrize("name", LOSSES)
def test_backward_twice_through_a_retained_graph(backend, name):
    loss, (pred, *args) = all_losses(backend)[name], inputs_of(name)
    x = pred.requires_grad_()
    value = loss(x, *args)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, x)
    assert torch.equal(first, kept)
    assert torch.equal(second, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, x)


def test_incoming_gradient_scales_each_image(backend):
    loss, pred = make_loss(backend, reduction="none"), torch.randn(3, C, H, W)
    target = make_target("labels", (3, C, H, W))
    _, grad = value_and_grad(loss, pred, target)
    x = pred.requires_grad_()
    (scaled,) = torch.autograd.grad(loss(x, target), x, torch.tensor([2.0, 0.0, -1.0]))
    torch.testing.assert_close(scaled, grad * torch.tensor([2.0, 0.0, -1.0]).view(3, 1, 1, 1))


@pytest.mark.parametrize("name", LOSSES)
def test_saved_tensors_on_the_cpu(backend, name):
    loss, args = all_losses(backend)[name], inputs_of(name)
    value, grad = value_and_grad(loss, *args)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    x = args[0].clone().requires_grad_()
    with (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()),
    ):
        saved = loss(x, *args[1:])
    saved.backward()
    assert packed
    assert torch.equal(saved.detach(), value)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("name", LOSSES)
def test_double_backward_is_refused_with_a_way_out(backend, name):
    loss, (pred, *args) = all_losses(backend)[name], inputs_of(name)
    x = pred.requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, *args), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*create_graph"):
        grad.square().sum().backward()


def test_no_grad_and_inference_mode_give_the_same_value(backend):
    loss, args = make_loss(backend), inputs_of("gpl")
    with torch.inference_mode():
        inferred = make_loss(backend)(*args)
        first = loss(*args)  # the weights are cached here first
    with torch.no_grad():
        assert torch.equal(loss(*args), inferred)
    value, grad = value_and_grad(loss, *args)
    assert torch.equal(value, first)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("compute", [torch.float32, None], ids=["float32", "float16"])
def test_float16_gradient_needs_and_survives_a_scaler(backend, compute):
    net = LossNet.vgg(C)  # at full width features are of order one, as in training
    logits, target = torch.randn(2, C, 64, 64).half(), make_target("labels", (2, C, 64, 64))
    options = {"level_weights": (0, 0, 0, 0, 0.01)}  # gradients of 1e-7, as of a large batch
    # Float32 of the same logits takes the same pool winners, whatever the CPU; float64 may not.
    unrounded = GenericPerceptualLoss(C, net, backend=backend, **options)
    _, truth = value_and_grad(unrounded, logits.float(), target)
    loss = GenericPerceptualLoss(C, net, backend=backend, compute_dtype=compute, **options)
    parameter = nn.Parameter(logits.float())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss(parameter.half(), target)).backward()
    scaler.unscale_(optimizer)
    scaled = error(parameter.grad, truth)
    # float16 rounds a gradient to 11 bits; its own chain also picks other winners now and then.
    assert scaled < (1e-3 if compute else 0.1)
    scaler.step(optimizer)  # a non-finite gradient would skip the step and halve the scale
    scaler.update()
    assert scaler.get_scale() == 2.0**16
    assert not torch.equal(parameter.detach(), logits.float())
    if compute:
        assert error(value_and_grad(loss, logits, target)[1], truth) > 10 * scaled  # unscaled


# ----------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiles(loss, *args, backend="aot_eager"):
    """One graph without breaks, that gives the same value and gradient."""
    value, grad = value_and_grad(loss, *args)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    value_c, grad_c = value_and_grad(compiled, *args)
    assert value_c.dtype == value.dtype
    torch.testing.assert_close(value_c, value)
    assert error(grad_c, grad) < SAME


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=("all", "mask"))
def test_compile(backend, dynamo, kind, masked):
    loss = make_loss(backend, net="1,1,1")
    mask = torch.rand(2, H, W) > 0.3 if masked else None
    target = make_target(kind, (2, C, H, W), loss)
    if kind == "features":
        target = loss.encode(torch.randn(2, C, H, W), mask)
    assert_compiles(loss, torch.randn(2, C, H, W), target, mask)


def test_compile_segmentation(backend, dynamo):
    total = make_total(backend, net="1,1,1", class_weight=[1, 2, 3, 4, 5])
    logits, labels = make_inputs()
    assert_compiles(total, logits, labels)
    assert_compiles(total, logits, labels, torch.randn(2, C, H, W), torch.rand(2, H, W) > 0.2)


def test_compile_perceptual(backend, dynamo):
    pred, target = torch.randn(2, 2, C, H, W)
    assert_compiles(make_perceptual(backend), pred, target, torch.randn(1, C, 20, 30))


def test_compile_under_autocast(backend, dynamo):
    loss = make_loss(backend, net="1,1,1")

    def step(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(x, y)

    x, y = torch.randn(2, 2, C, H, W)
    assert_compiles(step, x, y)
    plain, half = value_and_grad(loss, x, y)[1], value_and_grad(step, x, y)[1]
    assert not torch.equal(plain, half)  # autocast does reach the loss
    assert half.dtype == torch.float32


def test_compile_inside_a_model_that_trains(backend, dynamo):
    model = Student(0)
    model.loss = make_loss(backend, net="1,1,1")
    image, labels = torch.randn(1, 3, 32, 32), torch.randint(C, (1, 32, 32))
    model(image, labels).backward()
    grad = model.head.weight.grad.clone()
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(image, labels).backward()
    assert error(model.head.weight.grad, grad) < SAME


def test_compile_keeps_errors(backend, dynamo):
    loss = make_loss(backend, net="1,1")
    logits, labels = make_inputs()
    compiled = torch.compile(loss, backend="aot_eager")
    with pytest.raises(ValueError, match="ignore_index="):  # 255 is no class of this loss
        compiled(logits, labels)
    with pytest.raises(ValueError, match=r"expected \(N, 5, H, W\)"):
        compiled(logits[:, :3], labels)
    torch._dynamo.reset()
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="ignore_index="):
        whole(logits, labels)
    with pytest.raises(Exception, match=r"expected \(N, 5, H, W\)"):  # dynamo's own wrapper
        whole(logits[:, :3], labels)


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
    reason="Inductor needs a C++ compiler",
)
@pytest.mark.slow
def test_compile_with_inductor(backend, dynamo):
    loss = make_loss(backend, net="1", channels=3)
    assert_compiles(loss, torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), backend="inductor")


# -------------------------------------------------------------------------------- SegmentationLoss


def by_hand(logits, labels, target, *, gpl_weight=0.1, mask=None, gpl_mask=None, **ce):
    """The paper's eq. (2) from F.cross_entropy and GenericPerceptualLoss."""
    if mask is not None:
        labels = torch.where(mask, labels, 255)
    reference = make_loss("reference", ignore_index=255)
    perceptual = reference(logits, target, gpl_mask)
    return F.cross_entropy(logits, labels, ignore_index=255, **ce) + gpl_weight * perceptual


def make_total(backend, **options):
    return SegmentationLoss(C, widths=NARROW, backend=backend, **options)


CE_OPTIONS = {
    "plain": {},
    "weights": {"class_weight": torch.tensor([1.0, 2.0, 0.0, 4.0, 0.5])},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weight": torch.tensor([1.0, 2.0, 0.0, 4.0, 0.5]), "label_smoothing": 0.3},
}


@pytest.mark.parametrize("options", CE_OPTIONS)
@pytest.mark.parametrize("masked", [False, True], ids=("all", "mask"))
def test_total_is_cross_entropy_plus_the_loss(backend, options, masked):
    options = CE_OPTIONS[options]
    total = make_total(backend, gpl_weight=0.7, **options)
    logits, labels = make_inputs()
    mask = torch.rand(2, H, W) > 0.3 if masked else None
    ce = {"weight": options.get("class_weight")}
    ce["label_smoothing"] = options.get("label_smoothing", 0.0)
    value, grad = value_and_grad(total, logits, labels, mask=mask)
    truth, grad_truth = value_and_grad(
        lambda x: by_hand(x, labels, labels, gpl_weight=0.7, mask=mask, gpl_mask=mask, **ce), logits
    )
    torch.testing.assert_close(value, truth)
    assert error(grad, grad_truth) < SAME


def test_weights_of_the_two_terms(backend):
    logits, labels = make_inputs()
    ce = F.cross_entropy(logits, labels, ignore_index=255)
    only_ce = make_total(backend, gpl_weight=0)(logits, labels)
    only_gpl = make_total(backend, ce_weight=0)(logits, labels)
    torch.testing.assert_close(only_ce, ce)
    expected = 0.1 * make_loss("reference", ignore_index=255)(logits, labels)
    torch.testing.assert_close(only_gpl, expected)
    both = make_total(backend, ce_weight=2.0, gpl_weight=0.5)(logits, labels)
    torch.testing.assert_close(both, 2 * only_ce + 5 * only_gpl)


def test_ignore_index_explicit_and_none(backend):
    logits, labels = make_inputs()
    moved = torch.where(labels == 255, -7, labels)
    auto = make_total(backend)(logits, labels)
    assert torch.equal(make_total(backend, ignore_index=-7)(logits, moved), auto)
    with pytest.raises(ValueError, match="255"):
        make_total(backend, ignore_index=None)(logits, labels)
    clean = torch.where(labels == 255, 0, labels)
    none = make_total(backend, ignore_index=None)(logits, clean)
    torch.testing.assert_close(none, by_hand(logits, clean, clean))
    # A class may be the ignored one.
    first = make_total(backend, ignore_index=0)(logits, clean)
    marked = clean.masked_fill(clean == 0, 255)
    torch.testing.assert_close(first, make_total(backend)(logits, marked))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_are_one_mean_per_image(backend, reduction, weighted):
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5]) if weighted else None
    logits, labels = make_inputs()
    labels[0, :20] = 255  # the images hold different numbers of valid pixels
    total = make_total(backend, reduction=reduction, class_weight=weight)
    images = zip(logits.split(1), labels.split(1), strict=True)
    each = torch.stack([by_hand(x, y, y, weight=weight) for x, y in images])
    torch.testing.assert_close(total(logits, labels), each if reduction == "none" else each.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["ignored", "mask", "no images"])
def test_nothing_valid_is_zero_and_connected(backend, reduction, how):
    logits, labels = make_inputs()
    mask = torch.zeros(2, H, W, dtype=torch.bool) if how == "mask" else None
    labels = torch.full_like(labels, 255) if how == "ignored" else labels.clamp(max=C - 1)
    if how == "no images":
        logits, labels = logits[:0], labels[:0]
    total = make_total(backend, reduction=reduction, class_weight=[1, 2, 3, 4, 5])
    value, grad = value_and_grad(total, logits, labels, mask=mask)
    assert value.shape == ((len(logits),) if reduction == "none" else ())
    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(grad, torch.zeros_like(logits))


def test_one_empty_image_does_not_spoil_the_others(backend):
    logits, labels = make_inputs()
    labels[0] = 255
    value, grad = value_and_grad(make_total(backend, reduction="none"), logits, labels)
    assert value[0] == 0
    assert value[1] > 0
    assert grad[0].abs().max() == 0
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("invalid", ["ignored", "mask"])
def test_nan_and_inf_at_pixels_that_do_not_count(backend, invalid):
    logits, labels = make_inputs()
    labels[:, :4, 7:20] = 255 if invalid == "ignored" else 0
    mask = None if invalid == "ignored" else torch.ones(2, H, W, dtype=torch.bool)
    if mask is not None:
        mask[:, :4, 7:20] = False
    value, grad = value_and_grad(make_total(backend), logits, labels, mask=mask)
    logits[:, :, :4, 7:20] = float("nan")
    logits[:, 0, :4, 7:12] = float("inf")
    value_nan, grad_nan = value_and_grad(make_total(backend), logits, labels, mask=mask)
    torch.testing.assert_close(value_nan, value)
    torch.testing.assert_close(grad_nan, grad)
    assert grad_nan[:, :, :4, 7:20].abs().max() == 0


@pytest.mark.parametrize("gpl_ignore", ["auto", True, False])
@pytest.mark.parametrize("teacher", [False, True], ids=("labels", "teacher"))
def test_gpl_ignore(backend, gpl_ignore, teacher):
    logits, labels = make_inputs()
    soft = torch.randn(2, C, H, W) if teacher else None
    total = make_total(backend, gpl_ignore=gpl_ignore, gpl_weight=1.0)
    got = total(logits, labels, teacher=soft, return_parts=True)["loss_gpl"]
    counted = labels != 255
    leaves = gpl_ignore is True or (gpl_ignore == "auto" and not teacher)
    target = soft
    if not teacher:  # the map by definition: a label that is ignored is a zero pixel
        target = F.one_hot(labels.clamp(max=C - 1), C).permute(0, 3, 1, 2) * counted.unsqueeze(1)
        target = target.float()
    plain = make_loss("reference", target_activation="same" if teacher else "none")
    torch.testing.assert_close(got, plain(logits, target, counted if leaves else None))
    other = plain(logits, target, None if leaves else counted)
    assert not torch.isclose(got, other, rtol=1e-4)  # the two readings do differ


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_of_each_kind(backend, kind):
    total = make_total(backend)
    logits, labels = make_inputs()
    teacher = make_target(kind, (2, C, H, W), total)
    value, grad = value_and_grad(total, logits, labels, teacher=teacher)
    truth, grad_truth = value_and_grad(lambda x: by_hand(x, labels, teacher), logits)
    torch.testing.assert_close(value, truth)
    assert error(grad, grad_truth) < SAME
    assert not torch.isclose(value, total(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_parts_sum_to_the_value(backend, kind, reduction):
    total = make_total(backend, reduction=reduction)
    logits, labels = make_inputs()
    teacher = None if kind is None else make_target(kind, (2, C, H, W), total)
    value, grad = value_and_grad(total, logits, labels, teacher)
    x = logits.clone().requires_grad_()
    parts = total(x, labels, teacher, return_parts=True)
    assert set(parts) == {"loss_ce", "loss_gpl"}
    torch.testing.assert_close(sum(parts.values()).detach(), value)
    sum(parts.values()).sum().backward()
    assert error(x.grad, grad) < SAME
    # Each part has a gradient of its own.
    x.grad = None
    parts = total(x, labels, teacher, return_parts=True)
    parts["loss_ce"].sum().backward(retain_graph=True)
    alone = make_total(backend, reduction=reduction, gpl_weight=0)
    assert error(x.grad, value_and_grad(alone, logits, labels, teacher)[1]) < SAME


@pytest.mark.parametrize("size", [(12, 15), (37, 23)])
@pytest.mark.parametrize("teacher", [False, True], ids=("labels", "teacher"))
def test_logits_smaller_than_the_labels(backend, size, teacher):
    _, labels = make_inputs()
    small = torch.randn(2, C, *size)
    target = torch.randn(2, C, *size) if teacher else None  # a teacher may be small too

    def resized(x):
        full = F.interpolate(x, (H, W), mode="bilinear", align_corners=False)
        return by_hand(full, labels, labels if target is None else target)

    value, grad = value_and_grad(make_total(backend), small, labels, teacher=target)
    truth, grad_truth = value_and_grad(resized, small)
    torch.testing.assert_close(value, truth)
    assert grad.shape == small.shape
    assert error(grad, grad_truth) < SAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_value_and_gradient(backend, dtype):
    if backend == "fast" and dtype == torch.float64:
        backend = "auto"
    logits, labels = make_inputs()
    value, grad = value_and_grad(make_total(backend), logits.to(dtype), labels)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    truth = by_hand(logits.to(dtype).double(), labels, labels)
    assert error(value, truth) < {torch.float64: 1e-6}.get(dtype, 1e-2)


# ---------------------------------------------------------------------------------- PerceptualLoss


def gram(e):
    _, c, h, w = e.shape
    return torch.einsum("nchw,ndhw->ncd", e, e) / (c * h * w)


def taps_by_hand(net, x):
    """relu1_2 and relu2_2 of a 2,2 network, from its weights."""
    w = net.weights
    x = torch.relu(F.conv2d(x, w["conv1_1"], padding=1))
    first = torch.relu(F.conv2d(x, w["conv1_2"], padding=1))
    x = torch.relu(F.conv2d(F.max_pool2d(first, 2), w["conv2_1"], padding=1))
    return first, torch.relu(F.conv2d(x, w["conv2_2"], padding=1))


def perceptual_by_hand(net, x, y, style):
    """Each part, (N,), with the weights of `make_perceptual`."""
    (a1, a2), (_, b2), (s1, s2) = (taps_by_hand(net, t) for t in (x, y, style))
    feature = (a2 - b2).square().mean(dim=(1, 2, 3))
    style1 = (gram(a1) - gram(s1)).square().sum(dim=(1, 2))
    style2 = (gram(a2) - gram(s2)).square().sum(dim=(1, 2))
    down = (x[:, :, 1:] - x[:, :, :-1]).square().mean(dim=(1, 2, 3))
    right = (x[..., 1:] - x[..., :-1]).square().mean(dim=(1, 2, 3))
    return {
        "loss_feature": feature,
        "loss_style": 3 * style1 + 2 * style2,
        "loss_tv": 0.5 * (down + right),
    }


STYLES = {
    "the target": None,
    "another size": (2, C, 20, 61),
    "one for the batch": (1, C, H, W),
    "one of another size": (1, C, 52, 18),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_perceptual_parts_by_hand(backend, style, reduction):
    loss = make_perceptual(backend, return_parts=True, reduction=reduction)
    pred, target = torch.randn(2, 2, C, H, W)
    style = None if STYLES[style] is None else torch.randn(STYLES[style])
    x = pred.clone().requires_grad_()
    parts = loss(x, target, style)
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda v: v}[reduction]
    z = pred.clone().requires_grad_()
    truth = perceptual_by_hand(loss.net, z, target, target if style is None else style)
    assert set(parts) == set(truth)
    for name, part in parts.items():
        torch.testing.assert_close(part, reduce(truth[name]), msg=name)
        (grad,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        (grad_truth,) = torch.autograd.grad(reduce(truth[name]).sum(), z, retain_graph=True)
        assert error(grad, grad_truth) < SAME, name
    whole = make_perceptual(backend, reduction=reduction)(pred, target, style)
    torch.testing.assert_close(whole, sum(parts.values()).detach())


def test_perceptual_total_variation_alone(backend):
    loss = make_perceptual(backend, feature_layers={}, style_layers={})
    pred = torch.randn(2, C, H, W)
    value, grad = value_and_grad(loss, pred, torch.randn(2, C, H, W))
    truth, grad_truth = value_and_grad(
        lambda x: perceptual_by_hand(loss.net, x, x, x)["loss_tv"].mean(), pred
    )
    torch.testing.assert_close(value, truth)
    assert error(grad, grad_truth) < SAME
    flat = torch.full((1, C, H, W), 3.0)
    assert loss(flat, flat) == 0


def test_perceptual_of_a_target_with_itself_is_zero(backend):
    loss = make_perceptual(backend, tv_weight=0.0)
    x = torch.randn(2, C, H, W)
    value, grad = value_and_grad(loss, x, x.clone())
    assert value == 0
    assert grad.abs().max() == 0


def test_perceptual_encoded_target_and_style(backend):
    loss = make_perceptual(backend)
    pred, target = torch.randn(2, 2, C, H, W)
    style = torch.randn(1, C, 20, 30)
    encoded = loss(pred, loss.encode(target), loss.encode(style))
    torch.testing.assert_close(encoded, loss(pred, target, style))


def test_perceptual_mask_is_the_outside_of_the_image(backend):
    loss = make_perceptual(backend)
    pred, target = torch.randn(2, 2, C, H, W)
    mask = torch.rand(2, H, W) > 0.2
    value, grad = value_and_grad(loss, pred, target, mask=mask)
    zeroed = [torch.where(mask.unsqueeze(1), t, 0) for t in (pred, target)]
    without_tv = make_perceptual(backend, tv_weight=0.0)
    torch.testing.assert_close(without_tv(pred, target, mask=mask), without_tv(*zeroed))
    assert grad.isfinite().all()
    assert grad.movedim(1, -1)[~mask].abs().max() == 0
    assert value > without_tv(*zeroed)
