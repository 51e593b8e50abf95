//! Random inputs in the regimes that break kernels: gates that forget nothing or everything, keys that agree.
//!
//! All numbers are exact in the element type under test ([`Precision`]), so that oracle and engine start from the same
//! input.

use crate::matrix::Problem;
use crate::random::Random;
use crate::wrappers::l2norm;

/// What inputs are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 24 significant bits.
    F32,
    /// 8 significant bits.
    Bf16,
}

impl Precision {
    /// The nearest number of this precision (ties to even).
    pub fn round(self, x: f64) -> f64 {
        let x = x as f32;
        match self {
            Precision::F32 => f64::from(x),
            Precision::Bf16 => {
                let bits = x.to_bits();
                let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000;
                f64::from(if x.is_finite() { f32::from_bits(rounded) } else { x })
            }
        }
    }

    /// [`Self::round`] of every element.
    pub fn round_all(self, mut x: Vec<f64>) -> Vec<f64> {
        x.iter_mut().for_each(|x| *x = self.round(*x));
        x
    }
}

/// Log-decays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gates {
    /// Exactly zero: nothing is forgotten.
    Zero,
    /// `-mean * u` with `u` uniform in `[0.5, 1.5)`: about 1e-4, 0.05, 1, 8 and 80 are the regimes of interest.
    Mean(f64),
    /// Every element one of 0, 1e-4, 0.05, 1, 8, 80, negated: neighbours that differ by all of the range.
    Mixed,
}

/// Every gate regime.
pub const GATES: [Gates; 7] = [
    Gates::Zero,
    Gates::Mean(1e-4),
    Gates::Mean(0.05),
    Gates::Mean(1.0),
    Gates::Mean(8.0),
    Gates::Mean(80.0),
    Gates::Mixed,
];

impl Gates {
    /// Whether the wider of the tolerances applies: from a mean decay of 8 on.
    pub fn extreme(self) -> bool {
        matches!(self, Gates::Mixed) || matches!(self, Gates::Mean(mean) if mean >= 8.0)
    }

    /// `len` log-decays, all at most 0.
    pub fn sample(self, random: &mut Random, len: usize) -> Vec<f64> {
        const MIXED: [f64; 6] = [0.0, 1e-4, 0.05, 1.0, 8.0, 80.0];
        let one = |random: &mut Random| match self {
            Gates::Zero => 0.0,
            Gates::Mean(mean) => -mean * (0.5 + random.uniform()),
            Gates::Mixed => -MIXED[random.below(MIXED.len())],
        };
        (0..len).map(|_| Precision::F32.round(one(random))).collect()
    }
}

/// Directions of the keys, which decide the condition of the delta rule's triangular system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Independent.
    Random,
    /// Correlation 0.9 with one common direction per head.
    Correlated,
    /// One key for all tokens of a head.
    Identical,
}

/// Every key regime.
pub const KEYS: [Keys; 3] = [Keys::Random, Keys::Correlated, Keys::Identical];

impl Keys {
    /// `[tokens, heads, key_dim]`, rows of unit length.
    pub fn sample(self, random: &mut Random, tokens: usize, heads: usize, key_dim: usize) -> Vec<f64> {
        let common = random.normals(heads * key_dim);
        let weight: f64 = match self {
            Keys::Random => 0.0,
            Keys::Correlated => 0.9,
            Keys::Identical => 1.0,
        };
        let noise = (1.0 - weight * weight).sqrt();
        let raw: Vec<_> =
            (0..tokens * common.len()).map(|i| weight * common[i % common.len()] + noise * random.normal()).collect();
        l2norm(&raw, key_dim)
    }
}

/// Step sizes of the delta rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Betas {
    /// Nothing is written.
    Zero,
    /// The old value is replaced.
    One,
    /// Uniform in `[0, 1)`.
    Uniform,
}

/// Every step-size regime.
pub const BETAS: [Betas; 3] = [Betas::Zero, Betas::One, Betas::Uniform];

impl Betas {
    /// `len` step sizes.
    pub fn sample(self, random: &mut Random, len: usize) -> Vec<f64> {
        match self {
            Betas::Zero => vec![0.0; len],
            Betas::One => vec![1.0; len],
            Betas::Uniform => Precision::F32.round_all(random.uniforms(len)),
        }
    }
}

