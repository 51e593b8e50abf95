//! The allocator of the command.
//!
//! Tensors of megabytes come and go with every operation. Allocators give such pages back to the system, and the faults
//! of taking them again are more than a tenth of a training step on a CPU: this one keeps what it has.

use libmimalloc_sys::{mi_option_set, mi_option_t};
use thalweg_bench::Counting;

#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

/// `mi_option_purge_delay` of mimalloc 3, which the bindings do not name: milliseconds until free pages go back.
const PURGE_DELAY: mi_option_t = 15;

/// From here on, free pages are kept for the next tensor.
pub fn keep() {
    // Safety: the option is set before there is a second thread.
    unsafe { mi_option_set(PURGE_DELAY, -1) };
}
