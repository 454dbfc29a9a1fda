//! nonzero_runs, first_difference and difference_runs.

use pyo3::prelude::*;

use crate::args::{unit as checked_unit, value_error, within, Int};
use crate::buffer::Buffer;
use crate::runs::Runs;

/// Looked at between two tests for an early end: long enough for vector code, short enough to end early.
const BLOCK: usize = 256;
const PIECE: usize = 4096;

fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(BLOCK);
    blocks.all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// The runs of units that `unlike` picks; `offset` is that of the first unit.
fn unit_runs<'a>(units: impl Iterator<Item = (usize, bool)> + 'a, offset: usize) -> Vec<(usize, usize)> {
    let mut runs = Runs::new(usize::MAX);
    let mut at = offset;
    for (length, unlike) in units {
        if unlike {
            runs.push(at, length);
        }
        at += length;
    }
    runs.list
}

/// Runs of units that hold a byte other than zero.
#[pyfunction]
pub fn nonzero_runs(buffer: &Bound<'_, PyAny>, offset: Int, length: Int, unit: Int) -> PyResult<Vec<(usize, usize)>> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let unit = checked_unit(unit)?;
    let (offset, length) = within(offset, length, buffer.len())?;
    let bytes = &buffer.bytes()[offset..offset + length];
    Ok(py.detach(|| unit_runs(bytes.chunks(unit).map(|chunk| (chunk.len(), !is_zero(chunk))), offset)))
}

fn difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let (at, (left, right)) = a
        .chunks(PIECE)
        .zip(b.chunks(PIECE))
        .enumerate()
        .find(|(_, (left, right))| left != right)?;
    let within = left.iter().zip(right).position(|(left, right)| left != right)?;
    Some(at * PIECE + within)
}

fn same_length(a: &Buffer, b: &Buffer) -> PyResult<()> {
    if a.len() != b.len() {
        return value_error("buffers differ in length");
    }
    Ok(())
}

/// The index of the first byte that differs, or -1.
#[pyfunction]
pub fn first_difference(a: &Bound<'_, PyAny>, b: &Bound<'_, PyAny>) -> PyResult<i64> {
    let py = a.py();
    let (a, b) = (Buffer::readable(a)?, Buffer::readable(b)?);
    same_length(&a, &b)?;
    let (left, right) = (a.bytes(), b.bytes());
    Ok(py.detach(|| difference(left, right)).map_or(-1, |at| at as i64))
}

/// Runs of units in which two buffers differ.
#[pyfunction]
pub fn difference_runs(a: &Bound<'_, PyAny>, b: &Bound<'_, PyAny>, unit: Int) -> PyResult<Vec<(usize, usize)>> {
    let py = a.py();
    let (a, b) = (Buffer::readable(a)?, Buffer::readable(b)?);
    let unit = checked_unit(unit)?;
    same_length(&a, &b)?;
    let (left, right) = (a.bytes(), b.bytes());
    Ok(py.detach(|| {
        let pairs = left.chunks(unit).zip(right.chunks(unit));
        unit_runs(pairs.map(|(left, right)| (left.len(), left != right)), 0)
    }))
}
