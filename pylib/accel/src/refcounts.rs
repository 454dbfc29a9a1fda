//! refcounts_unpack, refcounts_pack and refcount_free_runs: refcounts as stored, <https://www.qemu.org/docs/master/interop/qcow2.html#host-cluster-management>.

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::args::{limit as checked_limit, value_error, within, Int};
use crate::buffer::{item, Buffer};
use crate::runs::Runs;

pub fn checked_order(order: Int) -> PyResult<u32> {
    if !(0..=6).contains(&order.0) {
        return value_error("refcount order is out of range");
    }
    Ok(order.0 as u32)
}

/// A field of 2**order bits, order 0..2, the first one being the least significant of its byte.
#[inline]
pub fn field(bytes: &[u8], order: u32, index: usize) -> u64 {
    let per_byte = 8 >> order;
    let shift = (index % per_byte) << order;
    u64::from(bytes[index / per_byte] >> shift) & ((1 << (1 << order)) - 1)
}

/// Evaluate an expression with a closure from index to refcount, made for the order, so that loops over it have no branch on the order.
macro_rules! reader {
    ($order:expr, $bytes:expr, $name:ident => $body:expr) => {{
        let bytes: &[u8] = $bytes;
        match $order {
            0 => {
                let $name = |at: usize| crate::refcounts::field(bytes, 0, at);
                $body
            }
            1 => {
                let $name = |at: usize| crate::refcounts::field(bytes, 1, at);
                $body
            }
            2 => {
                let $name = |at: usize| crate::refcounts::field(bytes, 2, at);
                $body
            }
            3 => {
                let $name = |at: usize| u64::from(bytes[at]);
                $body
            }
            4 => {
                let $name = |at: usize| u64::from(u16::from_be_bytes(item(bytes, at)));
                $body
            }
            5 => {
                let $name = |at: usize| u64::from(u32::from_be_bytes(item(bytes, at)));
                $body
            }
            _ => {
                let $name = |at: usize| u64::from_be_bytes(item(bytes, at));
                $body
            }
        }
    }};
}
pub(crate) use reader;

fn entries(buffer: &Buffer, order: u32) -> usize {
    (buffer.len() * 8) >> order
}

/// Refcounts as native 64-bit integers.
#[pyfunction]
pub fn refcounts_unpack<'py>(
    block: &Bound<'py, PyAny>,
    order: Int,
    start: Int,
    count: Int,
) -> PyResult<Bound<'py, PyAny>> {
    let py = block.py();
    let block = Buffer::readable(block)?;
    let order = checked_order(order)?;
    let (start, count) = within(start, count, entries(&block, order))?;
    let bytes = block.bytes();
    let values = PyBytes::new_with(py, count * 8, |values| {
        py.detach(|| {
            reader!(order, bytes, refcount => {
                for (index, value) in values.chunks_exact_mut(8).enumerate() {
                    value.copy_from_slice(&refcount(start + index).to_ne_bytes());
                }
            })
        });
        Ok(())
    })?;
    py.import("array")?.call_method1("array", ("Q", values))
}

/// The values of any sequence of ints; quickly if they are native 64-bit items.
fn items(values: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    if let Ok(buffer) = Buffer::readable(values) {
        if buffer.code() == b'Q' {
            let bytes = buffer.bytes().chunks_exact(8);
            return Ok(bytes.map(|bytes| u64::from_ne_bytes(item(bytes, 0))).collect());
        }
    }
    let mut items = Vec::new();
    for value in values.try_iter()? {
        items.push(value?.extract()?);
    }
    Ok(items)
}

fn pack(values: &[u64], order: u32, stored: &mut [u8]) {
    if order < 3 {
        for (byte, fields) in stored.iter_mut().zip(values.chunks(8 >> order)) {
            *byte = fields
                .iter()
                .enumerate()
                .fold(0, |byte, (index, value)| byte | (*value as u8) << (index << order));
        }
        return;
    }
    let width = 1 << (order - 3);
    for (bytes, value) in stored.chunks_exact_mut(width).zip(values) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

/// Refcounts as they are stored.
#[pyfunction]
pub fn refcounts_pack<'py>(values: &Bound<'py, PyAny>, order: Int) -> PyResult<Bound<'py, PyBytes>> {
    let py = values.py();
    let order = checked_order(order)?;
    let too_large = || PyOverflowError::new_err("refcount does not fit");
    let values = items(values).map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(py) {
            too_large()
        } else {
            error
        }
    })?;
    if order < 6 && py.detach(|| values.iter().fold(0, |seen, value| seen | value)) >> (1 << order) != 0 {
        return Err(too_large());
    }
    if (values.len() << order) % 8 != 0 {
        return Err(PyValueError::new_err("refcounts do not fill whole bytes"));
    }
    PyBytes::new_with(py, (values.len() << order) / 8, |stored| {
        py.detach(|| pack(&values, order, stored));
        Ok(())
    })
}

fn free_runs(refcount: impl Fn(usize) -> u64, start: usize, end: usize, limit: usize) -> Vec<(usize, usize)> {
    let mut runs = Runs::new(limit);
    for index in start..end {
        if refcount(index) == 0 && !runs.push(index, 1) {
            break;
        }
    }
    runs.list
}

/// Runs of refcounts that are zero.
#[pyfunction]
pub fn refcount_free_runs(
    block: &Bound<'_, PyAny>,
    order: Int,
    start: Int,
    count: Int,
    limit: Int,
) -> PyResult<Vec<(usize, usize)>> {
    let py = block.py();
    let block = Buffer::readable(block)?;
    let order = checked_order(order)?;
    let (start, count) = within(start, count, entries(&block, order))?;
    let limit = checked_limit(limit)?;
    let bytes = block.bytes();
    Ok(py.detach(|| reader!(order, bytes, refcount => free_runs(refcount, start, start + count, limit))))
}
