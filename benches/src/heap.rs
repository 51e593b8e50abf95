//! How much memory a benchmark takes.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering::Relaxed};

static COUNTS: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

/// An allocator that counts what is taken and given back while a benchmark first runs. What the system says of a process
/// would not do: allocators keep what is freed, for whoever asks next.
///
/// Programs make it their `#[global_allocator]`; without it reports say 0.
pub struct Counting<A>(pub A);

fn count(bytes: isize) {
    if COUNTS.load(Relaxed) {
        let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
        PEAK.fetch_max(live, Relaxed);
    }
}

fn size(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

// Safety: whatever is asked goes to the allocator inside.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(size(layout.size()));
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(size(layout.size()));
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-size(layout.size()));
        unsafe { self.0.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(size(new_size) - size(layout.size()));
        unsafe { self.0.realloc(at, layout, new_size) }
    }
}

/// One measurement at a time, until it is dropped.
pub(crate) struct Meter(());

impl Meter {
    /// Begins to count from 0; `None` while another measurement runs.
    pub fn start() -> Option<Self> {
        if COUNTS.swap(true, Relaxed) {
            return None;
        }
        LIVE.store(0, Relaxed);
        PEAK.store(0, Relaxed);
        Some(Self(()))
    }

    /// Bytes at the most above the start, since then.
    pub fn peak(self) -> u64 {
        PEAK.load(Relaxed).try_into().unwrap_or(0)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        COUNTS.store(false, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Counting<std::alloc::System> = Counting(std::alloc::System);

    /// Other tests may allocate meanwhile; this one is larger.
    #[test]
    fn counts_the_peak() {
        const LARGE: usize = 256 << 20;
        // Other tests measure too.
        let start = || std::iter::repeat_with(Meter::start).flatten().next().expect("endless");
        let meter = start();
        assert!(Meter::start().is_none());
        drop(Vec::<u8>::with_capacity(LARGE));
        let one = meter.peak() as usize;
        assert!((LARGE..3 * LARGE / 2).contains(&one), "{one}");
        // What was there before is none of a measurement's.
        let outside = Vec::<u8>::with_capacity(LARGE);
        let meter = start();
        drop(outside);
        let other = meter.peak() as usize;
        assert!(other < LARGE / 2, "{other}");
    }
}
