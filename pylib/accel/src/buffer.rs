//! Python buffers as slices.
//!
//! The buffer protocol entered the stable ABI with Python 3.11 only, so PyO3 has no `PyBuffer` for abi3-py39. The functions and the layout of
//! `Py_buffer` are the same in every CPython from 3.9 on, whence the declarations here.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::marker::PhantomData;
use std::ptr;
use std::slice;

use pyo3::ffi::{PyObject, Py_ssize_t};
use pyo3::prelude::*;

use crate::args::value_error;

/// <https://docs.python.org/3/c-api/buffer.html#buffer-structure>
#[repr(C)]
struct PyBufferView {
    buf: *mut c_void,
    obj: *mut PyObject,
    len: Py_ssize_t,
    itemsize: Py_ssize_t,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut Py_ssize_t,
    strides: *mut Py_ssize_t,
    suboffsets: *mut Py_ssize_t,
    internal: *mut c_void,
}

/// PyBUF_INDIRECT | PyBUF_FORMAT: whatever the exporter has, to be judged here.
const FULL_READ_ONLY: c_int = 0x100 | 0x10 | 0x08 | 0x04;

extern "C" {
    fn PyObject_GetBuffer(object: *mut PyObject, view: *mut PyBufferView, flags: c_int) -> c_int;
    fn PyBuffer_IsContiguous(view: *const PyBufferView, order: c_char) -> c_int;
    fn PyBuffer_Release(view: *mut PyBufferView);
}

/// A C-contiguous buffer, held until dropped. Its lifetime ties the release to an attached interpreter.
pub struct Buffer<'py> {
    /// Boxed because an exporter may store pointers into the structure itself.
    view: Box<PyBufferView>,
    attached: PhantomData<Python<'py>>,
}

impl<'py> Buffer<'py> {
    pub fn readable(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let mut view = Box::new(PyBufferView {
            buf: ptr::null_mut(),
            obj: ptr::null_mut(),
            len: 0,
            itemsize: 0,
            readonly: 1,
            ndim: 0,
            format: ptr::null_mut(),
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            suboffsets: ptr::null_mut(),
            internal: ptr::null_mut(),
        });
        // SAFETY: the interpreter is attached, the object is alive, and the view is writable and of the documented layout.
        if unsafe { PyObject_GetBuffer(object.as_ptr(), &mut *view, FULL_READ_ONLY) } != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        let buffer = Buffer {
            view,
            attached: PhantomData,
        };
        // SAFETY: the call above filled the view.
        if unsafe { PyBuffer_IsContiguous(&*buffer.view, b'C' as c_char) } == 0 {
            return value_error("buffer is not C-contiguous");
        }
        Ok(buffer)
    }

    pub fn writable(object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let buffer = Self::readable(object)?;
        if buffer.view.readonly != 0 {
            return value_error("buffer is read-only");
        }
        Ok(buffer)
    }

    pub fn len(&self) -> usize {
        self.view.len as usize
    }

    pub fn bytes(&self) -> &[u8] {
        if self.view.len <= 0 {
            return &[]; // an empty buffer's pointer may be null
        }
        // SAFETY: the exporter keeps `len` contiguous bytes in place until the release; the contract of the kernels forbids writing to them meanwhile.
        unsafe { slice::from_raw_parts(self.view.buf.cast(), self.len()) }
    }

    /// The bytes of a buffer made by `writable`.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.view.len <= 0 || self.view.readonly != 0 {
            return &mut [];
        }
        // SAFETY: as in `bytes`; the exporter says that the memory may be written, and the contract that nobody else uses it during the call.
        unsafe { slice::from_raw_parts_mut(self.view.buf.cast(), self.len()) }
    }

    /// The struct code of an item, without the prefix for native layout; empty if it has more than one letter.
    pub fn code(&self) -> u8 {
        if self.view.format.is_null() {
            return b'B';
        }
        // SAFETY: the exporter keeps a string terminated by a zero byte until the release.
        let format = unsafe { CStr::from_ptr(self.view.format) }.to_bytes();
        match format.strip_prefix(b"@").unwrap_or(format) {
            [code] => *code,
            _ => 0,
        }
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        // SAFETY: PyObject_GetBuffer filled the view, and the lifetime says that the interpreter is attached.
        unsafe { PyBuffer_Release(&mut *self.view) }
    }
}

/// Item number `index` of a table of items of N bytes.
#[inline]
pub fn item<const N: usize>(bytes: &[u8], index: usize) -> [u8; N] {
    let mut result = [0; N];
    result.copy_from_slice(&bytes[index * N..][..N]);
    result
}
