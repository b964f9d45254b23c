"""Offsets beyond 2^31 elements, in sparse files: only the pages that are touched exist.

Each kernel runs its last program alone, whose elements lie beyond 2^31 in every tensor named. The
interpreter computes 32-bit integers as 32 bits: an offset that wraps is an address of no tensor's,
or another element's.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from program_order import program_order

from gpl_fast.tiles import Tile

pytestmark = [
    pytest.mark.only("triton"),
    pytest.mark.needs("conv_block_fwd"),  # Triton's own, which has the others, too
]

FAR = 2**31
BF16, FLOAT, BYTE = torch.bfloat16, torch.float32, torch.uint8
BRANCH = torch.zeros(1, dtype=torch.bool)


@pytest.fixture
def sparse(tmp_path):
    """``sparse(*shape, dtype, image_stride)``: zeros, each in a file with holes."""
    made: list[Tensor] = []

    def make(*shape: int, dtype: torch.dtype, image_stride: int | None = None) -> Tensor:
        strides = list(torch.empty(shape, device="meta").stride())
        strides[0] = strides[0] if image_stride is None else image_stride
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        path = tmp_path / str(len(made))
        with path.open("wb") as file:
            file.truncate(size * dtype.itemsize)
        flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        made.append(flat.as_strided(shape, strides))
        return made[-1]

    return make


@pytest.fixture(autouse=True)
def _last_program_alone():
    with program_order(lambda programs: programs[-1:]):
        yield


def far_images(sparse, *shape: int, dtype: torch.dtype) -> Tensor:
    """The last of three images begins at 2^31."""
    return sparse(3, *shape, dtype=dtype, image_stride=FAR // 2)


# ------------------------------------------------------------------- within an image: one, long

LONG, WIDE, DEEP = 2**15, 32, 2304  # a bit more than 2^31 elements; a program has a row


def test_softmax_pack_within_an_image(stages, sparse):
    x, target, y, delta = (sparse(1, LONG, WIDE, DEEP, dtype=BF16) for _ in range(4))
    assert x.numel() > FAR
    x, target = x.permute(0, 3, 1, 2), target.permute(0, 3, 1, 2)
    x[0, -3:, -1] = 4 * torch.randn(3, WIDE).to(BF16)
    target[0, -2, -1] = 6
    lse = torch.zeros(1, LONG, WIDE)
    stages.softmax_pack_fwd(
        x, activation=1, target_activation=1, temperature=1.0, row0=0, rows=LONG, core0=0,
        core_rows=LONG, target=target, from_target=BRANCH, y=y, delta=delta, lse=lse,
    )  # fmt: skip
    row, other = (t[0, :, -1].float() for t in (x, target))
    want = row.softmax(0).t()
    torch.testing.assert_close(lse[0, -1], row.logsumexp(0))
    torch.testing.assert_close(y[0, -1].float(), want, rtol=0.01, atol=1e-6)
    torch.testing.assert_close(delta[0, -1].float(), want - other.softmax(0).t(), rtol=0.01,
                               atol=1e-6)  # fmt: skip
    assert y[0, -1, :, -3:].ne(y[0, -1, :, :1]).any()


def test_softmax_bwd_within_an_image(stages, sparse):
    x, dx, dy = (sparse(1, LONG, WIDE, DEEP, dtype=BF16) for _ in range(3))
    x, dx = x.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2)
    x[0, -3:, -1], dy[0, -1, :, -4:] = 8.0, torch.randn(WIDE, 4).to(BF16)
    lse = torch.zeros(1, LONG, WIDE)
    lse[0, -1] = x[0, :, -1].float().logsumexp(0)
    stages.softmax_bwd(
        x, activation=1, temperature=1.0, row0=0, rows=LONG, dx=dx, lse=lse, dy=dy,
        scale=torch.ones(1),
    )  # fmt: skip
    row = x[0, :, -1].float().requires_grad_()
    row.softmax(0).backward(dy[0, -1].float().t())
    assert row.grad[-1].any()
    torch.testing.assert_close(dx[0, :, -1].float(), row.grad, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("descriptors", [False, True])
def test_conv_block_within_an_image(stages, descriptors, sparse):
    """1 x 1, so that the last rows depend on themselves alone; δ doubles the first channels."""
    h, w, c = 2**14, 2**11, 72
    assert h * w * c > FAR
    tile = Tile(8, 64, 128, 128, 4, 1, descriptors)
    a, d, y, delta = (sparse(1, h, w, c, dtype=BF16) for _ in range(4))
    a[0, -1, -64:], d[0, -1, -64:] = torch.randn(64, c).to(BF16), torch.randn(64, c).to(BF16)
    mask = sparse(1, h, w, 9, dtype=BYTE)
    stages.conv_block_fwd(
        a, weight=torch.eye(c).to(BF16), kernel_size=1, stride=1, relu=True, pool=2, pad_h=0,
        row0=0, image_rows=h, tile=tile, d=d, from_target=BRANCH, y=y, delta=delta, code=mask,
    )  # fmt: skip
    here, less = a[0, -1, -64:].float(), d[0, -1, -64:].float()
    assert torch.equal(y[0, -1, -64:], a[0, -1, -64:].relu())
    want = (here.relu() - (here - less).relu()).to(BF16)
    torch.testing.assert_close(delta[0, -1, -64:], want, rtol=0.01, atol=1e-6)
    bits = (mask[0, -1, -64:].unsqueeze(-1) >> torch.arange(8)) & 1
    assert torch.equal(bits.flatten(1).bool(), here > 0)


def test_pools_within_an_image(stages, sparse):
    h, w, c = 2**13, 2**7, 2304
    z, back = (sparse(1, h, w, c, dtype=BF16) for _ in range(2))
    assert z.numel() > FAR
    y = sparse(1, h // 2, w // 2, c, dtype=BF16)
    code = sparse(1, h // 2, w // 2, c // 2, dtype=BYTE)
    z[0, -2:, :, -256:] = torch.randn(2, w, 256).to(BF16)
    stages.relu_pool_fwd(z, pool=0, y=y, code=code)
    corner = z[0, -2:, -2:, -128:].flatten(0, 1)
    assert torch.equal(y[0, -1, -1, -128:], corner.amax(0).relu())
    stages.relu_pool_bwd(y, code=code, pool=0, height=h, width=w, row0=0, dz=back)
    won = (corner == corner.amax(0)) & (corner > 0)
    assert torch.equal(back[0, -1, -1, -128:], corner[3].where(won[3], 0.0))


def test_relu_of_flat_elements(stages, sparse):
    rows, c = 2**13, 2**18 + 64
    z, y, back = (sparse(1, 1, rows, c, dtype=BF16) for _ in range(3))
    assert z.numel() > FAR
    mask = sparse(1, 1, rows, c // 8, dtype=BYTE)
    z[0, 0, -16:, -64:] = torch.randn(16, 64).to(BF16)
    stages.relu_fwd(z, y=y, mask=mask)
    assert torch.equal(y[0, 0, -16:, -64:], z[0, 0, -16:, -64:].relu())
    stages.relu_bwd(z, mask=mask, dz=back)
    assert torch.equal(back[0, 0, -16:, -64:], z[0, 0, -16:, -64:].relu())
    assert back[0, 0, -16:, -64:].any()


def test_label_conv_in_a_large_table(stages, sparse):
    """One pixel has a neighbour with a class: the last tap's row of the last class."""
    classes, c_out = 2**18, 1024
    table = sparse(9, classes, c_out, dtype=BF16)
    assert table.numel() > FAR
    table[-1, -1] = torch.randn(c_out).to(BF16)
    labels = torch.full((1, 2, 2), -1)
    labels[0, 1, 1] = classes - 1
    z, dz = torch.zeros(1, 1, 2, c_out), torch.zeros(1, 1, 2, c_out)
    interior = torch.zeros(1, c_out).expand(classes, c_out)
    taken = torch.zeros(1, 2, 2, dtype=BYTE)
    stages.label_conv_fwd(
        labels, table=table, interior=interior, from_target=BRANCH, taken=taken, taken_row0=0,
        row0=0, z=z, dz=dz,
    )  # fmt: skip
    assert torch.equal(dz[0, 0, 0, -64:], -table[-1, -1, -64:].float())


