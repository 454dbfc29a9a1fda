# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""The codecs of compressed clusters: raw deflate (https://www.rfc-editor.org/rfc/rfc1951) and zstd (https://www.rfc-editor.org/rfc/rfc8878).

Every codec releases the GIL. A decoder yields exactly the length asked for, ignores what follows in its input, and never holds more than that.
"""

from __future__ import annotations

import sys
import zlib

from . import kernels
from .errors import Corrupt, Unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Optional

    from _typeshed import ReadableBuffer

    Compress = Callable[[ReadableBuffer], bytes]
    Decompress = Callable[[ReadableBuffer, int], bytes]

# qcow2 readers decode with a window of 4 KiB, so an encoder must not reach further back.
_DEFLATE_WINDOW_BITS = -12
_INFLATE_WINDOW_BITS = -15
# As QEMU, so that compressed clusters are the same bytes without the accelerator, whose encoder is faster and not zlib's.
_DEFLATE_MEMORY_LEVEL = 9
_DEFLATE_LEVEL = 6
_ZSTD_LEVEL = 3
# What a frame may claim as memory for its decoder: RFC 8878, 3.1.1.1.2 recommends 8 MiB to decoders as the least and to encoders as the most.
_ZSTD_WINDOW_BITS = 23

_zstd: Optional[tuple[Compress, Decompress]] = None


def deflate(view: ReadableBuffer) -> bytes:
    """Raw deflate with a window of 4 KiB; the result may be longer than the input."""
    module = kernels.native()
    if module is not None:
        return bytes(module.deflate(view, _DEFLATE_LEVEL, _DEFLATE_WINDOW_BITS))
    codec = zlib.compressobj(_DEFLATE_LEVEL, zlib.DEFLATED, _DEFLATE_WINDOW_BITS, _DEFLATE_MEMORY_LEVEL)
    return codec.compress(view) + codec.flush()


def inflate(view: ReadableBuffer, length: int) -> bytes:
    """The first `length` bytes of a raw deflate stream; Corrupt if it is damaged or shorter."""
    if not length:
        return b""  # zlib takes a bound of zero for none
    module = kernels.native()
    try:
        if module is not None:
            data = module.inflate(view, length, _INFLATE_WINDOW_BITS)
        else:
            data = zlib.decompressobj(_INFLATE_WINDOW_BITS).decompress(view, length)
    except (zlib.error, ValueError) as error:
        raise Corrupt("deflate stream is damaged: %s" % error) from None
    return _exactly(data, length, "deflate")


def zstd_compress(view: ReadableBuffer) -> bytes:
    """One zstd frame; Unsupported if no zstd library is installed."""
    return _zstd_codec()[0](view)


def zstd_decompress(view: ReadableBuffer, length: int) -> bytes:
    """The first `length` bytes of a zstd frame; Corrupt if it is damaged or shorter, Unsupported if no zstd library is installed."""
    if not length:
        return b""
    return _exactly(_zstd_codec()[1](view, length), length, "zstd")


def _exactly(data: bytes, length: int, name: str) -> bytes:
    if len(data) != length:
        raise Corrupt("%s stream yields %d bytes instead of %d" % (name, len(data), length))
    return data


def _zstd_codec() -> tuple[Compress, Decompress]:
    global _zstd
    if _zstd is None:
        _zstd = _native_zstd() or _standard_zstd() or _zstandard() or _pyzstd()
        if _zstd is None:
            raise Unsupported("zstd compression needs the Python package diskwright-accel, zstandard or pyzstd (or Python 3.14 and later)")
    return _zstd


def _native_zstd() -> Optional[tuple[Compress, Decompress]]:
    module = kernels.native()
    if module is None:
        return None
    encode, decode = module.zstd_compress, module.zstd_decompress

    def compress(view: ReadableBuffer) -> bytes:
        return bytes(encode(view, _ZSTD_LEVEL))

    def decompress(view: ReadableBuffer, length: int) -> bytes:
        try:
            return bytes(decode(view, length))
        except ValueError as error:
            raise _damaged(error) from None

    return compress, decompress


def _standard_zstd() -> Optional[tuple[Compress, Decompress]]:
    if sys.version_info < (3, 14):
        return None
    try:
        from compression import zstd  # Python's own package; this module is diskwright.compression
    except ImportError:  # Python built without it
        return None

    def compress(view: ReadableBuffer) -> bytes:
        return bytes(zstd.compress(view, _ZSTD_LEVEL))

    def decompress(view: ReadableBuffer, length: int) -> bytes:
        codec = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_BITS})
        try:
            return bytes(codec.decompress(view, length))
        except zstd.ZstdError as error:
            raise _damaged(error) from None

    return compress, decompress


def _zstandard() -> Optional[tuple[Compress, Decompress]]:
    try:
        import zstandard
    except ImportError:
        return None

    def compress(view: ReadableBuffer) -> bytes:
        return bytes(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(view))

    def decompress(view: ReadableBuffer, length: int) -> bytes:
        try:
            # A reader stops at the length; one-shot calls trust the size that the frame claims for itself.
            with zstandard.ZstdDecompressor(max_window_size=1 << _ZSTD_WINDOW_BITS).stream_reader(view) as reader:
                return bytes(reader.read(length))
        except zstandard.ZstdError as error:
            raise _damaged(error) from None

    return compress, decompress


def _pyzstd() -> Optional[tuple[Compress, Decompress]]:
    try:
        import pyzstd
    except ImportError:
        return None

    def compress(view: ReadableBuffer) -> bytes:
        return bytes(pyzstd.compress(view, _ZSTD_LEVEL))

    def decompress(view: ReadableBuffer, length: int) -> bytes:
        codec = pyzstd.ZstdDecompressor(option={pyzstd.DParameter.windowLogMax: _ZSTD_WINDOW_BITS})
        try:
            return bytes(codec.decompress(view, length))
        except pyzstd.ZstdError as error:
            raise _damaged(error) from None

    return compress, decompress


def _damaged(error: Exception) -> Corrupt:
    return Corrupt("zstd stream is damaged: %s" % error)
