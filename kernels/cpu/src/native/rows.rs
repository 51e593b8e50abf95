//! The ground of the kernels that are bound by memory: they walk over the rows of `[tokens, channels]` tensors with
//! their state in L1, and write their outputs past the caches.
//!
//! An output that is larger than the caches costs a read for each write if it is stored the ordinary way, and a page
//! fault for each 4 KiB of fresh memory; hence non-temporal stores and huge pages.

use crate::element::Element;
use std::any::TypeId;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

/// Outputs from this size on bypass the caches; smaller ones stay there for whoever reads them next.
const STREAM_BYTES: usize = 4 << 20;

/// A buffer of `len` elements that is not initialised yet; every element is written once, by one task.
pub(crate) struct Output<E> {
    buffer: Vec<MaybeUninit<E>>,
}

impl<E: Element> Output<E> {
    /// Takes over the memory of `reuse` where it is large enough.
    pub fn new(len: usize, mut reuse: Vec<E>) -> Self {
        reuse.clear();
        if reuse.capacity() < len {
            reuse = Vec::with_capacity(len);
            advise_huge_pages(reuse.as_mut_ptr() as usize, len * size_of::<E>());
        }
        let mut v = std::mem::ManuallyDrop::new(reuse);
        // Safety: the parts of a live vector; `MaybeUninit<E>` has the layout of `E` and needs no initialisation.
        let buffer = unsafe { Vec::from_raw_parts(v.as_mut_ptr().cast(), len, v.capacity()) };
        Self { buffer }
    }

    pub fn rows(&mut self) -> Rows<E> {
        let len = self.buffer.len();
        Rows { ptr: self.buffer.as_mut_ptr().cast(), len, stream: len * size_of::<E>() >= STREAM_BYTES }
    }

    /// Parts of `len` elements each, for tasks that begin with [`zeroed`].
    pub fn parts(&mut self, len: usize) -> std::slice::ChunksMut<'_, MaybeUninit<E>> {
        self.buffer.chunks_mut(len)
    }

    /// # Safety
    /// Every element has been written.
    pub unsafe fn finish(self) -> Vec<E> {
        let mut v = std::mem::ManuallyDrop::new(self.buffer);
        // Safety: the parts of a live vector, all of whose elements are initialised.
        unsafe { Vec::from_raw_parts(v.as_mut_ptr().cast(), v.len(), v.capacity()) }
    }
}

/// A part of an [`Output`] as a slice of zeros. The task that fills it clears it first, in its own cache; clearing all at
/// once is a pass over memory on one thread.
pub(crate) fn zeroed<E: Element>(part: &mut [MaybeUninit<E>]) -> &mut [E] {
    part.fill(MaybeUninit::new(E::default()));
    // Safety: initialised just now.
    unsafe { &mut *(std::ptr::from_mut(part) as *mut [E]) }
}

/// Asks for huge pages: faulting in 64 MiB takes 30 ms in pages of 4 KiB, longer than a scan over it.
fn advise_huge_pages(at: usize, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= STREAM_BYTES {
        const PAGE: usize = 4096;
        let (from, to) = (at.next_multiple_of(PAGE), (at + bytes) / PAGE * PAGE);
        // Safety: the range lies inside an allocation of ours, and the advice changes no content. A refusal is harmless.
        unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (at, bytes);
}

/// A buffer on the stack that begins at a cache line. What is stored by the vector and loaded by the half of it must not
/// lie across two lines: the load then waits for the store to leave the core.
#[repr(align(64))]
pub(crate) struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// The writing end of an [`Output`], shared by tasks that own disjoint pieces.
#[derive(Clone, Copy)]
pub(crate) struct Rows<E> {
    ptr: *mut E,
    len: usize,
    stream: bool,
}

// Safety: a plain pointer to `Send` data; disjointness is the contract of `put`.
unsafe impl<E: Send> Send for Rows<E> {}
unsafe impl<E: Send> Sync for Rows<E> {}

/// Channels that are worked on together: long enough for any vector unit, short enough to stay in registers and L1
/// between being computed and being stored.
pub(crate) const BLOCK: usize = 64;
pub(crate) type Block = [f32; BLOCK];

impl<E: Element> Rows<E> {
    /// Writes the first `len` values of `block` at `at`, rounded to `E`.
    ///
    /// # Safety
    /// No other task writes these elements.
    #[inline(always)]
    pub unsafe fn put(&self, at: usize, block: &Block, len: usize) {
        assert!(len <= BLOCK && at + len <= self.len, "store outside of the output buffer");
        let mut rounded = Aligned([E::default(); BLOCK]);
        let src: *const E = if is_f32::<E>() {
            block.as_ptr().cast()
        } else {
            match len {
                // A length that the compiler knows makes one run of vector code.
                BLOCK => E::from_f32_slice(&block[..], &mut rounded[..]),
                _ => E::from_f32_slice(&block[..len], &mut rounded[..len]),
            }
            rounded.as_ptr()
        };
        // Safety: inside the buffer, checked above; `src` is a different allocation of at least `len` elements.
        unsafe {
            let dst = self.ptr.add(at);
            if self.stream && len == BLOCK && (dst as usize).is_multiple_of(16) {
                stream::<E>(dst, src);
            } else {
                std::ptr::copy_nonoverlapping(src, dst, len);
            }
        }
    }
}

/// Copies one block past the caches. Stores of 16 bytes merge into whole lines on their way out, whatever the
/// alignment of the row to them.
///
/// # Safety
/// `src` and `dst` are valid for `BLOCK` elements; `dst` is a multiple of 16 bytes.
#[inline(always)]
unsafe fn stream<E>(dst: *mut E, src: *const E) {
    #[cfg(target_arch = "x86_64")]
    for i in (0..BLOCK * size_of::<E>()).step_by(16) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};
        unsafe { _mm_stream_ps(dst.cast::<u8>().add(i).cast(), _mm_loadu_ps(src.cast::<u8>().add(i).cast())) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    unsafe {
        std::ptr::copy_nonoverlapping(src, dst, BLOCK)
    }
}

/// Orders the non-temporal stores of this task before whatever follows it; to be called once at its end.
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // Safety: every x86-64 has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    }
}

