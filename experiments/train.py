"""Train a task: `python experiments/train.py --help`, or `python -m scanax.experiments.train`.

With --from DIR it begins with the weights of a published checkpoint, or of another run.

In the run's folder: config.json, one folder a checkpoint, metrics.jsonl, tensorboard, loss.png and,
once the run is at its end, final.json.
"""

import os
import sys

from scanax.experiments import starting

starting.begin(__name__)

import contextlib
import dataclasses
import json
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from scanax.experiments import checkpoint, files, flags, hosts, loading, memory, metrics
from scanax.experiments.config import TrainConfig, differences, from_json, read, to_json
from scanax.experiments.optimizer import learning_rate
from scanax.experiments.plots import losses
from scanax.experiments.saving import SaveError, Saver, alone
from scanax.experiments.signals import signals
from scanax.experiments.step import Program, State, build, like
from scanax.experiments.tasks import Rows
from scanax.sharding import mesh, pipeline


@dataclasses.dataclass
class Run:
    """Where a run stands."""

    config: TrainConfig
    program: Program
    state: State
    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Seconds of training, earlier processes included."""
    saved: int | None = None
    """The step of the last checkpoint."""
    heldout: float | None = None
    """The held-out loss in it, if it was measured."""
    told: Callable[[], bool] = lambda: False
    """Whether this process was told to stop."""
    stopped: bool = False
    """Whether any process was: the step under way is finished and saved."""

    begun: float = 0.0
    """The clock where the seconds were 0."""

    @property
    def part(self) -> float:
        return progress(self.config, self.step, self.seconds)

    def look(self) -> None:
        """At the clock and at who was told to stop; all processes find the same."""
        seen = hosts.gather("look", [time.monotonic() - self.begun, self.told()])
        self.seconds, self.stopped = seen[0][0], any(told for _, told in seen)


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """How much of a run is done, 0 to 1: by steps or by minutes, whichever is further on."""
    by_steps = step / config.steps if config.steps else 0.0
    return min(1.0, max(by_steps, seconds / (60 * config.minutes) if config.minutes else 0.0))


class Stopped(Exception):
    """Raised out of an evaluation when the process is told to stop."""


def main(args: list[str] | None = None) -> int:
    """0: trained, or saved at a signal. 2: a flag or the text is wrong. 1: saving failed, the
    memory is too small, or another process failed.
    """
    run = None
    with signals() as told:
        try:
            run = prepare(flags.train(sys.argv[1:] if args is None else args))
            run.told = told
            with alone(run.config.folder):
                train(run)
            hosts.finish()
        except ValueError as error:  # of a flag, or of the text: a token outside the vocabulary
            return hosts.leave(error, 2)
        except (SaveError, OSError) as error:
            return hosts.leave(error, 1 if run else 2)
        except jax.errors.JaxRuntimeError as error:
            if not hosts.several():
                less = "fewer --rows, more --accumulate, --model.remat full or a --mesh"
                return hosts.leave(ValueError(memory.short(error, less)), 1)
            return hosts.leave(error, 1)
        except BaseException as error:  # of JAX, when another process is gone; or a mistake of ours
            if not hosts.several():
                raise
            if not isinstance(error, KeyboardInterrupt):
                traceback.print_exc()
            return hosts.leave(error, 1)
    return 0


def prepare(config: TrainConfig) -> Run:
    """Find out all that can be wrong with the flags; nothing but an empty folder is written."""
    mesh.emulate(config.emulate_devices)
    hosts.start(config.hosts)
    config = agreed(config)
    task, folder = config.task, config.folder
    if config.steps is None and config.minutes is None:
        raise ValueError("neither --steps nor --minutes is given; training needs an end")
    if config.step is not None and not config.resume:
        raise ValueError(f"--step {config.step} goes with --resume; the steps to train are --steps")
    if not config.resume and os.path.lexists(folder) and not flags.untouched(folder):
        what = "--resume goes on with it, " if folder.is_dir() else "it is no folder; "
        raise ValueError(f"{folder} exists: {what}--run DIR takes another")
    metrics.check(config)
    task.check()
    row, rows = task.batches(config.seed, 0, slice(0, 1)), task.rows
    time_steps = next(x.shape[1] for x in jax.tree.leaves(row) if x.ndim > 1)
    if rows % config.accumulate:
        raise ValueError(f"{rows} rows do not divide into accumulate={config.accumulate} parts")
    over = mesh.make(config.mesh)
    with jax.set_mesh(over):
        mesh.check(rows // config.accumulate, time_steps, over=mesh.ENDS)
        mesh.divide("length", time_steps, "seq")  # one token too
        if over.shape["pipe"] > 1:
            many = config.schedule.microbatches or over.shape["pipe"]
            pipeline.check(rows // config.accumulate, many)
    optimizer, parts = config.optimizer, config.accumulate
    batch = {k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for k, x in row.items()}
    how = config.schedule
    begun = config.resume and checkpoint.steps(folder)
    read = loading.find(config.source).read if config.source and not begun else None
    program, state = build(task, optimizer, config.seed, parts, over, how, batch, read)
    run = Run(config, program, state)
    if config.resume:
        restore(run)
    hosts.share(folder)
    return run


def agreed(config: TrainConfig) -> TrainConfig:
    """The config with the folder that the first process chose. ValueError if other flags differ."""
    theirs = from_json(hosts.gather("config", to_json(config))[0])
    ours = dataclasses.replace(config, run=theirs.run, hosts=theirs.hosts)
    if changes := differences(ours, theirs):
        raise ValueError(f"other flags than process 0: {changes[0]}")
    return ours


def restore(run: Run) -> None:
    """Go on from a checkpoint of the run's folder; from the start if it was killed before one."""
    config, task = run.config, run.program.task
    for change in differences(config, read(config.folder / "config.json")):
        if hosts.first() and not change.startswith(("run is ", "resume is ", "step is ", "hosts.")):
            print(f"train: resuming with {change}", file=sys.stderr)
    if not checkpoint.steps(config.folder):
        return
    saved = jax.eval_shape(run.program.named, run.state)
    run.state = {}  # its memory is needed
    wanted = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        saved,
        run.program.named_places,
    )
    found = checkpoint.restore(config.folder, wanted, config.step)

    def stacked(state):
        return like(state, saved["params"], task.from_layers)

    run.state = jax.jit(stacked, out_shardings=run.program.places)(found.state)
    run.step = run.saved = found.step
    run.seconds = found.metadata["seconds"]
    run.heldout = checkpoint.manifest(config.folder, found.step)["metric"]


