//! zstd_compress and zstd_decompress: one frame, <https://www.rfc-editor.org/rfc/rfc8878>.

use std::cell::RefCell;

use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use zstd_safe::{CCtx, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::args::{limit as checked_limit, value_error, Int};
use crate::buffer::Buffer;

/// The most that is allocated before a frame has proved that it holds as much.
const FIRST_ROOM: usize = 2 << 20;

/// What a frame may claim as memory for its decoder: RFC 8878, 3.1.1.1.2 recommends 8 MiB to decoders as the least and to encoders as the most.
const WINDOW_BITS: u32 = 23;

thread_local! {
    // A context takes longer to set up than a cluster to encode.
    static ENCODER: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
    static DECODER: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

enum Failure {
    Codec(&'static str),
    Memory,
}

impl From<usize> for Failure {
    fn from(code: usize) -> Self {
        Failure::Codec(zstd_safe::get_error_name(code))
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Codec(text) => PyValueError::new_err(text),
            Failure::Memory => PyMemoryError::new_err(()),
        }
    }
}

fn room(data: &mut Vec<u8>, size: usize) -> Result<(), Failure> {
    data.try_reserve_exact(size - data.len()).map_err(|_| Failure::Memory)?;
    data.resize(size, 0);
    Ok(())
}

fn compress(bytes: &[u8], level: i32) -> Result<Vec<u8>, Failure> {
    let mut frame = Vec::new();
    frame
        .try_reserve_exact(zstd_safe::compress_bound(bytes.len()))
        .map_err(|_| Failure::Memory)?;
    ENCODER.with_borrow_mut(|encoder| encoder.compress(&mut frame, bytes, level))?;
    Ok(frame)
}

fn decompress(bytes: &[u8], limit: usize) -> Result<Vec<u8>, Failure> {
    DECODER.with_borrow_mut(|decoder| {
        decoder.reset(ResetDirective::SessionOnly)?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_BITS))?;
        let mut data = Vec::new();
        let mut filled = 0;
        let mut input = InBuffer::around(bytes);
        while filled < limit {
            if filled == data.len() {
                let size = data.len().saturating_mul(2).clamp(FIRST_ROOM.min(limit), limit);
                room(&mut data, size)?;
            }
            let mut output = OutBuffer::around_pos(&mut data[..], filled);
            let consumed = input.pos;
            let wanted = decoder.decompress_stream(&mut output, &mut input)?;
            let produced = output.pos() - filled;
            filled = output.pos();
            if wanted == 0 {
                break;
            }
            if produced == 0 && input.pos == consumed {
                return Err(Failure::Codec("Frame is cut off"));
            }
        }
        data.truncate(filled);
        Ok(data)
    })
}

/// One zstd frame with the bytes of a buffer.
#[pyfunction]
pub fn zstd_compress<'py>(buffer: &Bound<'py, PyAny>, level: Int) -> PyResult<Bound<'py, PyBytes>> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let level = match i32::try_from(level.0) {
        Ok(level) if (zstd_safe::min_c_level()..=zstd_safe::max_c_level()).contains(&level) => level,
        _ => return value_error("level is out of range"),
    };
    let bytes = buffer.bytes();
    let frame = py.detach(|| compress(bytes, level))?;
    Ok(PyBytes::new(py, &frame))
}

/// The first bytes, `limit` at most, of a zstd frame; ValueError if it is damaged.
#[pyfunction]
pub fn zstd_decompress<'py>(buffer: &Bound<'py, PyAny>, limit: Int) -> PyResult<Bound<'py, PyBytes>> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let limit = checked_limit(limit)?;
    let bytes = buffer.bytes();
    let data = py.detach(|| decompress(bytes, limit))?;
    Ok(PyBytes::new(py, &data))
}
