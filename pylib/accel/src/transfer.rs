//! gather and scatter: ranges of files from and to ranges of one buffer.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

use crate::args::{value_error, Int};
use crate::buffer::Buffer;

const EIO: i32 = 5;

struct Transfer {
    fd: RawFd,
    offset: u64,
    start: usize,
    end: usize,
}

enum Failure {
    System(i32),
    Python(PyErr),
}

impl Failure {
    /// An interrupted call is tried again once Python's signal handlers have run; all else ends the kernel.
    fn unless_interrupted(error: &io::Error) -> Result<(), Failure> {
        if error.kind() == io::ErrorKind::Interrupted {
            return Python::attach(|py| py.check_signals()).map_err(Failure::Python);
        }
        Err(Failure::System(error.raw_os_error().unwrap_or(EIO)))
    }

    fn into_error(self, py: Python<'_>) -> PyErr {
        match self {
            Failure::Python(error) => error,
            Failure::System(number) => {
                let text = py.import("os").and_then(|os| os.call_method1("strerror", (number,)));
                match text {
                    Ok(text) => PyOSError::new_err((number, text.unbind())),
                    Err(error) => error,
                }
            }
        }
    }
}

fn checked(transfers: Vec<(Int, Int, Int, Int)>, size: usize) -> PyResult<Vec<Transfer>> {
    let mut result = Vec::with_capacity(transfers.len());
    for (fd, offset, at, length) in transfers {
        let fd = match RawFd::try_from(fd.0) {
            Ok(fd) if fd >= 0 => fd,
            _ => return value_error("file descriptor is out of range"),
        };
        if length.0 < 0 || offset.0 < 0 || offset.0.saturating_add(length.0) == i64::MAX {
            return value_error("file range is out of range");
        }
        let (start, length) = crate::args::within(at, length, size)?;
        result.push(Transfer {
            fd,
            offset: offset.0 as u64,
            start,
            end: start + length,
        });
    }
    Ok(result)
}

/// The file behind a caller's descriptor, which is not ours to close.
fn borrowed(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: the descriptor is not -1 and is never closed through this File; one that is not open makes its calls fail with EBADF.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

fn read_all(transfers: &[Transfer], buffer: &mut [u8]) -> Result<(), Failure> {
    for transfer in transfers {
        let file = borrowed(transfer.fd);
        let mut rest = &mut buffer[transfer.start..transfer.end];
        let mut offset = transfer.offset;
        while !rest.is_empty() {
            match file.read_at(rest, offset) {
                Ok(0) => break,
                Ok(done) => {
                    rest = &mut rest[done..];
                    offset += done as u64;
                }
                Err(error) => Failure::unless_interrupted(&error)?,
            }
        }
        rest.fill(0);
    }
    Ok(())
}

fn write_all(transfers: &[Transfer], buffer: &[u8]) -> Result<(), Failure> {
    for transfer in transfers {
        let file = borrowed(transfer.fd);
        let mut rest = &buffer[transfer.start..transfer.end];
        let mut offset = transfer.offset;
        while !rest.is_empty() {
            match file.write_at(rest, offset) {
                // A device that takes nothing and says nothing would keep us here for ever.
                Ok(0) => return Err(Failure::System(EIO)),
                Ok(done) => {
                    rest = &rest[done..];
                    offset += done as u64;
                }
                Err(error) => Failure::unless_interrupted(&error)?,
            }
        }
    }
    Ok(())
}

/// Read ranges of files into ranges of a buffer; zeroes past the end of a file.
#[pyfunction]
pub fn gather(reads: Vec<(Int, Int, Int, Int)>, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = buffer.py();
    let mut buffer = Buffer::writable(buffer)?;
    let transfers = checked(reads, buffer.len())?;
    let bytes = buffer.bytes_mut();
    py.detach(|| read_all(&transfers, bytes))
        .map_err(|failure| failure.into_error(py))
}

/// Write ranges of a buffer to ranges of files.
#[pyfunction]
pub fn scatter(writes: Vec<(Int, Int, Int, Int)>, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let transfers = checked(writes, buffer.len())?;
    let bytes = buffer.bytes();
    py.detach(|| write_all(&transfers, bytes))
        .map_err(|failure| failure.into_error(py))
}
