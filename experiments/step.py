"""The one compiled training step: gradients of a batch in parts, an update, and what is skipped."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from ..models.layout import assembled
from ..sharding import mesh, schedule
from ..sharding.schedule import PLAIN, Schedule
from .optimizer import OptimizerConfig, adamw
from .tasks import Task

State = dict[str, Any]  # params, optimizer, stream (what the model carries over), skipped (a count)


SCALARS = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)


TRAINING = np.uint32(2**32 - 1)


class Program(NamedTuple):
    """Compiled functions, and the model's variables that are not trained."""

    task: Task
    """The task as it is laid out for the mesh."""
    graphdef: nnx.GraphDef
    rest: Any
    step: Any
    """step(state, rest, batch, rate, draw) -> (state, metrics); the state that went in is used up.
    draw: the seed and the number of the step, uint32, of which all that is random in it follows.
    """
    score: Any
    """score(params, rest, batch, stream) -> (metrics, stream)."""
    places: State
    """Where the state lies: a tree of shardings like it."""
    named: Any
    """named(state): its parameters, and what is like them, by layer, as a checkpoint has them."""
    named_places: Any
    """Where what `named` returns lies."""
    rows: NamedSharding
    """Where the arrays (rows, time) of a batch lie."""

    def model(self, state: State, task: Task) -> Any:
        """The trained model as `task` builds it for one device."""
        flat, over = jax.device_get(self.task.by_layer(state["params"])), mesh.make()
        params = jax.jit(task.from_layers, out_shardings=blueprint(task, over)[2])(flat)
        return assembled(task.build, params, over)


def blueprint(task: Task, over: Mesh) -> tuple[nnx.GraphDef, Any, Any]:
    """The structure of a task's model, its parameters' shapes, and where they lie on a mesh."""
    graphdef, shapes, _ = nnx.split(nnx.eval_shape(lambda: task.build(nnx.Rngs(0))), nnx.Param, ...)
    shapes = nnx.to_pure_dict(shapes)
    return graphdef, shapes, task.shardings(shapes, over)


def build(
    task: Task,
    config: OptimizerConfig,
    seed: int,
    parts: int,
    over: Mesh | None = None,
    how: Schedule = PLAIN,
    batch: Any = None,
    read: Callable[[Any, Mesh], Any] | None = None,
) -> tuple[Program, State]:
    """The program of a task, and the state before the first step, on a mesh (None: one device).

    A batch's rows are taken in `parts` equal parts, one after the other; `how` says what is in
    force on the mesh. With the shapes of a batch the step is traced, once for all, before anything
    is compiled: a model that cannot run is known at once. read(task, over) makes the first
    parameters where they lie; None: they are drawn.
    """
    over = mesh.make() if over is None else over
    start, program = compiled(task, config, parts, over, how)
    key = jax.random.key(seed)
    if batch is not None:
        state, rest = jax.eval_shape(start, key, None)
        jax.eval_shape(program.step, state, rest, batch, *SCALARS)
    state, rest = start(key, None if read is None else read(program.task, over))
    return program._replace(rest=rest), state


def abstract(
    task: Task, config: OptimizerConfig, parts: int, over: Mesh, how: Schedule = PLAIN
) -> tuple[Program, State]:
    """What `build` makes, of shapes and shardings instead of arrays."""
    start, program = compiled(task, config, parts, over, how)
    state, rest = jax.eval_shape(start, jax.random.key(0), None)

    def placed(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return program._replace(rest=rest), jax.tree.map(placed, state, program.places)


def compiled(
    task: Task, config: OptimizerConfig, parts: int, over: Mesh, how: Schedule
) -> tuple[Callable[..., Any], Program]:
    """start(key, params) -> (state, rest), and the program without `rest`; compiled when called.

    Parameters that are given take the place of those drawn, which are then never made.
    """
    how.check(dict(over.shape))
    task = task.on(over, how)
    graphdef, shapes, params = blueprint(task, over)
    transform = adamw(config, task.decayed(shapes))

    def first(key, params):
        model = task.build(nnx.Rngs(key))
        _, drawn, rest = nnx.split(model, nnx.Param, ...)
        params = nnx.to_pure_dict(drawn) if params is None else params
        stream = split_rows(task.init_state(model), parts)
        state = {"params": params, "optimizer": transform.init(params), "stream": stream}
        return state | {"skipped": jnp.zeros((), jnp.int32)}, rest

    def on_mesh(function):
        @functools.wraps(function)
        def traced(*args):
            with use_abstract_mesh(over.abstract_mesh), schedule.using(how):
                return function(*args)

        return traced

    def score(params, rest, batch, stream):
        model = nnx.merge(graphdef, params, rest)
        _, (stream, metrics) = task.loss(
            model, batch, task.init_state(model) if stream is None else stream
        )
        return metrics, stream

    everywhere, rows = mesh.sharding(over), mesh.sharding(over, mesh.ENDS, "seq")
    blank, _ = jax.eval_shape(on_mesh(first), jax.random.key(0), None)
    places = jax.tree.map(lambda _: everywhere, blank)
    places = like(places, blank["params"], lambda _: params)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blank["stream"])
    streams = task.state_shardings(one, over)  # of one part
    places["stream"] = jax.tree.map(lambda s: mesh.sharding(over, None, *s.spec), streams)
    each = jax.tree.map(lambda where, x: Place(where, x.shape), places, blank)
    each = jax.tree.map(lambda place: place.where, like(each, blank["params"], task.by_layer))

    def named(state):
        return like(state, blank["params"], task.by_layer)

    named = jax.jit(named, out_shardings=each)
    start = jax.jit(on_mesh(first), donate_argnums=1, out_shardings=(places, everywhere))
    step = on_mesh(make_step(task, graphdef, transform, parts, params))
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))
    score = jax.jit(on_mesh(score), out_shardings=(everywhere, None))
    return start, Program(task, graphdef, None, step, score, places, named, each, rows)


