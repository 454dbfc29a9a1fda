//! l2_runs and l2_runs_extended: qcow2's L2 tables, <https://www.qemu.org/docs/master/interop/qcow2.html#cluster-mapping>.

use pyo3::prelude::*;

use crate::args::{limit as checked_limit, value_error, within, Int};
use crate::buffer::{item, Buffer};

const UNALLOCATED: u8 = 0;
const ZERO_PLAIN: u8 = 1;
const ZERO_ALLOC: u8 = 2;
const NORMAL: u8 = 3;
const COMPRESSED: u8 = 4;
const INVALID: u8 = 5;
const COPIED: u8 = 8;
/// Set in the kinds whose value is a host offset.
const HAS_OFFSET: u8 = 2;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED_BIT: u64 = 1 << 63;
const COMPRESSED_BIT: u64 = 1 << 62;
const SUBCLUSTERS: usize = 32;

type Run = (usize, usize, u8, u64);

struct Runs {
    list: Vec<Run>,
    limit: usize,
    /// Host bytes from one unit of a run to the next.
    pitch: u64,
}

impl Runs {
    /// Append a run, or join it to the last one if it goes on where that ends; false, and nothing done, if that would exceed the limit.
    fn push(&mut self, index: usize, count: usize, kind: u8, value: u64) -> bool {
        if let Some((_, last_count, last_kind, last_value)) = self.list.last_mut() {
            let expected = if kind & HAS_OFFSET != 0 {
                *last_value + *last_count as u64 * self.pitch
            } else {
                0
            };
            if kind == *last_kind && kind != COMPRESSED && value == expected {
                *last_count += count;
                return true;
            }
        }
        if self.list.len() >= self.limit {
            return false;
        }
        self.list.push((index, count, kind, value));
        true
    }

    /// The runs of the subclusters of one entry.
    fn push_subclusters(&mut self, index: usize, entry: u64, bitmap: u64, data_file: bool) -> bool {
        let offset = entry & OFFSET_MASK;
        let hosted = offset != 0 || (data_file && entry & COPIED_BIT != 0);
        let copied = if entry & COPIED_BIT != 0 { COPIED } else { 0 };
        let data = bitmap as u32;
        let zero = (bitmap >> 32) as u32;
        if data & (if hosted { zero } else { data }) != 0 {
            return self.push(index, SUBCLUSTERS, INVALID, 0);
        }
        let mut at = 0;
        while at < SUBCLUSTERS {
            let (kind, same) = if data >> at & 1 != 0 {
                (NORMAL + copied, data)
            } else if zero >> at & 1 != 0 {
                (if hosted { ZERO_ALLOC + copied } else { ZERO_PLAIN }, zero)
            } else {
                (UNALLOCATED, !(data | zero))
            };
            let length = ((same >> at).trailing_ones() as usize).min(SUBCLUSTERS - at);
            let value = if kind & HAS_OFFSET != 0 {
                offset + at as u64 * self.pitch
            } else {
                0
            };
            if !self.push(index + at, length, kind, value) {
                return false;
            }
            at += length;
        }
        true
    }
}

fn classify(entry: u64, data_file: bool) -> (u8, u64) {
    let offset = entry & OFFSET_MASK;
    let zero = entry & 1 != 0;
    let copied = entry & COPIED_BIT != 0;
    if entry & COMPRESSED_BIT != 0 {
        (COMPRESSED, entry & (COMPRESSED_BIT - 1))
    } else if offset != 0 || (data_file && copied && !zero) {
        (
            if zero { ZERO_ALLOC } else { NORMAL } + if copied { COPIED } else { 0 },
            offset,
        )
    } else {
        (if zero { ZERO_PLAIN } else { UNALLOCATED }, 0)
    }
}

fn checked_cluster_size(value: Int) -> PyResult<u64> {
    if !(512..=2 << 20).contains(&value.0) || value.0 & (value.0 - 1) != 0 {
        return value_error("cluster size is out of range");
    }
    Ok(value.0 as u64)
}

/// Runs of standard L2 entries.
#[pyfunction]
pub fn l2_runs(
    table: &Bound<'_, PyAny>,
    start: Int,
    count: Int,
    cluster_size: Int,
    data_file: &Bound<'_, PyAny>,
    limit: Int,
) -> PyResult<Vec<Run>> {
    let py = table.py();
    let table = Buffer::readable(table)?;
    let (start, count) = within(start, count, table.len() / 8)?;
    let pitch = checked_cluster_size(cluster_size)?;
    let limit = checked_limit(limit)?;
    let data_file = data_file.is_truthy()?;
    let bytes = table.bytes();
    Ok(py.detach(|| {
        let mut runs = Runs {
            list: Vec::new(),
            limit,
            pitch,
        };
        for index in start..start + count {
            let (kind, value) = classify(u64::from_be_bytes(item(bytes, index)), data_file);
            if !runs.push(index, 1, kind, value) {
                break;
            }
        }
        runs.list
    }))
}

/// Runs of the subclusters of extended L2 entries.
#[pyfunction]
pub fn l2_runs_extended(
    table: &Bound<'_, PyAny>,
    start: Int,
    count: Int,
    cluster_size: Int,
    data_file: &Bound<'_, PyAny>,
    limit: Int,
) -> PyResult<Vec<Run>> {
    let py = table.py();
    let table = Buffer::readable(table)?;
    let (start, count) = within(start, count, table.len() / 16)?;
    let pitch = checked_cluster_size(cluster_size)? / SUBCLUSTERS as u64;
    let limit = checked_limit(limit)?;
    let data_file = data_file.is_truthy()?;
    let bytes = table.bytes();
    Ok(py.detach(|| {
        let mut runs = Runs {
            list: Vec::new(),
            limit,
            pitch,
        };
        for at in start..start + count {
            let words = u128::from_be_bytes(item(bytes, at));
            let (entry, bitmap) = ((words >> 64) as u64, words as u64);
            let index = at * SUBCLUSTERS;
            let more = if entry & COMPRESSED_BIT != 0 {
                runs.push(index, SUBCLUSTERS, COMPRESSED, entry & (COMPRESSED_BIT - 1))
            } else {
                runs.push_subclusters(index, entry, bitmap, data_file)
            };
            if !more {
                break;
            }
        }
        runs.list
    }))
}
