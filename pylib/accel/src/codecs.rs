//! zstd_compress and zstd_decompress: one frame, <https://www.rfc-editor.org/rfc/rfc8878>; deflate and inflate: one stream,
//! <https://www.rfc-editor.org/rfc/rfc1951>, bare or in a zlib wrapper, <https://www.rfc-editor.org/rfc/rfc1950>.

use std::cell::RefCell;

use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use zlib_rs::{compress_bound, Deflate, DeflateConfig, DeflateFlush, Inflate, InflateFlush, Status};
use zstd_safe::{CCtx, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::args::{limit as checked_limit, value_error, Int};
use crate::buffer::Buffer;

/// The most that is allocated before a frame has proved that it holds as much.
const FIRST_ROOM: usize = 2 << 20;

/// What a frame may claim as memory for its decoder: RFC 8878, 3.1.1.1.2 recommends 8 MiB to decoders as the least and to encoders as the most.
const WINDOW_BITS: u32 = 23;

/// The most that zlib's interface knows.
const DEFLATE_MEMORY_LEVEL: i32 = 9;

thread_local! {
    // A context takes longer to set up than a cluster to encode.
    static DEFLATER: RefCell<Option<(i32, i32, Deflate)>> = const { RefCell::new(None) };
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

fn deflate_all(bytes: &[u8], level: i32, window_bits: i32) -> Result<Vec<u8>, Failure> {
    let mut stream = Vec::new();
    room(&mut stream, compress_bound(bytes.len()) + 64)?;
    DEFLATER.with_borrow_mut(|kept| {
        if !matches!(kept, Some((kept_level, kept_bits, _)) if (*kept_level, *kept_bits) == (level, window_bits)) {
            let config = DeflateConfig {
                window_bits,
                mem_level: DEFLATE_MEMORY_LEVEL,
                ..DeflateConfig::new(level)
            };
            *kept = Some((level, window_bits, Deflate::new_with_config(config)));
        }
        let (_, _, encoder) = kept.as_mut().ok_or(Failure::Memory)?;
        encoder.reset();
        loop {
            let (read, written) = (encoder.total_in() as usize, encoder.total_out() as usize);
            match encoder.compress(&bytes[read..], &mut stream[written..], DeflateFlush::Finish) {
                Ok(Status::StreamEnd) => break,
                Ok(_) if encoder.total_out() as usize == stream.len() => {
                    let size = stream.len() + stream.len() / 2;
                    room(&mut stream, size)?;
                }
                Ok(_) if encoder.total_in() as usize > read || encoder.total_out() as usize > written => {}
                Ok(_) => return Err(Failure::Codec("no progress")),
                Err(error) => return Err(Failure::Codec(error.as_str())),
            }
        }
        stream.truncate(encoder.total_out() as usize);
        Ok(stream)
    })
}

fn inflate_some(bytes: &[u8], limit: usize, window_bits: i32) -> Result<Vec<u8>, Failure> {
    let mut decoder = Inflate::new(window_bits > 0, window_bits.unsigned_abs() as u8);
    let mut data = Vec::new();
    let mut filled = 0;
    while filled < limit {
        if filled == data.len() {
            let size = data.len().saturating_mul(2).clamp(FIRST_ROOM.min(limit), limit);
            room(&mut data, size)?;
        }
        let consumed = decoder.total_in() as usize;
        let status = decoder
            .decompress(&bytes[consumed..], &mut data[filled..], InflateFlush::SyncFlush)
            .map_err(|error| Failure::Codec(error.as_str()))?;
        let produced = decoder.total_out() as usize - filled;
        filled += produced;
        if matches!(status, Status::StreamEnd) || (produced == 0 && decoder.total_in() as usize == consumed) {
            break;
        }
    }
    data.truncate(filled);
    Ok(data)
}

/// -15..=-9 for a bare stream, 9..=15 for one in a zlib wrapper.
fn window(window_bits: Int) -> PyResult<i32> {
    match i32::try_from(window_bits.0) {
        Ok(bits) if (9..=15).contains(&bits.unsigned_abs()) => Ok(bits),
        _ => value_error("window_bits is out of range"),
    }
}

/// One deflate stream with the bytes of a buffer.
#[pyfunction]
pub fn deflate<'py>(buffer: &Bound<'py, PyAny>, level: Int, window_bits: Int) -> PyResult<Bound<'py, PyBytes>> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let level = match i32::try_from(level.0) {
        Ok(level) if (0..=9).contains(&level) => level,
        _ => return value_error("level is out of range"),
    };
    let window_bits = window(window_bits)?;
    let bytes = buffer.bytes();
    let stream = py.detach(|| deflate_all(bytes, level, window_bits))?;
    Ok(PyBytes::new(py, &stream))
}

/// The first bytes, `limit` at most, of a deflate stream; fewer if it ends or is cut off before, ValueError if it is damaged.
#[pyfunction]
pub fn inflate<'py>(buffer: &Bound<'py, PyAny>, limit: Int, window_bits: Int) -> PyResult<Bound<'py, PyBytes>> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let limit = checked_limit(limit)?;
    let window_bits = window(window_bits)?;
    let bytes = buffer.bytes();
    let data = py.detach(|| inflate_some(bytes, limit, window_bits))?;
    Ok(PyBytes::new(py, &data))
}