def test_topk_conv_of_a_long_list(stages, sparse):
    """The last value and index of a pixel lie beyond 2^31."""
    k, width = 65, 2**25 + 32
    values, indices = (sparse(1, k, 1, width, dtype=dtype) for dtype in (FLOAT, torch.int64))
    assert values.numel() > FAR + width
    values[0, -1, 0, -32:], indices[0, -1, 0, -32:] = torch.rand(32), torch.randint(3, (32,))
    table, taken = torch.randn(1, 3, 8), sparse(1, 1, width, dtype=BYTE)
    z, dz = (sparse(1, 1, width, 8, dtype=FLOAT) for _ in range(2))
    stages.topk_conv_fwd(
        values, topk_indices=indices, table=table, from_target=BRANCH, taken=taken, taken_row0=0,
        row0=0, z=z, dz=dz,
    )  # fmt: skip
    want = -values[0, -1, 0, -32:, None] * table[0][indices[0, -1, 0, -32:]]
    torch.testing.assert_close(dz[0, 0, -32:], want)


def test_diff_reduce_of_a_long_image(stages, sparse, monkeypatch):
    module, partials = importlib.import_module("gpl_fast.kernels.diff_reduce"), []
    shipped = module.launch

    def launch(kernel, grid, delta, partial, *args, **meta):
        partials.append(partial)
        shipped(kernel, grid, delta, partial, *args, **meta)

    monkeypatch.setattr(module, "launch", launch)
    delta = sparse(1, FAR + 9000, dtype=BF16)
    delta[0, -5:] = torch.arange(1, 6)
    stages.diff_reduce_fwd(delta)
    assert partials[0][0, -1] == 55


