//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};

use crate::error::shape_error;
use crate::{Context, Error};

/// Rotates the pairs `(x[i], x[i + r/2])` of the first `r` features of a head by `position * theta^(-2i/r)`; the
/// features after them pass unchanged (partial rotary).
#[derive(Debug, Clone)]
pub struct Rotary {
    /// `theta^(-2i/r)`, radians per position of each pair.
    rates: Arc<[f64]>,
}

impl Rotary {
    /// Rotation of the first `features` (an even number) features of each head.
    pub fn new(features: usize, theta: f64) -> Self {
        let rate = |i| theta.powf(-2.0 * i as f64 / features as f64);
        Self { rates: (0..features / 2).map(rate).collect() }
    }

    /// The rotations at `positions`, `rows` rows of as many tokens: cosine and sine `[rows, T, 1, r/2]`, broadcast over
    /// heads and, from one row, over the batch. Nothing is kept: memory does not grow with the position.
    pub fn at(&self, positions: &[usize], rows: usize, device: &Device) -> Rotation {
        let half = self.rates.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for rate in self.rates.iter() {
                // In f64: at position 10^6 an f32 angle is wrong by 0.03.
                let (s, c) = (*position as f64 * rate).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let shape = [rows, positions.len() / rows.max(1), 1, half];
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        Rotation { cos: tensor(cos), sin: tensor(sin) }
    }
}

/// Rotations of a run of tokens.
#[derive(Debug, Clone)]
pub struct Rotation {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotation {
    /// Rotates `x`, `[B, T, H, head_dim]`.
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let half = self.cos.dims()[3];
        let features = x.dims()[3];
        let dtype = x.dtype();
        let (cos, sin) = (self.cos.clone().cast(dtype), self.sin.clone().cast(dtype));
        let first = x.clone().narrow(3, 0, half);
        let second = x.clone().narrow(3, half, half);
        let mut parts = vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
        if features > 2 * half {
            parts.push(x.narrow(3, 2 * half, features - 2 * half));
        }
        Tensor::cat(parts, 3)
    }
}

/// Where the tokens of a call stand in their sequences. With packed documents positions restart at each of them, and go
/// on from a state if there is one.
#[derive(Debug, Clone)]
pub(crate) struct Positions {
    /// Tokens that each sequence saw before the call.
    before: Vec<usize>,
    /// Tokens that each sequence sees in the call.
    lengths: Vec<usize>,
    packed: bool,
}

impl Positions {
    /// Of a call with input `x` (checked already) and the tokens `seen` by the state.
    pub fn of_forward(x: &Tensor<3>, seen: Option<Vec<usize>>, context: &Context) -> Result<Self, Error> {
        let [batch, time, _] = x.dims();
        let lengths: Vec<usize> = match &context.cu_seqlens {
            Some(cu) => cu.windows(2).map(|ends| ends[1] - ends[0]).collect(),
            None => vec![time; batch],
        };
        let before = seen.unwrap_or_else(|| vec![0; lengths.len()]);
        if before.len() != lengths.len() {
            return Err(shape_error("state.positions", &[before.len()], format!("[sequences] = [{}]", lengths.len())));
        }
        Ok(Self { before, lengths, packed: context.cu_seqlens.is_some() })
    }

    /// Tokens that each sequence has seen after the call.
    pub fn after(&self) -> Vec<usize> {
        let pairs = self.before.iter().zip(&self.lengths);
        pairs.map(|(before, length)| before + length).collect()
    }

    /// Whether every sequence is at the same position.
    pub fn aligned(&self) -> bool {
        self.before.windows(2).all(|pair| pair[0] == pair[1])
    }

    /// For every token of the call whether it is the first of its sequence; `None` if none is.
    pub fn first_tokens(&self) -> Option<Vec<bool>> {
        if self.before.iter().all(|before| *before > 0) {
            return None;
        }
        let runs = self.before.iter().zip(&self.lengths);
        Some(runs.flat_map(|(before, length)| (0..*length).map(move |i| before + i == 0)).collect())
    }

    /// The rotations of all tokens of the call.
    pub fn rotation(&self, rotary: &Rotary, device: &Device) -> Rotation {
        let run = |(before, length): (&usize, &usize)| *before..before + length;
        if self.packed || !self.aligned() {
            let runs = self.before.iter().zip(&self.lengths);
            let positions: Vec<usize> = runs.flat_map(run).collect();
            let rows = if self.packed { 1 } else { self.before.len() };
            return rotary.at(&positions, rows, device);
        }
        let start = self.before.first().copied().unwrap_or(0);
        let length = self.lengths.first().copied().unwrap_or(0);
        let positions: Vec<usize> = (start..start + length).collect();
        rotary.at(&positions, 1, device)
    }
}
