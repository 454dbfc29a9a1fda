# Copyright (c) 2026 The Diskwright authors
# SPDX-License-Identifier: Apache-2.0
"""Raw images that are compressed as a whole: gzip (https://www.rfc-editor.org/rfc/rfc1952), xz (https://tukaani.org/xz/xz-file-format.txt),
bzip2, and zstd (https://www.rfc-editor.org/rfc/rfc8878).

They are read from the beginning to the end; what was read last is kept, so that several readers that are close together do not
disturb one another. Going back further means starting anew.
"""

from __future__ import annotations

from _thread import allocate_lock

from ..errors import Corrupt, Error, OptionError, ReadOnly, Unsupported
from ..extent import ALLOCATED, DATA, Extent
from ..node import Format, OpenFlags
from ..options import Options, Size, opt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, ClassVar, Iterable, Iterator, Optional

    from ..options import NodeRef

SECTOR = 512
INPUT = 64 << 10  # bytes of the file that a codec gets at a time
OUTPUT = 256 << 10  # and bytes that it may yield
WINDOW = 8 << 20  # bytes that are kept of what was read: more than all threads of a copy have in hand
MEMORY = 96 << 20  # bytes that an xz or zstd codec may use; `xz -9` needs 65 MiB
ZSTD_WINDOW_BITS = 26
XZ_STREAMS = 1000  # of a file, with their padding; and
XZ_INDEX = 1 << 20  # bytes of an index: where there is more, the file is read to see what comes out
LIMIT_FREE = 64 << 20  # bytes of the disk that are never too much
LIMIT_RATIO = 2000  # and how often the length of the file may be added to that
EINVAL, EACCES, ENOTSUP, EFBIG = 22, 13, 95, 27

# what is not a raw image, where it lies inside
OTHERS = ((b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"conectix", "vpc"), (b"QED\0", "qed"))


class WrappedOptions(Options):
    """Runtime options of gzip, xz, bzip2 and zstd."""

    file: NodeRef = opt(help="the node that holds the compressed image")
    limit: Optional[Size] = opt(None, help="how many bytes may come out (default: 64 MiB, and 2000 for each byte of the file)")


