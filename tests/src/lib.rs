//! Tests that span crates: golden files, laws, gradients, decoding, learning.
//!
//! This library holds what they share: the cases that property tests draw, and conversions between the engine's element
//! types and the oracle's f64.

use half::bf16;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use thalweg_kernels::Element;
use thalweg_reference::cases::{BETAS, Betas, GATES, Gates, KEYS, Keys, MatrixCase, Precision, cu_seqlens};
use thalweg_reference::matrix::Problem;
use thalweg_reference::random::Random;

/// A storage type with the precision that the oracle's cases are rounded to.
pub trait Storage: Element {
    /// The precision of its cases and its row of the tolerance table.
    const PRECISION: Precision;
}

impl Storage for f32 {
    const PRECISION: Precision = Precision::F32;
}

impl Storage for bf16 {
    const PRECISION: Precision = Precision::Bf16;
}

/// Oracle numbers in an engine's element type; exact for sampled cases.
pub fn narrow<E: Element>(x: &[f64]) -> Vec<E> {
    x.iter().map(|&x| E::from_f32(x as f32)).collect()
}

/// An engine's numbers as f32, for comparison.
pub fn widen<E: Element>(x: &[E]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// `cases` cases from a fixed seed, so that a run repeats; `PROPTEST_CASES` and `PROPTEST_RNG_SEED` search further.
pub fn config(cases: u32) -> ProptestConfig {
    let mut config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = cases;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        config.rng_seed = RngSeed::Fixed(20_240_607);
    }
    config
}

/// What decides a matrix case: small enough to print, complete enough to sample from.
#[derive(Debug, Clone)]
pub struct MatrixDraw {
    /// Sizes and packing.
    pub problem: Problem,
    /// Tokens per chunk.
    pub chunk: usize,
    /// Seed of the tensors.
    pub seed: u64,
    /// Decay regime.
    pub gates: Gates,
    /// Key regime.
    pub keys: Keys,
    /// Step-size regime.
    pub betas: Betas,
    /// Whether an initial state is given.
    pub initial_state: bool,
}

impl MatrixDraw {
    /// The tensors.
    pub fn case(&self, precision: Precision) -> MatrixCase {
        MatrixCase::sample(self.problem.clone(), self.seed, precision, self.gates, self.keys, self.betas)
    }
}

/// Times around the borders of chunks (64) and sub-chunks (16), and none of them.
pub const TIMES: [usize; 11] = [1, 2, 15, 16, 17, 40, 63, 64, 65, 100, 130];

/// Draws matrix problems: borders of chunks, key and value sizes off the vector width, grouped heads, packed sequences,
/// every regime of gates, keys and step sizes. `group` is the largest number of value heads per key head.
pub fn matrix_draws(group: usize) -> impl Strategy<Value = MatrixDraw> {
    let sizes = (
        1usize..=2,
        prop::sample::select(&TIMES[..]),
        1usize..=2,
        1..=group,
        prop::sample::select(&[1usize, 3, 8, 16, 20, 33, 64][..]),
        prop::sample::select(&[1usize, 5, 8, 16, 24, 48][..]),
    );
    let regimes = (prop::sample::select(&GATES[..]), prop::sample::select(&KEYS[..]), prop::sample::select(&BETAS[..]));
    let rest = (
        prop::sample::select(&[64usize, 16, 7, 1, 1000][..]),
        any::<u64>(),
        any::<bool>(),
        prop::option::of(1usize..=4),
    );
    (sizes, regimes, rest).prop_map(|(sizes, (gates, keys, betas), (chunk, seed, initial_state, packed))| {
        let (batch, time, heads, group, key_dim, value_dim) = sizes;
        // With one key feature and beta 1 the new value replaces the state exactly: its gradient is rounding alone.
        let key_dim = if betas == Betas::One { key_dim.max(2) } else { key_dim };
        let bounds = packed.map(|n| cu_seqlens(&mut Random::new(seed ^ 1), time, n.min(time)));
        let problem = Problem {
            batch: if bounds.is_some() { 1 } else { batch },
            time,
            heads,
            value_heads: heads * group,
            key_dim,
            value_dim,
            // Exact in f32, unlike most values of key_dim^-0.5.
            scale: f64::from((key_dim as f32).powf(-0.5)),
            cu_seqlens: bounds,
        };
        MatrixDraw { problem, chunk, seed, gates, keys, betas, initial_state }
    })
}
