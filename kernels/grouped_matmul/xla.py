"""The grouped matmul in blocks of rows, each of one group, one after the other.

A group is cut from its first row into blocks of H rows, its last one shorter: at most M / H + E
blocks, which bounds a loop whose blocks past the last are skipped. A short block takes the least of
four heights that holds it, so that little is computed for nothing, and is put into a frame of H
rows, of which only the block's own are kept. Nothing is padded, sorted or gathered; beside the
result there is one group's w, or one group's gradient, at a time.

XLA for CPUs updates an array in place in a conditional of two branches and copies it in one of
more, so that the choice of the height returns a frame and the skipping goes round the update.
"""

from functools import partial

import jax
import jax.numpy as jnp

from .gradient import differentiable

HEIGHT = 128  # rows of a block at most; on a CPU 64 and 256 are no faster


def heights(rows: int, groups: int) -> list[int]:
    """Four heights of a block, the last for whole ones: about twice the rows of a mean group.

    Few rows go one by one: on a CPU products with a vector are the quickest of few rows.
    """
    if 2 * rows <= groups:
        return [1]
    mean = -(-rows // groups)
    whole = min(rows, HEIGHT, max(16, 2 << (mean - 1).bit_length()))
    return sorted({-(-whole * i // 4) for i in (1, 2, 3, 4)})


def blocks(sizes, rows: int, heights: list[int]):
    """group, first row, row past the last and index of the height, of every block: (blocks,) each.

    Blocks past the last are empty.
    """
    groups, whole = sizes.shape[0], heights[-1]
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    number = (sizes + whole - 1) // whole
    until = jnp.cumsum(number, dtype=jnp.int32)
    block = jnp.arange(rows // whole + min(groups, rows), dtype=jnp.int32)
    group = jnp.sum(until[None] <= block[:, None], axis=1, dtype=jnp.int32)
    none, group = group == groups, jnp.minimum(group, groups - 1)
    start = (ends - sizes)[group] + (block - (until - number)[group]) * whole
    stop = jnp.where(none, start, jnp.minimum(start + whole, ends[group]))
    shorter = jnp.asarray(heights[:-1], jnp.int32)
    kind = jnp.sum((stop - start)[:, None] > shorter, axis=1, dtype=jnp.int32)
    return group, start, stop, kind


def over_blocks(write, result, blocks):
    """`write(result, block)` for every block that has a row."""

    def body(result, block):
        _, start, stop, _ = block
        return jax.lax.cond(start < stop, write, lambda result, _: result, result, block), None

    return jax.lax.scan(body, result, blocks)[0]


def take(x, start, height):
    """(first row, rows): `height` rows of x from `start`, or from earlier where x ends before."""
    first = jnp.minimum(start, x.shape[0] - height)
    return first, jax.lax.dynamic_slice_in_dim(x, first, height)


def own(block, first, height):
    """Which of the `height` rows from `first` are the block's: (height, 1)."""
    _, start, stop, _ = block
    row = first + jnp.arange(height, dtype=jnp.int32)[:, None]
    return (start <= row) & (row < stop)


def dot(a, b, contracted):
    exact = jnp.promote_types(jnp.float32, a.dtype)
    dims = (contracted, ((), ()))
    return jax.lax.dot_general(a, b, dims, precision="highest", preferred_element_type=exact)


def product(x, w, sizes, transpose):
    """y_i = x_i w_e, or x_i w_e^T."""
    rows, width = x.shape[0], w.shape[1 if transpose else 2]
    kinds = heights(rows, w.shape[0])
    whole = kinds[-1]

    def multiply(height, x, w, group, start):
        """Rows from `start` times their group's w, at their place in the frame."""
        w = jax.lax.dynamic_index_in_dim(w, group, keepdims=False).astype(x.dtype)
        first, x = take(x, start, height)
        y = dot(x, w, ((1,), (1 if transpose else 0,))).astype(x.dtype)
        if height == whole:
            return y
        place = first - jnp.minimum(start, rows - whole)
        return jax.lax.dynamic_update_slice_in_dim(jnp.zeros((whole, width), x.dtype), y, place, 0)

    def write(y, block):
        group, start, _, kind = block
        new = jax.lax.switch(kind, [partial(multiply, h) for h in kinds], x, w, group, start)
        first, old = take(y, start, whole)
        new = jnp.where(own(block, first, whole), new, old)
        return jax.lax.dynamic_update_slice_in_dim(y, new, first, 0)

    y = jnp.zeros((rows, width), x.dtype)
    return over_blocks(write, y, blocks(sizes, rows, kinds))


def outer(x, dy, sizes, dtype):
    """Every group's x_e^T dy_e: (E, K, N) in `dtype`."""
    kinds = heights(x.shape[0], sizes.shape[0])

    def multiply(height, x, dy, block):
        """Masked on both sides: a row of another group may hold a nan."""
        first, x = take(x, block[1], height)
        _, dy = take(dy, block[1], height)
        inside = own(block, first, height)
        # XLA for CPUs is quicker at a sum over two axes of rows: layers/linear.py says why
        halves = (height,) if height % 2 else (2, height // 2)
        x, dy = (jnp.where(inside, a, 0).reshape(*halves, a.shape[1]) for a in (x, dy))
        rows = tuple(range(len(halves)))
        return dot(x, dy, (rows, rows))

    def add(dw, block):
        group, _, _, kind = block
        new = jax.lax.switch(kind, [partial(multiply, h) for h in kinds], x, dy, block)
        new += jax.lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, new, group, 0)

    exact = jnp.promote_types(jnp.float32, x.dtype)
    dw = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), exact)
    return over_blocks(add, dw, blocks(sizes, x.shape[0], kinds)).astype(dtype)


grouped_matmul = differentiable(product, outer)
