//! Cases of drawn sizes, for tests that compare implementations without a file.

use crate::{Case, Tensor};
use std::collections::BTreeMap;
use thalweg_reference::cases::{Betas, Gates, Keys, MatrixCase, Precision};
use thalweg_reference::matrix::Problem as Sizes;
use thalweg_reference::random::Random;

/// What decides a case: small enough to print, complete enough to sample from. Operations without a matrix state take their
/// channels from `key_dim`, and widths and windows from the seed.
#[derive(Debug, Clone)]
pub struct Draw {
    /// Sizes and packing.
    pub problem: Sizes,
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

impl Draw {
    /// The tensors of a matrix recurrence.
    pub(super) fn tensors(&self) -> MatrixCase {
        MatrixCase::sample(self.problem.clone(), self.seed, Precision::F32, self.gates, self.keys, self.betas)
    }

    /// Log decays of the regime.
    pub(super) fn gates(&self, len: usize) -> Vec<f64> {
        self.gates.sample(&mut Random::new(self.seed ^ 2), len)
    }
}

/// A case under construction.
pub(super) struct Build {
    pub case: Case,
    random: Random,
}

impl Build {
    pub fn new(op: &str, seed: u64) -> Self {
        let (metadata, tensors) = (BTreeMap::new(), BTreeMap::new());
        let case = Case { name: op.to_string(), op: op.to_string(), metadata, tensors };
        Self { case, random: Random::new(seed) }
    }

    /// Queries, keys, values, cotangents and states of a matrix recurrence.
    pub fn of_matrix(op: &str, draw: &Draw, c: &MatrixCase, (q, k): (&[f64], &[f64])) -> Self {
        let p = &draw.problem;
        let keys = [p.batch, p.time, p.heads, p.key_dim];
        let values = [p.batch, p.time, p.value_heads, p.value_dim];
        let states = [p.sequences(), p.value_heads, p.key_dim, p.value_dim];
        Self::new(op, draw.seed)
            .with("in.q", &keys, q)
            .with("in.v", &values, &c.v)
            .with("cot.o", &values, &c.d_o)
            .with("cot.ht", &states, &c.d_final_state)
            .packed(p.cu_seqlens.as_deref())
            .when(op != "hgrn2", |b| b.with("in.k", &keys, k))
            .when(draw.initial_state, |b| b.with("in.h0", &states, &c.initial_state))
    }

    /// Shapes of all tokens and of the states of an element-wise operation.
    pub fn of_channels(op: &str, draw: &Draw) -> (([usize; 3], [usize; 2]), Self) {
        let p = &draw.problem;
        let channels = p.key_dim * (1 + draw.seed as usize % 3);
        let build = Self::new(op, draw.seed).packed(p.cu_seqlens.as_deref());
        (([p.batch, p.time, channels], [p.sequences(), channels]), build)
    }

    pub fn with(mut self, name: &str, shape: &[usize], values: &[f64]) -> Self {
        let values = Precision::F32.round_all(values.to_vec());
        self.case.tensors.insert(name.to_string(), Tensor { shape: shape.to_vec(), values });
        self
    }

    pub fn normal(mut self, name: &str, shape: &[usize]) -> Self {
        let values = self.random.normals(shape.iter().product());
        self.with(name, shape, &values)
    }

    /// The cotangent of the final state, and the initial state if the draw has one.
    pub fn with_states(self, draw: &Draw, initial: &str, last: &str, shape: &[usize]) -> Self {
        let build = self.normal(&format!("cot.{last}"), shape);
        build.when(draw.initial_state, |b| b.normal(&format!("in.{initial}"), shape))
    }

    pub fn option(mut self, name: &str, value: String) -> Self {
        self.case.metadata.insert(name.to_string(), value);
        self
    }

    pub fn when(self, condition: bool, then: impl FnOnce(Self) -> Self) -> Self {
        if condition { then(self) } else { self }
    }

    pub fn packed(self, bounds: Option<&[usize]>) -> Self {
        let Some(bounds) = bounds else { return self };
        let values: Vec<_> = bounds.iter().map(|&x| x as f64).collect();
        self.with("int.cu_seqlens", &[bounds.len()], &values)
    }
}