def make_step(
    task: Task,
    graphdef: nnx.GraphDef,
    transform: optax.GradientTransformation,
    parts: int,
    places: Any,
) -> Callable[..., tuple[State, dict[str, Any]]]:
    """One update, by the mean gradient of all parts weighted by their `weight`: the whole batch's.

    A step whose loss or gradient norm is not finite changes nothing but the count of those skipped.
    """

    def step(state, rest, batch, rate, draw):
        seed, number = draw
        key = jax.random.fold_in(jax.random.key(seed), TRAINING)  # apart from the parameters' draws
        key = jax.random.fold_in(key, number)

        def loss(params, batch, stream, number):
            model = nnx.merge(graphdef, params, rest)
            one = jax.random.fold_in(key, number)
            value, (stream, metrics) = task.loss(model, batch, stream, one)
            weight = metrics["weight"]
            sums = {k: v if k == "weight" else v * weight for k, v in metrics.items()}
            return value * weight, (sums, stream)

        def part(*inputs):
            grads, (sums, stream) = jax.grad(loss, has_aux=True)(state["params"], *inputs)
            grads = jax.lax.with_sharding_constraint(grads, places)
            return (grads, sums), stream

        batches = jax.tree.map(
            lambda x: mesh.constrain(x, *(None, mesh.ENDS, "seq")[: x.ndim]),
            split_rows(batch, parts),
        )
        numbers = jnp.arange(parts, dtype=jnp.uint32)
        if parts == 1:
            one = jax.tree.map(lambda x: x[0], (batches, state["stream"], numbers))
            total, stream = part(*one)
            stream = jax.tree.map(lambda x: x[None], stream)
        else:
            total, stream = add_up(part, batches, state["stream"], numbers)
        weight = total[1].pop("weight")
        grads, metrics = jax.tree.map(lambda x: x / weight, total)

        norm = optax.tree.norm(grads)
        updates, optimizer = transform.update(grads, state["optimizer"], state["params"])
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state["params"], updates)
        params = task.settled(params, metrics)
        fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = {"params": params, "optimizer": optimizer, "stream": stream}
        old = {name: state[name] for name in new}
        new = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, old)
        new["skipped"] = state["skipped"] + (~fine).astype(jnp.int32)
        extra = {"weight": weight, "gradient_norm": norm, "skipped": new["skipped"]}
        return new, metrics | extra

    return step


def add_up(part: Callable[..., Any], *over: Any) -> tuple[Any, Any]:
    """Sum of the first results of `part` along the leading axis; the second ones, stacked."""
    one = jax.eval_shape(lambda *xs: part(*jax.tree.map(lambda x: x[0], xs))[0], *over)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)

    def body(total, xs):
        this, kept = part(*xs)
        return jax.tree.map(jnp.add, total, this), kept

    return jax.lax.scan(body, zero, over)


def split_rows(tree: Any, parts: int) -> Any:
    """Leaves (B, ...) as (parts, B / parts, ...)."""
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), tree)


def like(state: State, example: Any, convert: Callable[[Any], Any]) -> State:
    """The state with `convert` applied to every tree in it that is built like `example`."""
    structure = jax.tree.structure(example)

    def alike(tree):
        return jax.tree.structure(tree) == structure

    return jax.tree.map(lambda x: convert(x) if alike(x) else x, state, is_leaf=alike)


class Place:
    """Where an array of a shape lies; one of a stack's layers, where that one would.

    What the stack's own axis lies over (a pipeline's stages) then cuts the first that divides, so
    that no device holds more than its share.
    """

    def __init__(self, where: NamedSharding, shape: tuple[int, ...]):
        self.where, self.shape = where, shape

    def __getitem__(self, _: int) -> "Place":
        sizes, shape = self.where.mesh.shape, self.shape[1:]
        over, *spec = (*self.where.spec, *(None,) * (len(self.shape) - len(self.where.spec)))
        for i, (axes, size) in enumerate(zip(spec, shape, strict=True)):
            both = (*((axes,) if isinstance(axes, str) else axes or ()), over)
            if over is not None and size % math.prod(sizes[axis] for axis in both) == 0:
                spec[i] = both
                break
        return Place(NamedSharding(self.where.mesh, PartitionSpec(*spec)), shape)
