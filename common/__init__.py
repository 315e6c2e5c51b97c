"""Plumbing of all stages: a reader of the method can skip it, and loses no idea of the paper.

    runtime     processes and devices, threads, random generators
    folder      a folder of results: one writer, and nothing of others is replaced
    cli         flags, presets, ranges; the start of a command
    files       find photos, name them, write files whole or not at all
    images      read and write images
    photos      photos to train on: decoded once, read in random crops
    tiles       compute large images in tiles
    checkpoint  read weights and check that they fit
    run         a training: optimiser, averaged weights, log, checkpoints, resuming
    pairs       a folder of pairs and its table

Rooms import from the rooms above them. None knows a stage, or a flag of one stage only.
"""


class UserError(ValueError):
    """A mistake that the user can correct: printed as one sentence, with exit code 2."""


def require(condition: bool, sentence: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(sentence)