/// A full set of tensors for any matrix recurrence, including cotangents of both outputs; take what the op needs.
#[derive(Debug, Clone)]
pub struct MatrixCase {
    /// Sizes.
    pub problem: Problem,
    /// `[batch, time, heads, key_dim]`.
    pub q: Vec<f64>,
    /// `[batch, time, heads, key_dim]`, unit rows.
    pub k: Vec<f64>,
    /// `[batch, time, value_heads, value_dim]`.
    pub v: Vec<f64>,
    /// `[batch, time, value_heads, key_dim]`.
    pub gate_key: Vec<f64>,
    /// `[batch, time, value_heads]`.
    pub gate_head: Vec<f64>,
    /// `[value_heads]`.
    pub gate_constant: Vec<f64>,
    /// `[batch, time, value_heads]`.
    pub beta: Vec<f64>,
    /// `[batch, time, heads, key_dim]`: minus a unit row.
    pub a: Vec<f64>,
    /// `[batch, time, heads, key_dim]`: the same unit row times numbers in `[0, 1)`, so that the state stays bounded.
    pub b: Vec<f64>,
    /// `[sequences, value_heads, key_dim, value_dim]`.
    pub initial_state: Vec<f64>,
    /// Shaped like `v`.
    pub d_o: Vec<f64>,
    /// Shaped like `initial_state`.
    pub d_final_state: Vec<f64>,
}

impl MatrixCase {
    /// Samples all tensors; `q`, `k`, `v`, `a`, `b` and `d_o` have `precision`, the rest is f32.
    pub fn sample(problem: Problem, seed: u64, precision: Precision, gates: Gates, keys: Keys, betas: Betas) -> Self {
        let mut random = Random::new(seed);
        let Problem { heads, value_heads, key_dim, value_dim, .. } = problem;
        let tokens = problem.batch * problem.time;
        let unit = Keys::Random.sample(&mut random, tokens, heads, key_dim);
        let b = unit.iter().map(|x| x * random.uniform()).collect();
        Self {
            q: precision.round_all(random.normals(tokens * heads * key_dim)),
            k: precision.round_all(keys.sample(&mut random, tokens, heads, key_dim)),
            v: precision.round_all(random.normals(tokens * value_heads * value_dim)),
            gate_key: gates.sample(&mut random, tokens * value_heads * key_dim),
            gate_head: gates.sample(&mut random, tokens * value_heads),
            gate_constant: gates.sample(&mut random, value_heads),
            beta: betas.sample(&mut random, tokens * value_heads),
            a: precision.round_all(unit.iter().map(|x| -x).collect()),
            b: precision.round_all(b),
            initial_state: Precision::F32.round_all(random.normals(problem.state_len())),
            d_o: precision.round_all(random.normals(tokens * value_heads * value_dim)),
            d_final_state: Precision::F32.round_all(random.normals(problem.state_len())),
            problem,
        }
    }
}

/// Boundaries of `sequences` packed sequences over `time` tokens, lengths at random but at least 1.
///
/// # Panics
/// If there are more sequences than tokens.
pub fn cu_seqlens(random: &mut Random, time: usize, sequences: usize) -> Vec<usize> {
    assert!((1..=time).contains(&sequences), "{sequences} sequences in {time} tokens");
    let mut cuts: Vec<usize> = (1..time).collect();
    while cuts.len() >= sequences {
        cuts.remove(random.below(cuts.len()));
    }
    [vec![0], cuts, vec![time]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_keep_their_promises() {
        let mut random = Random::new(3);
        for gates in GATES {
            assert!(gates.sample(&mut random, 100).iter().all(|&g| (-120.0..=0.0).contains(&g)));
        }
        let keys = Keys::Identical.sample(&mut random, 4, 2, 8);
        assert_eq!(keys[..16], keys[48..]);
        assert_eq!(Precision::Bf16.round(1.0 + 2f64.powi(-9)), 1.0);
        assert_eq!(Precision::Bf16.round(1.0 + 3.0 * 2f64.powi(-9)), 1.0 + 2f64.powi(-7));
        for sequences in [1, 2, 7] {
            let bounds = cu_seqlens(&mut random, 7, sequences);
            assert!(bounds.len() == sequences + 1 && bounds.is_sorted_by(|a, b| a < b), "{bounds:?}");
        }
    }
}
