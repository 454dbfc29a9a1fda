//! crc32c: CRC-32C (Castagnoli), <https://www.rfc-editor.org/rfc/rfc3720#appendix-B.4>, eight bytes at a time by eight tables.

use pyo3::prelude::*;

use crate::args::{value_error, Int};
use crate::buffer::{item, Buffer};

const POLYNOMIAL: u32 = 0x82f6_3b78;
static TABLES: [[u32; 256]; 8] = tables();

/// TABLES[0] is the remainder of each byte, TABLES[n] that of the byte followed by n zero bytes.
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (if crc & 1 != 0 { POLYNOMIAL } else { 0 });
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let crc = tables[table - 1][byte];
            tables[table][byte] = (crc >> 8) ^ tables[0][(crc & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

fn update(mut crc: u32, bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let mixed = (u64::from_le_bytes(item(word, 0)) ^ u64::from(crc)).to_le_bytes();
        crc = (0..8).fold(0, |sum, at| sum ^ TABLES[7 - at][usize::from(mixed[at])]);
    }
    for byte in words.remainder() {
        crc = (crc >> 8) ^ TABLES[0][usize::from(crc as u8 ^ byte)];
    }
    crc
}

/// CRC-32C of a buffer.
#[pyfunction]
#[pyo3(signature = (buffer, crc=Int(0)))]
pub fn crc32c(buffer: &Bound<'_, PyAny>, crc: Int) -> PyResult<u32> {
    let py = buffer.py();
    let buffer = Buffer::readable(buffer)?;
    let Ok(crc) = u32::try_from(crc.0) else {
        return value_error("crc is out of range");
    };
    let bytes = buffer.bytes();
    Ok(py.detach(|| !update(!crc, bytes)))
}
