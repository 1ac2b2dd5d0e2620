"""Decompression of chunks from elsewhere to exactly the size that is expected, whatever the data claim."""

from __future__ import annotations

import bz2
import zlib
from typing import Any

import numpy as np

from simtoreal.envs.errors import DatasetError, require

IMAGE_CODECS = {"imagecodecs_jpegxl": "jpegxl_decode", "imagecodecs_jpeg2k": "jpeg2k_decode"}
CODECS = ("blosc", "bz2", "gzip", "lz4", "zlib", "zstd", *IMAGE_CODECS)
"""Every ``id`` of a compressor that is read."""


def decompress(stored: bytes, codec: str | None, expected: int, where: str) -> bytes:
    """Return exactly ``expected`` bytes, never allocating for more, whatever the data claim.

    Raises:
        DatasetError: the data give another size, or are damaged.
    """
    try:
        if codec is None:
            content = stored
        elif codec in ("zlib", "gzip"):
            content = zlib.decompressobj(wbits=47).decompress(stored, expected + 1)
        elif codec == "bz2":
            content = bz2.BZ2Decompressor().decompress(stored, expected + 1)
        else:
            if declared_size(stored, codec) != expected:
                raise ValueError(f"its header says {declared_size(stored, codec)} bytes")
            numcodecs: Any = require("numcodecs", "zarr")
            content = bytes(numcodecs.get_codec({"id": codec}).decode(stored))
    except (ValueError, RuntimeError, zlib.error, OSError, EOFError) as error:
        raise DatasetError(f"{where} cannot be decompressed with {codec} to {expected} bytes ({error}).") from error
    if len(content) != expected:
        raise DatasetError(f"{where} holds {len(content)} bytes or more, expected {expected}.")
    return content


def declared_size(stored: bytes, codec: str) -> int:
    """Uncompressed size that the header of a blosc, lz4 (numcodecs) or zstd block declares.

    Raises:
        ValueError: the block is too short, or a zstd frame does not say its size (RFC 8878, 3.1.1.1).
    """
    if codec == "blosc" and len(stored) >= 16:
        return int.from_bytes(stored[4:8], "little")
    if codec == "lz4" and len(stored) >= 4:
        return int.from_bytes(stored[:4], "little")
    if codec == "zstd" and stored[:4] == b"\x28\xb5\x2f\xfd" and len(stored) > 4:
        flags = stored[4]
        single, size_code = bool(flags & 0x20), flags >> 6
        length = (1 if single else 0, 2, 4, 8)[size_code]
        begin = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
        if length == 0 or len(stored) < begin + length:
            raise ValueError("the frame does not say its size")
        return int.from_bytes(stored[begin : begin + length], "little") + (256 if length == 2 else 0)
    raise ValueError(f"no header of {codec}")


def decode_image(stored: bytes, codec: str, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> np.ndarray:
    """Return the image in ``stored`` (``codec`` of :data:`IMAGE_CODECS`) as an array of ``shape``.

    Raises:
        DatasetError: it is damaged or of another size.
        MissingDependencyError: imagecodecs is not installed.
    """
    imagecodecs = require("imagecodecs", "zarr")
    # Decoding into an array of the declared size refuses an image that is larger.
    image = np.empty(tuple(size for size in shape if size > 1), dtype=dtype)
    try:
        getattr(imagecodecs, IMAGE_CODECS[codec])(stored, out=image)
    except (RuntimeError, ValueError) as error:
        raise DatasetError(f"{where} is not an image of shape {image.shape} ({error}).") from error
    return image.reshape(shape)