class Wrapped(Format):
    """A compressed raw image. Its size is known once all of it was read."""

    options_class = WrappedOptions
    strong_options = ("limit",)
    magic: ClassVar[bytes] = b""
    streamed = True
    unwritable = True

    options: WrappedOptions

    def __init__(self, options: WrappedOptions, flags: OpenFlags) -> None:
        super().__init__(options, flags)
        if flags.writable:
            raise ReadOnly("A %s image can only be read" % self.driver, errno=EACCES)
        if options.limit is not None and options.limit >> 63:
            raise OptionError("Parameter 'limit' expects a number below 2^63")
        self.decodes = True
        self.limit = options.limit if options.limit is not None else LIMIT_FREE + LIMIT_RATIO * self.file.size
        self._known = False
        self._reading = allocate_lock()
        self._codec_stream = Unpacker(self)
        self._window = bytearray()  # what came out last
        self._end = 0  # where it ends on the disk

    @property
    def size(self) -> int:
        with self._reading:
            if not self._known:
                stated = self.stated_size()
                if stated is not None and stated > self.limit:
                    raise too_much(self)
                self._size = stated if stated is not None else sum(len(data) for data in iter(Unpacker(self).read, b""))
                self._known = True
        return -(-self._size // SECTOR) * SECTOR

    def preload(self) -> None:
        self.codec()
        super().preload()

    def _map(self, offset: int, length: int) -> Iterable[Extent]:
        return (Extent(offset, length, DATA | ALLOCATED, self, offset),)

    def _pread_into(self, host_offset: int, view: memoryview) -> None:
        with self._reading:
            start = self._end - len(self._window)
            if host_offset < start:
                self._codec_stream, self._window, self._end = Unpacker(self), bytearray(), 0
            stop = host_offset + len(view)
            while self._end < stop:
                data = self._codec_stream.read()
                if not data:
                    break
                self._window += data
                self._end += len(data)
                useless = host_offset - WINDOW - (self._end - len(self._window))
                if useless > WINDOW:
                    del self._window[:useless]
            at = host_offset - (self._end - len(self._window))
            found = memoryview(self._window)[at : at + len(view)]
            view[: len(found)] = found
            view[len(found) :] = bytes(len(view) - len(found))
            found.release()

    def unpack(self) -> Iterator[bytes]:
        return iter(Unpacker(self).read, b"")

    def codec(self) -> Any:
        """A new decoder, as bz2.BZ2Decompressor is one."""
        raise NotImplementedError

    def stated_size(self) -> Optional[int]:
        """How many bytes come out, as the file says it itself; None where it does not."""
        return None

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(cls.magic) else 0


class Unpacker:
    """One pass over the file: members, one after the other."""

    def __init__(self, image: Wrapped) -> None:
        self.image = image
        self._codec: Any = None
        self._position = 0  # in the file
        self._input = b""
        self._count = 0  # bytes that came out
        self._members = 0

    def read(self) -> bytes:
        """The next bytes, at most OUTPUT of them; empty at the end. Raises Corrupt, Unsupported."""
        while True:
            if self._codec is None and not self._next_member():
                return b""
            codec = self._codec
            if not self._input and codec.needs_input:
                self._input = self._more()
                if not self._input:
                    raise self._damaged("it ends too early")
            try:
                data = bytes(codec.decompress(self._input, OUTPUT))
            except (EOFError, MemoryError, ValueError, OSError, ArithmeticError) as exc:
                raise self._damaged(str(exc) or type(exc).__name__) from exc
            except Exception as exc:  # each library has an exception of its own
                if isinstance(exc, Error):
                    raise
                raise self._damaged(str(exc)) from exc
            self._input = b""
            if codec.eof:
                self._input = codec.unused_data
                self._codec = None
            if data:
                return self._counted(data)

    def _counted(self, data: bytes) -> bytes:
        image = self.image
        if not self._count:
            for magic, name in OTHERS:
                if data.startswith(magic):
                    text = "There is a %s image inside: unpack it first, since only raw images are read as a stream" % name
                    raise Unsupported(text, filename=image.filename, errno=ENOTSUP)
        self._count += len(data)
        if self._count > image.limit:
            raise too_much(image)
        return data

    def _more(self) -> bytes:
        count = min(INPUT, self.image.file.size - self._position)
        data = self.image.file.pread(self._position, count) if count > 0 else b""
        self._position += len(data)
        return data

    def _next_member(self) -> bool:
        """Begin with the next member; False if there is none. Zeroes between them and at the end are padding."""
        while True:
            self._input = self._input.lstrip(b"\0") if self._members else self._input
            if len(self._input) < len(self.image.magic):
                more = self._more()
                if more:
                    self._input += more
                    continue
            if not self._input:
                return False
            if not self._input.startswith(self.image.magic):
                raise self._damaged("it is followed by something else" if self._members else "it does not begin like one")
            self._members += 1
            self._codec = self.image.codec()
            return True

    def _damaged(self, why: str) -> Corrupt:
        text = "%s: the %s file is damaged at %d: %s" % (self.image.filename or self.image.file.filename, self.image.driver, self._position, why)
        return Corrupt(text, filename=self.image.filename, offset=self._position, errno=EINVAL)


def too_much(image: Wrapped) -> Corrupt:
    """The error for a file that may be a bomb."""
    text = "More than %d bytes come out of a %s file of %d bytes; the option limit=SIZE allows more" % (image.limit, image.driver, image.file.size)
    return Corrupt(text, filename=image.filename, errno=EFBIG)


class _Inflate:
    """zlib's decoder, in the manner of the others."""

    def __init__(self) -> None:
        import zlib

        self._codec = zlib.decompressobj(31)

    @property
    def needs_input(self) -> bool:
        return not self._codec.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._codec.eof

    @property
    def unused_data(self) -> bytes:
        return self._codec.unused_data

    def decompress(self, data: bytes, length: int) -> bytes:
        return self._codec.decompress(self._codec.unconsumed_tail + data, length)


class Gzip(Wrapped):
    """A raw image in a gzip file."""

    driver = "gzip"
    magic = b"\x1f\x8b\x08"

    def codec(self) -> Any:
        return _Inflate()


class Xz(Wrapped):
    """A raw image in an xz file."""

    driver = "xz"
    magic = b"\xfd7zXZ\0"

    def codec(self) -> Any:
        try:
            import lzma
        except ImportError as exc:  # Python built without it
            raise Unsupported("xz files need Python's module lzma", filename=self.filename, errno=ENOTSUP) from exc
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, MEMORY)

    def stated_size(self) -> Optional[int]:
        """The sum of what the indexes of all streams say, from the last one on; the decoder holds them against the content."""
        end, total = self.file.size, 0
        for _stream in range(XZ_STREAMS):
            footer = self.file.pread(end - 12, 12) if end >= 32 else b""
            if footer[8:] == bytes(4):  # padding
                end -= 4
                continue
            length = (int.from_bytes(footer[4:8], "little") + 1) * 4
            start = end - 12 - length
            if footer[10:] != b"YZ" or not 0 < start or length > XZ_INDEX:
                return None
            sizes = _xz_index(self.file.pread(start, length))
            if sizes is None:
                return None
            end = start - sizes[0] - 12
            total += sizes[1]
            if end == 0:
                return total
            if end < 0:
                return None
        return None


