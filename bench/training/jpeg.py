"""JPEGs of a wanted length. Needs Pillow."""

from __future__ import annotations

import random
from functools import cache
from io import BytesIO

from PIL import Image

KINDS = 2
"""Pictures of each size; files differ by what is in their comments."""
SMALLEST = 2048
_COMMENT = b"\xff\xfe"
_LONGEST = 65_533
_END = b"\xff\xd9"


def jpeg(seed: str, size: int) -> bytes:
    """The same for the same seed, size and Pillow: a picture with as many pixels as fit, and comments up to `size`."""
    if size < SMALLEST:
        raise ValueError(f"a JPEG of {size} bytes: at least {SMALLEST} are needed")
    random_ = random.Random(seed)
    kind = random_.randrange(KINDS)
    width = 32
    while len(_picture(kind, width * 5 // 4)) + 4 <= size:
        width = width * 5 // 4
    picture = _picture(kind, width)
    return picture[:2] + _comments(random_, size - len(picture)) + picture[2:]


def _comments(random_: random.Random, size: int) -> bytes:
    """Segments of so many bytes together: 0, or at least 4."""
    if size == 0:
        return b""
    if size < 4:
        raise ValueError(f"a comment of {size} bytes: at least 4 are needed")
    pieces = []
    while size:
        length = min(size - 2, _LONGEST)
        if 0 < size - 2 - length < 4:
            length -= 4
        pieces.append(_COMMENT + length.to_bytes(2, "big") + random_.randbytes(length - 2))
        size -= length + 2
    return b"".join(pieces)


@cache
def _picture(kind: int, width: int) -> bytes:
    """4 : 3, with detail such as photographs have: half a byte for a pixel."""
    height = width * 3 // 4
    random_ = random.Random(f"{kind}/{width}")
    image = Image.new("RGB", (width, height))
    for share in (16, 4, 2):
        small = (max(1, width // share), max(1, height // share))
        layer = Image.frombytes("RGB", small, random_.randbytes(3 * small[0] * small[1]))
        image = Image.blend(image, layer.resize((width, height), Image.Resampling.BICUBIC), 0.5)
    out = BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()
