"""Command lines of runs that take a second."""

SMALL = "--model.pattern gla+swiglu --model.width 16 --model.depth 2 --model.gla.heads 2 "
SMALL += "--model.attention.heads 2 --rows 4 --length 12 "
SMALL += "--heldout-batches 2 --final-batches 3 --log-every 1 "
STREAM = "--model.pattern gla+swiglu,attention+gelu --model.attention.window 5 "
STREAM += "--stream-state --accumulate 2 "


def args(texts, run, more=""):
    return f"--data.paths {texts} --run {run} --steps 20 {SMALL}{more}".split()