#[inline(always)]
fn is_f32<E: 'static>() -> bool {
    TypeId::of::<E>() == TypeId::of::<f32>()
}

/// `x[at..at + len]` as f32: in place if that is a whole f32 block, else widened into `buffer` and padded with zeros.
#[inline(always)]
pub(crate) fn block<'a, E: Element>(x: &'a [E], at: usize, len: usize, buffer: &'a mut Block) -> &'a Block {
    let src = &x[at..at + len];
    if len == BLOCK && is_f32::<E>() {
        // Safety: `E` is f32 and the slice has `BLOCK` elements.
        return unsafe { &*src.as_ptr().cast::<Block>() };
    }
    match src.first_chunk::<BLOCK>() {
        Some(src) => {
            // By way of a value that nothing else refers to, or the compiler makes no vector code of it.
            let mut wide = [0.0; BLOCK];
            E::to_f32_slice(src, &mut wide);
            *buffer = wide;
        }
        None => {
            E::to_f32_slice(src, &mut buffer[..len]);
            buffer[len..].fill(0.0);
        }
    }
    buffer
}

/// How many blocks ahead of the current one to prefetch; farther crosses more pages and is slower (measured).
pub(crate) const AHEAD: usize = 3;

/// Asks for the block at `x[at..]`, which need not exist: the hardware's prefetcher loses a walk over several tensors
/// at each end of a page, and one that runs backwards altogether.
#[inline(always)]
pub(crate) fn prefetch<E>(x: &[E], at: usize) {
    #[cfg(target_arch = "x86_64")]
    for byte in (0..BLOCK * size_of::<E>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // Safety: a prefetch never faults, and the address is not an access.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(x.as_ptr().wrapping_add(at).cast::<i8>().wrapping_add(byte)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, at);
}

/// A state of any length as blocks, padded with zeros.
pub(crate) fn to_blocks(state: &[f32]) -> Vec<Block> {
    let mut blocks = vec![[0.0; BLOCK]; state.len().div_ceil(BLOCK)];
    blocks.as_flattened_mut()[..state.len()].copy_from_slice(state);
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// Rows at any alignment, whole blocks and remainders, in both element sizes.
    #[test]
    fn stores_any_alignment() {
        fn check<E: Element + PartialEq + std::fmt::Debug>() {
            let n = STREAM_BYTES / size_of::<E>();
            let row: Block = std::array::from_fn(|i| i as f32 + 1.0);
            let mut out = Output::<E>::new(n, vec![E::default(); n]);
            let rows = out.rows();
            assert!(rows.stream);
            let pieces = [(0, 64), (200, 64), (301, 64), (400, 1), (517, 63), (n - 64, 64)];
            for (at, len) in pieces {
                unsafe { rows.put(at, &row, len) };
            }
            fence();
            let out = unsafe { out.finish() };
            let mut buffer = [7.0; BLOCK];
            for (at, len) in pieces {
                let back = block(&out, at, len, &mut buffer);
                assert_eq!(back[..len], row[..len]);
                assert!(at + len == n || out[at + len] == E::default());
            }
        }
        check::<f32>();
        check::<bf16>();
    }
}
