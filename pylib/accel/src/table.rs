//! table_runs: runs of equal or ascending entries.

use pyo3::prelude::*;

use crate::args::{limit as checked_limit, value_error, within, Int};
use crate::buffer::{item, Buffer};

type Run = (usize, usize, u64, u64);

/// `entry` yields entry number i as a whole number; sums are checked, so that no run wraps at 2**64.
fn runs(entry: impl Fn(usize) -> u64, start: usize, end: usize, step: u64, limit: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut at = start;
    while at < end && runs.len() < limit {
        let value = entry(at);
        let mut used = 0;
        let mut stop = at + 1;
        if stop < end {
            let following = entry(stop);
            if following != value && value.checked_add(step) == Some(following) {
                used = step;
            }
            let mut last = value;
            while stop < end && last.checked_add(used) == Some(entry(stop)) {
                last += used;
                stop += 1;
            }
        }
        runs.push((at, stop - at, value, used));
        at = stop;
    }
    runs
}

/// Runs of entries that are equal or ascend by `step`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the contract's
pub fn table_runs(
    table: &Bound<'_, PyAny>,
    width: Int,
    big_endian: &Bound<'_, PyAny>,
    start: Int,
    count: Int,
    step: Int,
    limit: Int,
) -> PyResult<Vec<Run>> {
    let py = table.py();
    let table = Buffer::readable(table)?;
    let width = match width.0 {
        4 => 4,
        8 => 8,
        _ => return value_error("width is neither 4 nor 8"),
    };
    let big_endian = big_endian.is_truthy()?;
    let (start, count) = within(start, count, table.len() / width)?;
    if step.0 < 0 || step.0 == i64::MAX {
        return value_error("step is out of range");
    }
    let step = step.0 as u64;
    let limit = checked_limit(limit)?;
    let end = start + count;
    let bytes = table.bytes();
    Ok(py.detach(|| match (width, big_endian) {
        (4, true) => runs(|at| u32::from_be_bytes(item(bytes, at)).into(), start, end, step, limit),
        (4, false) => runs(|at| u32::from_le_bytes(item(bytes, at)).into(), start, end, step, limit),
        (_, true) => runs(|at| u64::from_be_bytes(item(bytes, at)), start, end, step, limit),
        (_, false) => runs(|at| u64::from_le_bytes(item(bytes, at)), start, end, step, limit),
    }))
}
