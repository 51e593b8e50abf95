//! What the tests of the kernels share: reproducible inputs and the comparison with the f64 oracle.

use crate::{channels::ScanProblem, element::Element};

/// A reproducible sequence of numbers.
pub(crate) struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d)
    }

    /// Uniform in `[0, 1)`.
    pub fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `n` numbers in `[low, high)`, rounded to `E`.
    pub fn uniform<E: Element>(&mut self, n: usize, low: f64, high: f64) -> Vec<E> {
        (0..n).map(|_| E::from_f32((low + (high - low) * self.next()) as f32)).collect()
    }
}

/// The oracle's form of a problem.
pub(crate) fn shape_of(p: &ScanProblem) -> thalweg_reference::Shape {
    let cu_seqlens = p.cu_seqlens.clone();
    thalweg_reference::Shape { batch: p.batch, time: p.time, channels: p.channels, cu_seqlens }
}

/// Exact f64 copies.
pub(crate) fn wide<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| x.to_f32() as f64).collect()
}

/// Asserts that the largest difference is below `tolerance` of the largest magnitude (or of 1e-2, for tensors that are
/// zero but for rounding), and that nothing is NaN.
#[track_caller]
pub(crate) fn assert_close<E: Element>(name: &str, found: &[E], want: &[f64], tolerance: f64) {
    assert_eq!(found.len(), want.len(), "{name}");
    let scale = want.iter().fold(1e-2f64, |m, x| m.max(x.abs()));
    for (i, (x, want)) in found.iter().zip(want).enumerate() {
        let (x, bound) = (x.to_f32() as f64, tolerance * scale);
        assert!((x - want).abs() <= bound, "{name}[{i}]: {x}, want {want}, tolerance {bound:e}");
    }
}
