//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, Tensor, TensorData};

/// Rotates the pairs `(x[i], x[i + r/2])` of the first `r` features of a head by `position * theta^(-2i/r)`; the
/// features after them pass unchanged (partial rotary).
#[derive(Debug, Clone)]
pub struct Rotary {
    features: usize,
    theta: f64,
    /// `[positions, r/2]` pairs of cosine and sine, grown as positions come up and shared by clones.
    table: Arc<Mutex<Vec<(f32, f32)>>>,
}

impl Rotary {
    /// Rotation of the first `features` (an even number) features of each head.
    pub fn new(features: usize, theta: f64) -> Self {
        Self { features, theta, table: Arc::default() }
    }

    /// The rotations at `positions`, one per token, broadcast over batch and heads: cosine and sine `[1, T, 1, r/2]`.
    pub fn at(&self, positions: &[usize], device: &Device) -> Rotation {
        let half = self.features / 2;
        let end = positions.iter().max().map_or(0, |last| last + 1);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let known = table.len() / half.max(1);
        if known < end {
            // Angles in f64: at position 10^6 an f32 angle is wrong by 0.03.
            let rates: Vec<f64> = (0..half).map(|i| self.theta.powf(-2.0 * i as f64 / self.features as f64)).collect();
            for position in known..end.next_power_of_two() {
                table.extend(rates.iter().map(|rate| {
                    let (sin, cos) = (position as f64 * rate).sin_cos();
                    (cos as f32, sin as f32)
                }));
            }
        }
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for (c, s) in &table[position * half..(position + 1) * half] {
                cos.push(*c);
                sin.push(*s);
            }
        }
        let shape = [1, positions.len(), 1, half];
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

    /// The same rotations for tokens on the batch axis: `[1, B, 1, r/2]` becomes `[B, 1, 1, r/2]`.
    #[must_use]
    pub fn per_sequence(self) -> Self {
        Self { cos: self.cos.swap_dims(0, 1), sin: self.sin.swap_dims(0, 1) }
    }
}

/// Positions of `total` packed tokens that restart with every document.
pub(crate) fn packed_positions(cu_seqlens: &[usize], offsets: &[usize]) -> Vec<usize> {
    let documents = cu_seqlens.windows(2).zip(offsets);
    documents.flat_map(|(ends, offset)| (0..ends[1] - ends[0]).map(move |i| offset + i)).collect()
}