def train(run: Run) -> None:
    """The training loop. There is no other."""
    config, task, program = run.config, run.config.task, run.program
    board = metrics.start_wandb(config)  # first, for it may fail
    texts = {"config.json": json.dumps(to_json(config), indent=2), **task.files()}
    for name, text in texts.items() if hosts.first() else ():
        files.write(config.folder / name, text)
    saver = Saver(
        config.folder,
        to_json(config),
        keep=config.keep,
        resumed=run.saved,
        files=task.files(),
    )
    recorder = metrics.Recorder(config, run.step, run.part, board)
    first, run.begun = run.step, time.monotonic() - run.seconds
    with recorder, trace(config) as tracing:
        due_now = run.part == 1 or due(run.step, config.validate_every)
        if run.saved and run.heldout is None and due_now:  # it was cut off when the run stopped
            heldout = validate(run, recorder)
            if hosts.first():
                checkpoint.mark(config.folder, run.saved, heldout)
        run.look()
        while run.part < 1 and not run.stopped:
            tracing(run.step - first)
            batch = spread(run, partial(task.batches, config.seed, run.step))
            rate = learning_rate(config.optimizer, run.step, run.part)
            now = np.float32(rate), np.array([config.seed, run.step], np.uint32)
            run.state, numbers = program.step(run.state, program.rest, batch, *now)
            run.step += 1
            run.look()  # while the devices compute
            row = {"step": run.step, "seconds": run.seconds, "learning_rate": rate}
            recorder.step(row, numbers, run.part)
            if run.part == 1:
                break
            if due(run.step, config.validate_every):
                save(run, saver, recorder, validate(run, recorder))
            elif due(run.step, config.save_every):
                save(run, saver, recorder)
        if run.step != run.saved:
            save(run, saver, recorder, validate(run, recorder))
        saver.wait()
    try:
        finish(run)
    except Stopped:
        if hosts.first():
            at = f"step {run.step} is saved and --resume goes on from it"
            print(f"stopped; {at}", file=sys.stderr)


def spread(run: Run, rows: Rows) -> dict[str, jax.Array]:
    """A batch over the mesh, of which this process makes its own rows."""
    return mesh.spread(run.program.rows, run.config.task.rows, rows)


def validate(run: Run, recorder: metrics.Recorder) -> float | None:
    """The loss on held-out data; None if the process is told to stop."""
    try:
        heldout = run.config.task.evaluate(partial(score, run))
    except Stopped:
        return None
    recorder.add(heldout)
    return heldout["loss"]


def score(run: Run, rows: Rows, stream: Any) -> Any:
    run.look()
    if run.stopped:
        raise Stopped
    return run.program.score(run.state["params"], run.program.rest, spread(run, rows), stream)


def save(run: Run, saver: Saver, recorder: metrics.Recorder, heldout: float | None = None) -> None:
    """A checkpoint of this step, unless it has one; log rows up to it are written first."""
    recorder.flush()
    if run.step != run.saved:
        saver.save(run.step, run.program.named(run.state), {"seconds": run.seconds}, metric=heldout)
        run.saved = run.step


def finish(run: Run) -> None:
    """Evaluate, write final.json, draw the loss curve and print what the task has to say."""
    config, task = run.config, run.config.task
    if hosts.first():
        print("the last evaluation on held-out data", file=sys.stderr, flush=True)
    heldout = task.evaluate(partial(score, run), final=True)
    if not hosts.first():
        return
    sizes = sum(x.size for x in jax.tree.leaves(run.state["params"]))
    about = {"step": run.step, "seconds": run.seconds, "parameters": sizes}
    files.write(config.folder / "final.json", json.dumps(about | heldout))
    if config.plot:
        print(f"\nloss curve: {losses.loss_curve(config.folder, task.measure, task.unit)}")
    model = None if hosts.several() else run.program.model(run.state, task)
    print(task.report(model, heldout, str(config.folder)), flush=True)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def trace(config: TrainConfig) -> Iterator[Callable[[int], None]]:
    """With --profile, a trace of this process's steps 5 to 10; told before each how many it did."""
    wanted, running = config.profile and hosts.first(), False

    def tell(done: int) -> None:
        nonlocal wanted, running
        if wanted and done == 5:
            jax.profiler.start_trace(str(config.folder / "profile"))
            wanted, running = False, True
        elif running and done == 10:
            jax.profiler.stop_trace()
            running = False

    try:
        yield tell
    finally:
        if running:
            jax.profiler.stop_trace()
        if wanted:
            print("profile: no trace, for fewer than six steps were made", file=sys.stderr)


if __name__ == "__main__":
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    sys.exit(main())
