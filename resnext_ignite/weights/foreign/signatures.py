"""The first bytes of Torch7, Caffe and MXNet files. Their readers are separate: they are imported only when needed."""

from __future__ import annotations

import struct

# The first value of a file is a table (type 3) or an object (type 4), and has the number 1.
TORCH7 = (struct.pack("<ii", 3, 1), struct.pack("<ii", 4, 1))
# A NetParameter begins with its name (field 1). Without a name, it begins with its first layer (field 100).
CAFFE = (b"\x0a", b"\xa2\x06")
# The magic number before the arrays, an unsigned 64-bit integer.
MXNET = struct.pack("<Q", 0x112)
