//! Asking for memory ahead of its use.
//!
//! The rows of one head lie far apart, too far for the hardware to guess the next. Asked for all at once they wait for the
//! processor's few places for lines that are under way, and the computation with them; so products ask for one line after
//! some steps each.

use super::tile::Rows;
use std::cell::Cell;

/// Bytes of a cache line.
const LINE: usize = 64;

/// What a task reads soon: its products ask for it, in this order.
#[derive(Default)]
pub(crate) struct Ahead {
    strips: Vec<Strip>,
    /// The strips before this one have been begun.
    next: Cell<usize>,
    begun: Cell<Strip>,
}

impl Ahead {
    /// Forgets what has not been asked for.
    pub fn clear(&mut self) {
        self.strips.clear();
        self.next.set(0);
        self.begun.set(Strip::default());
    }

    /// `rows` rows of `cols` elements.
    pub fn rows<E>(&mut self, src: &[E], at: Rows, rows: usize, cols: usize) {
        let line = src.as_ptr().wrapping_add(at.offset) as usize;
        let lines = (cols * size_of::<E>()).div_ceil(LINE);
        if rows == 0 || lines == 0 {
            return;
        }
        self.strips.push(Strip { line, left: lines, lines, stride: at.stride * size_of::<E>(), rows });
    }

    /// All of a slice.
    pub fn slice<E>(&mut self, src: &[E]) {
        self.rows(src, Rows { offset: 0, stride: 0 }, 1, src.len());
    }

    /// What to ask for now; [`put_back`](Self::put_back) takes the rest.
    #[inline(always)]
    pub fn take(&self) -> Strip {
        let (strip, next) = (self.begun.get(), self.next.get());
        match self.strips.get(next) {
            Some(&following) if strip.rows == 0 => {
                self.next.set(next + 1);
                following
            }
            _ => strip,
        }
    }

    #[inline(always)]
    pub fn put_back(&self, strip: Strip) {
        self.begun.set(strip);
    }
}

/// Rows that are as far from each other, by their addresses.
#[derive(Clone, Copy, Default)]
pub(crate) struct Strip {
    line: usize,
    /// Lines of the row at hand that are left, and of a row.
    left: usize,
    lines: usize,
    stride: usize,
    rows: usize,
}

impl Strip {
    /// Asks for the next line, if there is one.
    #[inline(always)]
    pub fn ask(&mut self) {
        if self.rows == 0 {
            return;
        }
        prefetch(self.line as *const u8);
        self.line = self.line.wrapping_add(LINE);
        self.left -= 1;
        if self.left == 0 {
            self.line = self.line.wrapping_add(self.stride).wrapping_sub(self.lines * LINE);
            self.left = self.lines;
            self.rows -= 1;
        }
    }
}

#[inline(always)]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // Safety: a prefetch has no effect but on the cache, and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(ahead: &Ahead, at_a_time: usize, base: *const f32) -> Vec<usize> {
        let mut all = Vec::new();
        loop {
            let mut strip = ahead.take();
            if strip.rows == 0 {
                return all;
            }
            for _ in 0..at_a_time {
                if strip.rows > 0 {
                    all.push((strip.line - base as usize) / 4);
                }
                strip.ask();
            }
            ahead.put_back(strip);
        }
    }

    #[test]
    fn asks_for_every_line_once_in_order() {
        let src = vec![0.0f32; 4096];
        for at_a_time in [1, 3, 100] {
            let mut ahead = Ahead::default();
            ahead.rows(&src, Rows { offset: 64, stride: 512 }, 3, 40);
            ahead.slice(&src[2048..2080]);
            let expected = [64, 80, 96, 576, 592, 608, 1088, 1104, 1120, 2048, 2064];
            assert_eq!(asked(&ahead, at_a_time, src.as_ptr()), expected);
            ahead.clear();
            assert!(asked(&ahead, 1, src.as_ptr()).is_empty());
        }
    }
}