def _xz_index(index: bytes) -> Optional[tuple[int, int]]:
    """The bytes of all blocks of a stream, in the file and unpacked, as its index says; None for what is no index."""
    numbers: list[int] = []
    value = shift = 0
    for byte in index[1:-4]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers.append(value)
            value = shift = 0
            if len(numbers) == 2 * numbers[0] + 1:
                break
        elif shift > 63:
            return None
    if index[:1] != b"\0" or not numbers or len(numbers) != 2 * numbers[0] + 1:
        return None
    return sum(-(-size // 4) * 4 for size in numbers[1::2]), sum(numbers[2::2])


class Bzip2(Wrapped):
    """A raw image in a bzip2 file."""

    driver = "bzip2"
    magic = b"BZh"

    def codec(self) -> Any:
        try:
            import bz2
        except ImportError as exc:  # Python built without it
            raise Unsupported("bzip2 files need Python's module bz2", filename=self.filename, errno=ENOTSUP) from exc
        return bz2.BZ2Decompressor()

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        known = head[3:4].isdigit() and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
        return 100 if head.startswith(cls.magic) and known else 0


class Zstd(Wrapped):
    """A raw image in a zstd file."""

    driver = "zstd"
    magic = b"\x28\xb5\x2f\xfd"

    def codec(self) -> Any:
        codec = _standard_zstd() or _pyzstd() or _zstandard()
        if codec is None:
            text = "zstd files need the Python package pyzstd or zstandard (or Python 3.14 and later)"
            raise Unsupported(text, filename=self.filename, errno=ENOTSUP)
        return codec


def _standard_zstd() -> Any:
    import sys

    if sys.version_info < (3, 14):
        return None
    try:
        from compression import zstd  # Python's own package
    except ImportError:
        return None
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_BITS})


def _pyzstd() -> Any:
    try:
        import pyzstd
    except ImportError:
        return None
    return pyzstd.ZstdDecompressor(option={pyzstd.DParameter.windowLogMax: ZSTD_WINDOW_BITS})


class _Zstandard:
    """The decoder of the package zstandard, in the manner of the others: it takes little, since it gives all that comes of it."""

    STEP = 256  # bytes; a block of 128 KiB takes four of them at least

    def __init__(self, codec: Any) -> None:
        self._codec = codec
        self._input = b""
        self.eof = False
        self.unused_data = b""

    @property
    def needs_input(self) -> bool:
        return not self._input

    def decompress(self, data: bytes, length: int) -> bytes:
        data = self._input + data
        step, self._input = data[: self.STEP], data[self.STEP :]
        found = self._codec.decompress(step)
        if self._codec.eof:
            self.eof = True
            self.unused_data = self._codec.unused_data + self._input
        return bytes(found)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        return None
    return _Zstandard(zstandard.ZstdDecompressor(max_window_size=1 << ZSTD_WINDOW_BITS).decompressobj())