def test_seeds_of_a_long_image(stages, sparse):
    delta, seed = (sparse(1, FAR // 32 + 9000, 32, dtype=BF16) for _ in range(2))
    delta[0, -1, -5:] = torch.arange(1, 6)
    weight = torch.arange(32, dtype=FLOAT)
    stages.diff_reduce_fwd(delta, criterion=1, weight=weight, seed=seed)
    assert seed[0, -1, -5:].tolist() == [27, 28, 29, 30, 31]


def test_unit_diff_within_an_image(stages, sparse):
    y, target, seed = (sparse(1, LONG, WIDE, DEEP, dtype=BF16) for _ in range(3))
    assert y.numel() > FAR
    y[0, -1, -1, -4:], target[0, -1, -1, -4:] = torch.randn(2, 4).to(BF16)
    stages.unit_diff_fwd(y, target=target, criterion=0, eps=1e-10, eps_inside=False, seed=seed)
    p, t = y[0, -1, -1, -4:].double(), target[0, -1, -1, -4:].double()
    n = p / p.norm()
    v = n - t / t.norm()
    want = (v - n * (n @ v)) / p.norm()
    torch.testing.assert_close(seed[0, -1, -1, -4:].double(), want, rtol=0.01, atol=1e-3)


# ------------------------------------------------------------------------------ image to image


def test_maps_whose_images_are_far_apart(stages, sparse):
    """The last row of the last image of every map and code, against the same of one image alone."""
    a, d, back = (far_images(sparse, 4, 4, 8, dtype=BF16) for _ in range(3))
    y, delta = (far_images(sparse, 2, 2, 8, dtype=BF16) for _ in range(2))
    code = far_images(sparse, 2, 2, 4, dtype=BYTE)
    a[2], d[2] = torch.randn(2, 4, 4, 8).to(BF16)

    def block(a, d, y, delta, code):
        stages.conv_block_fwd(
            a, weight=torch.eye(8).to(BF16), kernel_size=1, stride=1, relu=True, pool=0, pad_h=0,
            row0=0, image_rows=4, tile=Tile(8, 8, 16, 8, 4, 1, False), d=d,
            from_target=BRANCH.expand(len(a)).contiguous(), y=y, delta=delta, code=code,
        )  # fmt: skip

    def pool(a, d, y, delta, code):
        stages.relu_pool_diff_fwd(
            a, dz=d, from_target=BRANCH.expand(len(a)).contiguous(), pool=0, y=y, delta=delta,
            code=code,
        )  # fmt: skip

    one = [t[2:].clone() for t in (y, delta, code)]
    for stage in (block, pool):
        with program_order(lambda programs: programs):
            stage(*(t[2:].clone() for t in (a, d)), *one)
        stage(a, d, y, delta, code)
        for far, near in zip((y, delta, code), one, strict=True):
            assert torch.equal(far[2, -1], near[0, -1])
            assert far[2, -1].any()
            far[2, -1] = 0
    for far, near in zip((y, code), (one[0], one[2]), strict=True):
        far[2] = near[0]
    stages.relu_pool_bwd(y, code=code, pool=0, height=4, width=4, row0=0, dz=back)
    near_back = torch.zeros(1, 4, 4, 8, dtype=BF16)
    with program_order(lambda programs: programs):
        stages.relu_pool_bwd(one[0], code=one[2], pool=0, height=4, width=4, row0=0, dz=near_back)
    assert torch.equal(back[2, -1], near_back[0, -1])


def test_logits_whose_images_and_channels_are_far_apart(stages, sparse):
    x, dx = (
        sparse(2, 3, 1, 8, dtype=BF16, image_stride=3 * FAR // 2).as_strided(
            (2, 3, 1, 8), (8, FAR // 2, 8, 1)
        )
        for _ in range(2)
    )
    x[1] = torch.randn(3, 1, 8).to(BF16)
    y, lse = far_images(sparse, 1, 8, 8, dtype=BF16), torch.zeros(3, 1, 8)
    stages.softmax_pack_fwd(
        x, activation=1, target_activation=1, temperature=1.0, row0=0, rows=1, core0=0,
        core_rows=1, y=y[1:], lse=lse[:2],
    )  # fmt: skip
    probabilities = x[1, :, 0].float().softmax(0).t()
    torch.testing.assert_close(y[2, 0, :, :3].float(), probabilities, rtol=0.01, atol=1e-6)
    stages.softmax_bwd(
        x, activation=1, temperature=1.0, row0=0, rows=1, dx=dx, lse=lse[:2], dy=y[1:],
        scale=torch.ones(2),
    )  # fmt: skip
    row = x[1, :, 0].float().requires_grad_()
    row.softmax(0).backward(y[2, 0, :, :3].float().t())
    torch.testing.assert_close(dx[1, :, 0].float(), row.grad, rtol=0.02, atol=1e-3)


def test_labels_of_elements_whose_channels_are_far_apart(stages, sparse):
    def planes(dtype: torch.dtype) -> Tensor:
        whole = sparse(2, 3, 1, 8, dtype=dtype, image_stride=3 * FAR // 2)
        return whole.as_strided((2, 3, 1, 8), (8, FAR // 2, 8, 1))

    x, dx, labels = planes(BF16), planes(BF16), planes(BYTE)
    x[1], labels[1] = torch.randn(3, 1, 8).to(BF16), torch.randint(3, (3, 1, 8)).byte()
    rows = torch.zeros(2, 1, 2, dtype=torch.float64)
    stages.binary_ce_fwd(x, labels=labels, row0=0, rows=1, ce_rows=rows)
    stages.binary_ce_bwd(
        x, labels=labels, row0=0, rows=1, dx=dx, clear=True, ce_scale=torch.ones(2)
    )
    y, counts = (labels[1] == 1).float(), labels[1] != 2
    leaf = x[1].float().requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(leaf, y, reduction="none")
    loss = (loss * counts).sum()
    loss.backward()
    torch.testing.assert_close(rows[1, 0], torch.stack([loss.detach(), counts.sum()]).double())
    torch.testing.assert_close(dx[1].float(), leaf.grad, rtol=0.01, atol=1e-3)


def test_look_ups_into_images_that_are_far_apart(stages, sparse):
    z, dz = (far_images(sparse, 2, 2, 8, dtype=BF16) for _ in range(2))
    table, taken = torch.randn(1, 3, 8), torch.zeros(3, 2, 2, dtype=BYTE)
    labels = torch.randint(3, (3, 2, 2))
    stages.label_conv_fwd(
        labels, table=table, interior=table[0], from_target=BRANCH.expand(3).contiguous(),
        taken=taken, taken_row0=0, row0=0, z=z, dz=dz,
    )  # fmt: skip
    assert torch.equal(dz[2, -1], -table[0][labels[2, -1]].to(BF16))


def test_lists_whose_ranks_are_far_apart(stages, sparse):
    """The third value and index of a pixel begin at 2^31."""

    def listed(dtype: torch.dtype) -> Tensor:
        planes = sparse(3, 2, 4, dtype=dtype, image_stride=FAR // 2)
        return planes.as_strided((1, 3, 2, 4), (8, *planes.stride()))

    values, indices = listed(FLOAT), listed(torch.int64)
    values[0, 2], indices[0, 2] = torch.rand(2, 4), torch.randint(3, (2, 4))
    taken = torch.zeros(1, 2, 4, dtype=BYTE)
    x, y = torch.randn(1, 3, 2, 4), torch.zeros(1, 2, 4, 8)
    stages.softmax_pack_fwd(
        x, activation=0, target_activation=0, temperature=1.0, row0=0, rows=2, core0=0,
        core_rows=2, topk_values=values, topk_indices=indices, y=y, taken=taken,
    )  # fmt: skip
    target = torch.zeros(3, 4).scatter_add_(0, indices[0, 2, -1:], values[0, 2, -1:])
    row = x[0, :, -1]
    near = (row - target).square().sum(0) < row.square().sum(0)
    assert torch.equal(taken[0, -1].bool(), near)
    torch.testing.assert_close(y[0, -1, :, :3], (row - near * target).t())


@pytest.fixture
def far_lists(sparse):
    """Values and indices (2, 3, 2, 4), where the last rank of each image is 2^31 from its first and
    its list follows the one before; all zeros but the last rank of the last image."""

    def listed(dtype: torch.dtype) -> Tensor:
        rank = FAR // 2
        flat = sparse(5 * rank + 8, dtype=dtype)
        return flat.as_strided((2, 3, 2, 4), (3 * rank, rank, 4, 1))

    values, indices = listed(FLOAT), listed(torch.int64)
    values[1, 2], indices[1, 2] = torch.rand(2, 4) + 0.5, torch.randint(3, (2, 4))
    return values, indices


def dense_of(values: Tensor, indices: Tensor) -> Tensor:
    """What the last image's last rank stands for, (3, 2, 4)."""
    return torch.zeros(3, 2, 4).scatter_(0, indices[1, 2:], values[1, 2:])


def test_lists_of_several_images(stages, far_lists):
    values, indices = far_lists
    target, taken = dense_of(*far_lists), torch.zeros(2, 2, 4, dtype=BYTE)
    x, y = 2 * target.expand(2, 3, 2, 4), torch.zeros(2, 2, 4, 8)
    stages.softmax_pack_fwd(
        x, activation=0, target_activation=0, temperature=1.0, row0=0, rows=2, core0=0,
        core_rows=2, topk_values=values, topk_indices=indices, y=y, taken=taken,
    )  # fmt: skip
    assert taken[1, -1].all()  # |2t − t|² < |2t|²
    torch.testing.assert_close(y[1, -1, :, :3], target[:, -1].t())


# ------------------------------------------------------------------------ a look at a few pixels


@pytest.mark.parametrize("far", ["channels", "images"])
def test_which_branch(stages, far, sparse):
    """One row of the grid, whose last class is the target's."""
    if far == "channels":
        x, target = (sparse(1, DEEP, LONG, WIDE, dtype=BF16) for _ in range(2))
    else:
        x, target = (far_images(sparse, 5, 32, WIDE, dtype=BF16) for _ in range(2))
    assert (x.shape[1] - 1) * x.stride(1) + (len(x) - 1) * x.stride(0) >= FAR
    step, found = (x.shape[2], 4), []
    for x[-1, -1, 0], target[-1, -1, 0] in ((20.0, 20.0), (20.0, 0.0), (0.0, 20.0)):
        from_target = torch.zeros(len(x), dtype=torch.bool)
        stages.carry_target_fwd(
            x, activation=1, target_activation=1, temperature=1.0, step=step, near=1 / 32,
            dense=target, from_target=from_target,
        )  # fmt: skip
        found.append(bool(from_target[-1]))
    assert found == [True, False, False]


def test_which_branch_of_lists(stages, far_lists):
    values, indices = far_lists
    values[1, 2], indices[1, 2] = 0.5, 1  # alike, as where a target is carried
    target, found = dense_of(*far_lists), []
    for factor in (1.0, 2.0):
        from_target = torch.zeros(2, dtype=torch.bool)
        stages.carry_target_fwd(
            (factor * target).expand(2, 3, 2, 4), activation=0, target_activation=0,
            temperature=1.0, step=(2, 4), near=1 / 32, topk_values=values, topk_indices=indices,
            from_target=from_target,
        )  # fmt: skip
        found.append(bool(from_target[-1]))
    assert found == [True, False]
