//! What this machine can do at the most: matrix products in cache and copies, measured here and now.
//!
//! Both run on all threads of the current rayon pool. The product is the kernels' own, on tiles that stay in the cache of
//! a core: no chunked kernel can be faster. A copy counts what it reads and what it writes, as [`cost`](crate::cost) does.

use crate::native::gemm::{Lhs, Mode, gemm};
use crate::native::tile::Tile;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Rows, columns and inner size of the product: three tiles of 64 KiB.
const SIDE: usize = 128;

/// Rounds of a measurement at the least; the fastest counts.
const ROUNDS: usize = 5;

/// Runs `work` on every thread of the pool again and again for `time`, and returns the best seconds of one round.
fn best(time: Duration, mut round: impl FnMut()) -> f64 {
    round();
    let (start, mut rounds, mut best) = (Instant::now(), 0, f64::INFINITY);
    while rounds < ROUNDS || start.elapsed() < time {
        let round_start = Instant::now();
        round();
        best = best.min(round_start.elapsed().as_secs_f64());
        rounds += 1;
    }
    best
}

/// GFLOP/s of f32 products in cache, all threads together; takes about `time`.
pub fn matrix_product(time: Duration) -> f64 {
    let threads = rayon::current_num_threads();
    let filled = |seed: usize| {
        let mut tile = Tile::new(SIDE, SIDE);
        for i in 0..SIDE {
            let row = tile.row_mut(i).iter_mut().enumerate();
            row.for_each(|(j, x)| *x = ((i * 7 + j * 3 + seed) % 13) as f32 / 13.0);
        }
        tile
    };
    let mut tiles: Vec<_> = (0..threads).map(|t| (filled(t), filled(t + 5), Tile::new(SIDE, SIDE))).collect();
    // A round of some milliseconds: waking the threads is then nothing.
    let products = 128;
    let seconds = best(time, || {
        tiles.par_iter_mut().with_max_len(1).for_each(|(a, b, c)| {
            for _ in 0..products {
                gemm(Mode::Set, [SIDE, SIDE, SIDE], Lhs::of(black_box(a), 0, 0), (&*b, 0, 0), (&mut *c, 0, 0));
            }
            black_box(c.data());
        });
    });
    (2 * SIDE.pow(3) * products * threads) as f64 / seconds / 1e9
}

/// GB/s of a copy whose two arrays together take `bytes`, read and write counted; takes about `time`.
pub fn copy(bytes: usize, time: Duration) -> f64 {
    let threads = rayon::current_num_threads();
    let each = (bytes / 8 / threads).max(1);
    let source = vec![1.0f32; each * threads];
    let mut target = vec![0.0f32; each * threads];
    // Small copies are repeated inside a round.
    let repeats = ((4 << 20) / bytes.max(1)).max(1);
    let seconds = best(time, || {
        target.par_chunks_mut(each).zip(source.par_chunks(each)).with_max_len(1).for_each(|(to, from)| {
            for _ in 0..repeats {
                to.copy_from_slice(black_box(from));
                black_box(&mut *to);
            }
        });
    });
    (8 * each * threads * repeats) as f64 / seconds / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_something() {
        let instant = Duration::ZERO;
        assert!(matrix_product(instant) > 0.0 && copy(1 << 16, instant) > 0.0);
    }
}
