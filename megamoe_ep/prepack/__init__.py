"""From checkpoint layout to the one that a GPU's grouped GEMMs read, and back; once, at load.

One module per layout, with ``pack`` and its inverse ``unpack``. Plain torch, on any device.
"""

MAX_EXPERTS = 1024  # of one rank: csrc's kernels keep their offsets in shared memory
