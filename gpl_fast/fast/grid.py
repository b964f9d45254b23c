"""The pixels of an image that `branch` looks at, to say which branch is carried."""

from __future__ import annotations

from gpl_fast.fast.call import Call

GRID = (16, 64)  # rows, columns, at most


def grid_steps(h: int, w: int) -> tuple[int, int]:
    """From one row, and from one column, to the next."""
    rows, columns = GRID
    return max(1, -(-h // rows)), max(1, -(-w // columns))


def grid_bytes(call: Call, h: int, w: int) -> int:
    """Of what `branch.carry_target` makes of one image: about eight float32 maps of the grid."""
    rows, columns = grid_steps(h, w)
    return 8 * 4 * call.chain.in_channels * -(-h // rows) * -(-w // columns)
