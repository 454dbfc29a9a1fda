//! sectors_crypt: whole sectors of 512 bytes, each with its own IV, as in <https://gitlab.com/cryptsetup/cryptsetup/-/wikis/Specification> (LUKS1) and
//! IEEE 1619 (XTS). The block ciphers are RustCrypto's; only the modes are here, written so that many blocks go through a cipher at once.

use aes::cipher::array::{Array, ArraySize};
use aes::cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use pyo3::prelude::*;

use crate::args::{value_error, Int};
use crate::buffer::Buffer;

const SECTOR: usize = 512;

/// Sectors that are worked on together: their blocks fill the widest AES units.
const GROUP: usize = 8;

trait Cipher: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit {}
impl<T: BlockCipherEncrypt + BlockCipherDecrypt + KeyInit> Cipher for T {}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Ecb,
    Cbc,
    Ctr,
    Xts,
}

/// What makes IVs of sector numbers: in place, any number of blocks.
type Encrypt = Box<dyn Fn(&mut [u8]) + Send + Sync>;

enum Ivs {
    Plain,
    Plain64,
    Essiv(Encrypt),
}

impl Ivs {
    /// Fill `ivs`, of `width` bytes each, for sectors from `first` on.
    fn fill(&self, first: u64, ivs: &mut [u8], width: usize) {
        for (index, iv) in ivs.chunks_exact_mut(width).enumerate() {
            let number = first.wrapping_add(index as u64);
            let number = if matches!(self, Ivs::Plain) {
                number & 0xffff_ffff
            } else {
                number
            };
            iv.fill(0);
            iv[..8].copy_from_slice(&number.to_le_bytes());
        }
        if let Ivs::Essiv(encrypt) = self {
            encrypt(ivs);
        }
    }
}

struct Sectors<C> {
    cipher: C,
    tweak: Option<C>,
    ivs: Ivs,
    mode: Mode,
    encrypt: bool,
}

fn blocks<N: ArraySize>(bytes: &mut [u8]) -> &mut [Array<u8, N>] {
    Array::slice_as_chunks_mut(bytes).0
}

fn xor(target: &mut [u8], other: &[u8]) {
    for (byte, with) in target.iter_mut().zip(other) {
        *byte ^= with;
    }
}

impl<C: Cipher> Sectors<C> {
    fn new(key: &[u8], ivs: Ivs, mode: Mode, encrypt: bool) -> Option<Self> {
        let (own, tweak) = match mode {
            Mode::Xts if C::block_size() != 16 || !key.len().is_multiple_of(2) => return None,
            Mode::Xts => {
                let (own, tweak) = key.split_at(key.len() / 2);
                (own, Some(C::new_from_slice(tweak).ok()?))
            }
            _ => (key, None),
        };
        Some(Sectors {
            cipher: C::new_from_slice(own).ok()?,
            tweak,
            ivs,
            mode,
            encrypt,
        })
    }

    fn crypt(&self, data: &mut [u8], first: u64) {
        let mut ivs: [Block<C>; GROUP] = Default::default();
        for (index, group) in data.chunks_mut(GROUP * SECTOR).enumerate() {
            let ivs = &mut ivs[..group.len() / SECTOR];
            if self.mode != Mode::Ecb {
                let first = first.wrapping_add((index * GROUP) as u64);
                self.ivs
                    .fill(first, Array::slice_as_flattened_mut(ivs), C::block_size());
            }
            match self.mode {
                Mode::Ecb => self.whole(blocks(group)),
                Mode::Ctr => self.ctr(group, ivs),
                Mode::Xts => self.xts(group, ivs),
                Mode::Cbc if self.encrypt => self.cbc_encrypt(group, ivs),
                Mode::Cbc => self.cbc_decrypt(group, ivs),
            }
        }
    }

    fn whole(&self, blocks: &mut [Block<C>]) {
        if self.encrypt {
            self.cipher.encrypt_blocks(blocks);
        } else {
            self.cipher.decrypt_blocks(blocks);
        }
    }

    fn xts(&self, group: &mut [u8], ivs: &mut [Block<C>]) {
        let Some(tweak) = &self.tweak else { return };
        tweak.encrypt_blocks(ivs);
        let mut tweaks = [0u8; GROUP * SECTOR];
        for (iv, room) in ivs.iter().zip(tweaks.chunks_exact_mut(SECTOR)) {
            let mut value = u128::from_le_bytes(std::array::from_fn(|at| iv[at]));
            for place in room.chunks_exact_mut(16) {
                place.copy_from_slice(&value.to_le_bytes());
                let carry = (value >> 127) * 0x87;
                value = value << 1 ^ carry;
            }
        }
        xor(group, &tweaks);
        self.whole(blocks(group));
        xor(group, &tweaks);
    }

    fn ctr(&self, group: &mut [u8], ivs: &mut [Block<C>]) {
        let width = C::block_size();
        let mut stream = [0u8; GROUP * SECTOR];
        let stream = &mut stream[..group.len()];
        for (iv, room) in ivs.iter_mut().zip(stream.chunks_exact_mut(SECTOR)) {
            for place in room.chunks_exact_mut(width) {
                place.copy_from_slice(iv);
                for byte in iv.iter_mut().rev() {
                    *byte = byte.wrapping_add(1);
                    if *byte != 0 {
                        break;
                    }
                }
            }
        }
        self.cipher.encrypt_blocks(blocks::<C::BlockSize>(stream));
        xor(group, stream);
    }

