"""CRC-32C (Castagnoli), as TFRecord files have it.

A checksum is linear in the bytes: a long text is cut into lanes that numpy carries on side by side, and what they come
to is joined.
"""

from __future__ import annotations

POLYNOMIAL = 0x82F63B78
LANES = 512
SHORT = 2048


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
    return byte


TABLE = [_entry(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    if len(data) < SHORT:
        return _carry_on(0xFFFFFFFF, data) ^ 0xFFFFFFFF
    # Not above: a loader's workers need it for short texts only, and start the sooner.
    import numpy as np

    table = np.array(TABLE, np.uint32)
    width = len(data) // LANES
    head = width * LANES
    columns = np.frombuffer(data, np.uint8, head).reshape(LANES, width).T.copy()
    lanes = np.zeros(LANES, np.uint32)
    lanes[0] = 0xFFFFFFFF
    for column in columns:
        lanes = table[(lanes ^ column) & 0xFF] ^ (lanes >> np.uint32(8))
    shift = _shift(width)
    register = 0
    for lane in lanes:
        register = _apply(shift, register) ^ int(lane)
    return _carry_on(register, data[head:]) ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    """As it stands in a TFRecord file."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _carry_on(register: int, data: bytes) -> int:
    for byte in data:
        register = TABLE[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register


def _shift(zeros: int) -> list[int]:
    """What so many zero bytes do to a register: the images of its 32 bits."""
    result = [1 << bit for bit in range(32)]
    power = [_carry_on(1 << bit, b"\0") for bit in range(32)]
    while zeros:
        if zeros & 1:
            result = [_apply(power, each) for each in result]
        power = [_apply(power, each) for each in power]
        zeros >>= 1
    return result


def _apply(images: list[int], register: int) -> int:
    result = 0
    for bit in range(32):
        if register >> bit & 1:
            result ^= images[bit]
    return result
