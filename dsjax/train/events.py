"""TensorBoard event files: a TFRecord of protocol buffers, numbers only.

Written here because the libraries that do it import torch or TensorFlow where those are installed, seconds of a start.
"""

import struct
from pathlib import Path

_START = b"\x08\x01"  # SessionLog(status=START)


class EventFile:
    """An event file. What is added is on disk after `flush`."""

    def __init__(self, path: Path):
        self.file = path.open("wb")
        self._record(_number(1, 0.0) + _bytes(3, b"brain.Event:2"))
        self._record(_number(1, 0.0) + b"\x10\x00" + _bytes(7, _START))  # forget what other files say of these steps

    def add(self, step: int, values: dict[str, float], time: float) -> None:
        """Numbers of a step by name, at a time in seconds."""
        summary = b"".join(
            _bytes(1, _bytes(1, name.encode()) + b"\x15" + struct.pack("<f", value)) for name, value in values.items()
        )
        self._record(_number(1, time) + b"\x10" + _varint(step) + _bytes(5, summary))

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _record(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self.file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _number(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [n >> 1 ^ (0x82F63B78 if n & 1 else 0) for n in table]
    return table


_CRC = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C as TFRecord masks it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