    /// The blocks of one sector depend on one another, so one of each sector goes at a time.
    fn cbc_encrypt(&self, group: &mut [u8], chain: &mut [Block<C>]) {
        let width = C::block_size();
        for at in (0..SECTOR).step_by(width) {
            for (link, sector) in chain.iter_mut().zip(group.chunks_exact(SECTOR)) {
                xor(link, &sector[at..at + width]);
            }
            self.cipher.encrypt_blocks(chain);
            for (link, sector) in chain.iter().zip(group.chunks_exact_mut(SECTOR)) {
                sector[at..at + width].copy_from_slice(link);
            }
        }
    }

    fn cbc_decrypt(&self, group: &mut [u8], ivs: &mut [Block<C>]) {
        let width = C::block_size();
        let mut stored = [0u8; GROUP * SECTOR];
        let stored = &mut stored[..group.len()];
        stored.copy_from_slice(group);
        self.cipher.decrypt_blocks(blocks::<C::BlockSize>(group));
        let sectors = group.chunks_exact_mut(SECTOR).zip(stored.chunks_exact(SECTOR));
        for (iv, (sector, stored)) in ivs.iter().zip(sectors) {
            xor(&mut sector[..width], iv);
            xor(&mut sector[width..], &stored[..SECTOR - width]);
        }
    }
}

/// The work as a function of the data and the first sector's number.
type Work = Box<dyn Fn(&mut [u8], u64) + Send + Sync>;

/// None where key, cipher and mode do not go together.
fn work<C: Cipher + Send + Sync + 'static>(key: &[u8], ivs: Ivs, mode: Mode, encrypt: bool) -> Option<Work> {
    let sectors = Sectors::<C>::new(key, ivs, mode, encrypt)?;
    Some(Box::new(move |data, first| sectors.crypt(data, first)))
}

fn encryptor<C: Cipher + Send + Sync + 'static>(key: &[u8]) -> Option<Encrypt> {
    let cipher = C::new_from_slice(key).ok()?;
    Some(Box::new(move |data| {
        cipher.encrypt_blocks(blocks::<C::BlockSize>(data))
    }))
}

/// `$action::<the type of a cipher with keys of that length>$arguments`; None where there is none.
macro_rules! with_cipher {
    ($name:expr, $length:expr, $action:ident $arguments:tt) => {
        match ($name, $length) {
            ("aes", 16) => $action::<aes::Aes128> $arguments,
            ("aes", 24) => $action::<aes::Aes192> $arguments,
            ("aes", 32) => $action::<aes::Aes256> $arguments,
            ("serpent", 16 | 24 | 32) => $action::<serpent::Serpent> $arguments,
            ("twofish", 16 | 24 | 32) => $action::<twofish::Twofish> $arguments,
            ("cast5", 16) => $action::<cast5::Cast5> $arguments,
            _ => None,
        }
    };
}

fn prepare(cipher: &str, mode: Mode, key: &[u8], iv: &str, iv_key: &[u8], encrypt: bool) -> Option<Work> {
    let ivs = match iv {
        "plain" => Ivs::Plain,
        "plain64" => Ivs::Plain64,
        "essiv" => Ivs::Essiv(with_cipher!(cipher, iv_key.len(), encryptor(iv_key))?),
        _ => return None,
    };
    let length = if mode == Mode::Xts { key.len() / 2 } else { key.len() };
    with_cipher!(cipher, length, work(key, ivs, mode, encrypt))
}

/// Encrypt or decrypt a buffer of whole sectors in place; the first of them has the number `sector`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // they are what the contract names
pub fn sectors_crypt(
    buffer: &Bound<'_, PyAny>,
    cipher: &str,
    mode: &str,
    key: &Bound<'_, PyAny>,
    ivgen: &str,
    iv_key: &Bound<'_, PyAny>,
    sector: Int,
    encrypt: bool,
) -> PyResult<()> {
    let py = buffer.py();
    let mut buffer = Buffer::writable(buffer)?;
    let (key, iv_key) = (Buffer::readable(key)?, Buffer::readable(iv_key)?);
    if !buffer.len().is_multiple_of(SECTOR) {
        return value_error("buffer does not hold whole sectors");
    }
    let Ok(sector) = u64::try_from(sector.0) else {
        return value_error("sector is negative");
    };
    let mode = match mode {
        "ecb" => Mode::Ecb,
        "cbc" => Mode::Cbc,
        "ctr" => Mode::Ctr,
        "xts" => Mode::Xts,
        _ => return value_error("cipher is unknown"),
    };
    let Some(work) = prepare(cipher, mode, key.bytes(), ivgen, iv_key.bytes(), encrypt) else {
        return value_error("cipher is unknown");
    };
    let data = buffer.bytes_mut();
    py.detach(|| work(data, sector));
    Ok(())
}
