"""Checkpoints that survive kills, full disks, power cuts and bit rot.

A checkpoint of one process is an Orbax directory named after its step. It stores every array of a state under its path
(`params/conv1/kernel`), the record of `flaxvision.manifest` as custom metadata, and a file of checksums. Orbax loads
some corrupt files silently and crashes on others. The files are therefore verified before Orbax reads them, and the
arrays afterwards. Several processes write a checkpoint together, without Orbax; see `flaxvision.checkpoint.pieces`.

`save` copies the state to the host and returns. A thread writes a temporary directory, reads it back and renames it, so
a checkpoint is either complete or absent. Only then are older checkpoints deleted.
"""

from flaxvision.checkpoint.checkpoints import Checkpoints, DamagedCheckpointError, Restored

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored"]
