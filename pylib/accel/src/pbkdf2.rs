//! pbkdf2: <https://www.rfc-editor.org/rfc/rfc8018#section-5.2>, each block of the key on a thread of its own.
//!
//! An iteration is two compressions of a block whose padding never changes, so the hash functions are used at that level.

use pyo3::exceptions::PyMemoryError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::args::{value_error, Int};
use crate::buffer::Buffer;

/// Iterations below which a thread is not worth its start.
const THREAD: u32 = 2000;

/// The most bytes of a key, so that no number of threads follows from an argument.
const LONGEST: usize = 1024;

/// Bytes of the longest result of a hash here.
const LARGEST: usize = 32;

/// Bytes that a compression takes in.
const BLOCK: usize = 64;

/// A hash function by its compression; its state is its result, `SIZE` bytes in big-endian words.
trait Compression {
    type State: Copy + Send + Sync;
    const SIZE: usize;
    const INITIAL: Self::State;
    fn compress(state: &mut Self::State, block: &[u8; BLOCK]);
    fn write(state: &Self::State, out: &mut [u8]);
}

macro_rules! compression {
    ($name:ident, $words:literal, $initial:expr, $compress:path) => {
        struct $name;
        impl Compression for $name {
            type State = [u32; $words];
            const SIZE: usize = $words * 4;
            const INITIAL: Self::State = $initial;
            #[inline(always)]
            fn compress(state: &mut Self::State, block: &[u8; BLOCK]) {
                $compress(state, std::slice::from_ref(block))
            }
            #[inline(always)]
            fn write(state: &Self::State, out: &mut [u8]) {
                for (word, place) in state.iter().zip(out.chunks_exact_mut(4)) {
                    place.copy_from_slice(&word.to_be_bytes());
                }
            }
        }
    };
}

// The initial states: FIPS 180-4, 5.3.
compression!(
    Sha1,
    5,
    [0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0],
    sha1::block_api::compress
);
compression!(
    Sha256,
    8,
    [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19],
    sha2::block_api::compress256
);

/// The state after `data`, of which one block has gone into `state` already if `keyed`, and its padding.
fn finish<H: Compression>(mut state: H::State, data: &[u8], keyed: bool) -> H::State {
    let mut chunks = data.chunks_exact(BLOCK);
    let mut block = [0; BLOCK];
    for chunk in &mut chunks {
        block.copy_from_slice(chunk);
        H::compress(&mut state, &block);
    }
    let rest = chunks.remainder();
    block = [0; BLOCK];
    block[..rest.len()].copy_from_slice(rest);
    block[rest.len()] = 0x80;
    if rest.len() + 9 > BLOCK {
        H::compress(&mut state, &block);
        block = [0; BLOCK];
    }
    end(&mut block, data.len() + if keyed { BLOCK } else { 0 });
    H::compress(&mut state, &block);
    state
}

/// Write the length of a message of so many bytes into its last block.
fn end(block: &mut [u8; BLOCK], length: usize) {
    block[BLOCK - 8..].copy_from_slice(&(length as u64 * 8).to_be_bytes());
}

/// The two halves of HMAC (RFC 2104) with their keys gone in.
struct Hmac<H: Compression> {
    inner: H::State,
    outer: H::State,
}

impl<H: Compression> Hmac<H> {
    fn new(password: &[u8]) -> Self {
        let mut key = [0; BLOCK];
        if password.len() > BLOCK {
            H::write(&finish::<H>(H::INITIAL, password, false), &mut key);
        } else {
            key[..password.len()].copy_from_slice(password);
        }
        let keyed = |pad: u8| {
            let mut state = H::INITIAL;
            H::compress(&mut state, &key.map(|byte| byte ^ pad));
            state
        };
        Hmac {
            inner: keyed(0x36),
            outer: keyed(0x5c),
        }
    }

    /// Block number `index` of the key, from 1 on.
    fn block(&self, salt: &[u8], index: u32, iterations: u32, out: &mut [u8]) {
        let mut seed = salt.to_vec();
        seed.extend_from_slice(&index.to_be_bytes());
        let mut block = [0; BLOCK];
        block[H::SIZE] = 0x80;
        end(&mut block, BLOCK + H::SIZE);
        H::write(&finish::<H>(self.inner, &seed, true), &mut block);
        let mut state = self.outer;
        H::compress(&mut state, &block);
        H::write(&state, out);
        let mut value = [0u8; LARGEST];
        for _ in 1..iterations {
            H::write(&state, &mut block);
            state = self.inner;
            H::compress(&mut state, &block);
            H::write(&state, &mut block);
            state = self.outer;
            H::compress(&mut state, &block);
            H::write(&state, &mut value);
            for (byte, with) in out[..H::SIZE].iter_mut().zip(&value) {
                *byte ^= with;
            }
        }
    }

    fn derive(&self, salt: &[u8], iterations: u32, blocks: &mut [[u8; LARGEST]]) {
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
        let share = if iterations < THREAD {
            blocks.len()
        } else {
            blocks.len().div_ceil(threads)
        };
        let several = |first: usize, blocks: &mut [[u8; LARGEST]]| {
            for (at, out) in blocks.iter_mut().enumerate() {
                self.block(salt, (first + at + 1) as u32, iterations, out);
            }
        };
        std::thread::scope(|scope| {
            let (own, others) = blocks.split_at_mut(share);
            let mut waiting = Vec::new();
            for (number, part) in others.chunks_mut(share).enumerate() {
                waiting.push(scope.spawn(move || several((number + 1) * share, part)));
            }
            several(0, own);
        });
    }
}

fn derive<H: Compression>(password: &[u8], salt: &[u8], iterations: u32, length: usize) -> Option<Vec<u8>> {
    let mut blocks = Vec::new();
    let count = length.div_ceil(H::SIZE);
    blocks.try_reserve_exact(count).ok()?;
    blocks.resize(count, [0u8; LARGEST]);
    Hmac::<H>::new(password).derive(salt, iterations, &mut blocks);
    let key: Vec<u8> = blocks
        .iter()
        .flat_map(|block| block[..H::SIZE].iter().copied())
        .collect();
    Some(key[..length].to_vec())
}

/// A key of `length` bytes.
#[pyfunction]
pub fn pbkdf2<'py>(
    hash: &str,
    password: &Bound<'py, PyAny>,
    salt: &Bound<'py, PyAny>,
    iterations: Int,
    length: Int,
) -> PyResult<Bound<'py, PyBytes>> {
    let py = password.py();
    let (password, salt) = (Buffer::readable(password)?, Buffer::readable(salt)?);
    let iterations = match u32::try_from(iterations.0) {
        Ok(count) if count > 0 => count,
        _ => return value_error("iterations is out of range"),
    };
    let length = match usize::try_from(length.0) {
        Ok(length) if (1..=LONGEST).contains(&length) => length,
        _ => return value_error("length is out of range"),
    };
    let with = match hash {
        "sha1" => derive::<Sha1>,
        "sha256" => derive::<Sha256>,
        _ => return value_error("hash is unknown"),
    };
    let (password, salt) = (password.bytes(), salt.bytes());
    match py.detach(|| with(password, salt, iterations, length)) {
        Some(key) => Ok(PyBytes::new(py, &key)),
        None => Err(PyMemoryError::new_err(())),
    }
}
