"""Checkpoints that survive kills, full disks, power cuts and bit rot.

A checkpoint is an Orbax directory `<step>` with every array of a state under its path (`params/conv1/kernel`), the
record of `flaxvision.manifest` as custom metadata, and a file of checksums. Orbax loads some flipped bits silently and
crashes on others, so the files are verified before Orbax reads them and the arrays afterwards. A run of several
processes writes the directory together, without Orbax; see `flaxvision.checkpoint.pieces`.

`save` brings the state to the host and returns. A thread writes a temporary directory, reads it back, renames it and
only then deletes older checkpoints, so a checkpoint is either complete or absent.
"""

from flaxvision.checkpoint.checkpoints import Checkpoints, DamagedCheckpointError, Restored

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored"]
