"""Defines the first bytes of Torch7, Caffe and MXNet files, which identify the format.

The readers of these formats are in other modules. A reader is imported only if a file has its format.
"""

from __future__ import annotations

import struct

# The first value of a .t7 file is a table (type 3) or an object (type 4), and has the number 1.
TORCH7 = (struct.pack("<ii", 3, 1), struct.pack("<ii", 4, 1))
# A .caffemodel is a NetParameter. It begins with its name (field 1) or, without a name, with a layer (field 100).
CAFFE = (b"\x0a", b"\xa2\x06")
# The magic number at the start of a .params file, an unsigned 64-bit integer.
MXNET = struct.pack("<Q", 0x112)
