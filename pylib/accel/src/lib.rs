//! Native twins of the kernels of diskwright; `kernels/contract.py` of the library says what each promises.

mod args;
mod bits;
mod buffer;
mod ciphers;
mod codecs;
mod compare;
mod counts;
mod crc32c;
mod l2;
mod pbkdf2;
mod refcounts;
mod runs;
mod table;
mod transfer;

#[pyo3::pymodule]
mod diskwright_accel {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::bits::bit_runs;
    #[pymodule_export]
    use crate::ciphers::sectors_crypt;
    #[pymodule_export]
    use crate::codecs::{deflate, inflate, zstd_compress, zstd_decompress};
    #[pymodule_export]
    use crate::compare::{difference_runs, first_difference, nonzero_runs};
    #[pymodule_export]
    use crate::counts::{refcount_mismatches, tally};
    #[pymodule_export]
    use crate::crc32c::crc32c;
    #[pymodule_export]
    use crate::l2::{l2_runs, l2_runs_extended};
    #[pymodule_export]
    use crate::pbkdf2::pbkdf2;
    #[pymodule_export]
    use crate::refcounts::{refcount_free_runs, refcounts_pack, refcounts_unpack};
    #[pymodule_export]
    use crate::table::table_runs;
    #[pymodule_export]
    use crate::transfer::{gather, scatter};

    /// What the library asks for before it uses anything else here.
    #[pymodule_export]
    const ABI: u32 = 2;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
