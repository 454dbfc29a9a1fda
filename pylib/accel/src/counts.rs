//! tally and refcount_mismatches: refcounts as counted, in native items of 2, 4 or 8 bytes.

use pyo3::prelude::*;

use crate::args::{limit as checked_limit, value_error, within, Int};
use crate::buffer::{item, Buffer};
use crate::refcounts::{checked_order, reader};

fn item_size(counts: &Buffer) -> PyResult<usize> {
    match counts.code() {
        b'H' => Ok(2),
        b'I' => Ok(4),
        b'Q' => Ok(8),
        _ => value_error("counts are not native H, I or Q items"),
    }
}

/// Add one to every item of `bytes`; returns how many were at their largest value.
macro_rules! add_one {
    ($type:ty, $bytes:expr) => {{
        let mut lost = 0u64;
        for bytes in $bytes.chunks_exact_mut(size_of::<$type>()) {
            let value = <$type>::from_ne_bytes(item(bytes, 0));
            lost += u64::from(value == <$type>::MAX);
            bytes.copy_from_slice(&value.saturating_add(1).to_ne_bytes());
        }
        lost
    }};
}

/// Add one to each item of each range; returns how many stayed at their largest value.
#[pyfunction]
pub fn tally(counts: &Bound<'_, PyAny>, ranges: Vec<(Int, Int)>) -> PyResult<u64> {
    let py = counts.py();
    let mut counts = Buffer::writable(counts)?;
    let width = item_size(&counts)?;
    let total = (counts.len() / width) as i64;
    let bytes = counts.bytes_mut();
    for (start, count) in &ranges {
        if start.0 <= -i64::MAX || start.0 == i64::MAX || count.0 < 0 || count.0 == i64::MAX {
            return value_error("range is out of range");
        }
    }
    Ok(py.detach(|| {
        let mut lost = 0;
        for (start, count) in &ranges {
            let end = start.0.saturating_add(count.0).clamp(0, total) as usize;
            let start = start.0.clamp(0, total) as usize;
            if start < end {
                let items = &mut bytes[start * width..end * width];
                lost += match width {
                    2 => add_one!(u16, items),
                    4 => add_one!(u32, items),
                    _ => add_one!(u64, items),
                };
            }
        }
        lost
    }))
}

fn mismatches(
    stored: impl Fn(usize) -> u64,
    counted: impl Fn(usize) -> u64,
    count: usize,
    limit: usize,
) -> Vec<(usize, u64, u64)> {
    (0..count)
        .map(|index| (index, stored(index), counted(index)))
        .filter(|(_, stored, counted)| stored != counted)
        .take(limit)
        .collect()
}

/// Refcounts that differ from what was counted.
#[pyfunction]
pub fn refcount_mismatches(
    block: &Bound<'_, PyAny>,
    order: Int,
    counts: &Bound<'_, PyAny>,
    start: Int,
    count: Int,
    limit: Int,
) -> PyResult<Vec<(usize, u64, u64)>> {
    let py = block.py();
    let block = Buffer::readable(block)?;
    let order = checked_order(order)?;
    let counts = Buffer::readable(counts)?;
    let width = item_size(&counts)?;
    within(Int(0), count, (block.len() * 8) >> order)?;
    let (start, count) = within(start, count, counts.len() / width)?;
    let limit = checked_limit(limit)?;
    let (stored, counted) = (block.bytes(), &counts.bytes()[start * width..]);
    Ok(py.detach(|| {
        reader!(order, stored, stored => match width {
            2 => mismatches(stored, |at| u16::from_ne_bytes(item(counted, at)).into(), count, limit),
            4 => mismatches(stored, |at| u32::from_ne_bytes(item(counted, at)).into(), count, limit),
            _ => mismatches(stored, |at| u64::from_ne_bytes(item(counted, at)), count, limit),
        })
    }))
}
