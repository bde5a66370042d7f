"""Training; ``run(cfg)`` is the entry of train.py.

Files:

    loop                the loop: steps, validation, checkpoints
    banner              the first lines of a run
    feed                the rows of each step as inputs
    carried             memories that go on from step to step
    objective           a batch becomes a loss here; scores of validation
    scores              the cross-entropy of tokens, with few logits at once
    lengths             a curriculum of lengths
    optim               Muon, AdamW, the schedule
    ema                 a moving average of the weights
    shards              tensors that processes share
    sharding            parameters that processes share, by torch's FSDP2
    model               the model of a run: a new decoder, or a backbone with a memory
    match               sizes equal to those of another memory
    trainable           the parameters that a run trains
    settings            the run's settings, checked
    checkpoint          checkpoints that exist completely or not at all
    budget              a run's length and batch in tokens
    sequence            rows shared by processes, or read in pieces
    plan                sizes, memory and hours of a run, before it begins
    footprint           the memory of a step, from tensors without data
    devices             the device of a run; speeds and memories of GPUs
    sharded_checkpoint  checkpoints of parameters that processes share
    resume              checks whether a checkpoint belongs to the requested run
    interrupt           signals
    sweep               members of a sweep, one process each
    telemetry           figures of speed and gradients
    alerts              warnings, from the figures
    guard               steps that are not finite, or spike
    tracking            metrics, in ``metrics.jsonl`` and on Weights & Biases
    display             the screen
    preparing           the screen while data is prepared
"""

from memlm.training.loop import run

__all__ = ["run"]
