//! bit_runs: runs of set bits.

use pyo3::prelude::*;

use crate::args::{limit as checked_limit, within, Int};
use crate::buffer::Buffer;
use crate::runs::Runs;

/// The 64 bits from bit `first` of a bitmap, `first` being a multiple of 64; zeroes past the end.
fn word(bytes: &[u8], first: usize) -> u64 {
    let rest = &bytes[first / 8..];
    let length = rest.len().min(8);
    let mut word = [0; 8];
    word[..length].copy_from_slice(&rest[..length]);
    u64::from_le_bytes(word)
}

fn runs(bytes: &[u8], start: usize, end: usize, limit: usize) -> Vec<(usize, usize)> {
    let mut runs = Runs::new(limit);
    let mut first = start / 64 * 64;
    while first < end {
        let mut bits = word(bytes, first);
        if start > first {
            bits &= u64::MAX << (start - first);
        }
        if end < first + 64 {
            bits &= u64::MAX >> (first + 64 - end);
        }
        while bits != 0 {
            let at = bits.trailing_zeros();
            let count = (bits >> at).trailing_ones();
            if !runs.push(first + at as usize, count as usize) {
                return runs.list;
            }
            if at + count == 64 {
                break;
            }
            bits &= u64::MAX << (at + count);
        }
        first += 64;
    }
    runs.list
}

/// Runs of set bits.
#[pyfunction]
pub fn bit_runs(bitmap: &Bound<'_, PyAny>, start: Int, count: Int, limit: Int) -> PyResult<Vec<(usize, usize)>> {
    let py = bitmap.py();
    let bitmap = Buffer::readable(bitmap)?;
    let (start, count) = within(start, count, bitmap.len().saturating_mul(8))?;
    let limit = checked_limit(limit)?;
    let bytes = bitmap.bytes();
    Ok(py.detach(|| runs(bytes, start, start + count, limit)))
}
