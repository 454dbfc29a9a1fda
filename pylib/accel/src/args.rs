//! Integer arguments, checked in the same words as the pure twins check them.

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;

/// A Python int; one that does not fit 64 bits becomes the nearest that does, which no range check lets pass.
#[derive(Clone, Copy)]
pub struct Int(pub i64);

impl<'py> FromPyObject<'_, 'py> for Int {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<i64>() {
            Ok(value) => Ok(Int(value)),
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Int(if object.lt(0)? { i64::MIN } else { i64::MAX }))
            }
            Err(error) => Err(error),
        }
    }
}

pub fn value_error<T>(message: &'static str) -> PyResult<T> {
    Err(PyValueError::new_err(message))
}

/// A range that lies in 0..total.
pub fn within(start: Int, count: Int, total: usize) -> PyResult<(usize, usize)> {
    match (usize::try_from(start.0), usize::try_from(count.0)) {
        (Ok(start), Ok(count)) if start.checked_add(count).is_some_and(|end| end <= total) => Ok((start, count)),
        _ => value_error("range is outside the buffer"),
    }
}

pub fn limit(value: Int) -> PyResult<usize> {
    if value.0 < 0 {
        return value_error("limit is negative");
    }
    Ok(usize::try_from(value.0).unwrap_or(usize::MAX))
}

pub fn unit(value: Int) -> PyResult<usize> {
    if value.0 <= 0 {
        return value_error("unit is not positive");
    }
    Ok(usize::try_from(value.0).unwrap_or(usize::MAX))
}
