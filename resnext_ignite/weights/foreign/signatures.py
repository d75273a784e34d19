"""How the files of Torch7, Caffe and MXNet begin; apart from their readers, which load only where one is opened."""

from __future__ import annotations

import struct

# The first object of a file is a table (3) or an object (4), and the first of all objects (1).
TORCH7 = (struct.pack("<ii", 3, 1), struct.pack("<ii", 4, 1))
# A NetParameter begins with its name (field 1) or, where it has none, with its first layer (field 100).
CAFFE = (b"\x0a", b"\xa2\x06")
# An unsigned 64-bit number before all arrays.
MXNET = struct.pack("<Q", 0x112)
