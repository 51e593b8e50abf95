//! The f64 oracle: each recurrence written one token at a time, with its adjoint.
//!
//! Nothing here is fast and nothing here is clever: a forward is the loop of its equation, a backward is the same
//! loop reversed over stored states. Every other implementation is tested against it, so it has no dependencies.
//! Buffers are row-major slices; shapes are those of the kernels (`[batch, time, heads, feature]`, states
//! `[sequences, heads, key, value]`). Wrong lengths panic: this crate is for tests and conformance runs.
//!
//! | module | holds |
//! |---|---|
//! | [`matrix`], [`elementwise`], [`rg_lru`], [`selective`], [`short_conv`], [`attention`] | the recurrences and their adjoints |
//! | [`wrappers`], [`models`] | HGRN2, normalised linear attention, SSD and RWKV, in terms of them |
//! | [`cases`], [`random`] | the regimes of gates, keys and step sizes that tests draw from |
//! | [`tolerance`] | the error measure and the table of tolerances |
//! | [`device`] | tests that need a GPU, where there is none |
//!
//! ```
//! use thalweg_reference::Shape;
//! use thalweg_reference::elementwise::{Gate, scan_backward, scan_forward};
//!
//! let shape = Shape { batch: 1, time: 3, channels: 1, cu_seqlens: None };
//! let (a, b, ones) = (Gate::Linear(&[0.5; 3]), [1.0; 3], [1.0; 3]);
//! assert_eq!(scan_forward(&shape, a, &b, None).h, [1.0, 1.5, 1.75]);
//! assert_eq!(scan_backward(&shape, a, &b, None, &ones, None).b, [1.75, 1.5, 1.0]);
//! ```

pub mod attention;
pub mod cases;
pub mod device;
pub mod elementwise;
pub mod matrix;
pub mod models;
pub mod random;
pub mod rg_lru;
pub mod selective;
pub mod short_conv;
pub mod tolerance;
pub mod wrappers;

use std::ops::Range;

/// Sizes of a `[batch, time, channels]` problem; `cu_seqlens` packs sequences into one row (`batch` 1).
#[derive(Debug, Clone)]
pub struct Shape {
    /// Rows.
    pub batch: usize,
    /// Tokens in a row.
    pub time: usize,
    /// Features of a token.
    pub channels: usize,
    /// Boundaries of packed sequences, `[0, .., time]`.
    pub cu_seqlens: Option<Vec<usize>>,
}

impl Shape {
    /// The sequences, as ranges of the `batch * time` tokens.
    pub fn sequences(&self) -> Vec<Range<usize>> {
        sequences(self.batch, self.time, self.cu_seqlens.as_deref())
    }
}

/// The sequences of a `[batch, time, ...]` tensor, as ranges of its `batch * time` tokens.
///
/// # Panics
/// If `cu_seqlens` is not `[0, .., time]`, or comes with a batch other than 1.
pub fn sequences(batch: usize, time: usize, cu_seqlens: Option<&[usize]>) -> Vec<Range<usize>> {
    match cu_seqlens {
        None => (0..batch).map(|row| row * time..(row + 1) * time).collect(),
        Some(bounds) => {
            assert_eq!(batch, 1, "packed sequences come as one row");
            assert!(
                bounds.first() == Some(&0) && bounds.last() == Some(&time),
                "cu_seqlens {bounds:?} for {time} tokens"
            );
            bounds.windows(2).map(|pair| pair[0]..pair[1]).collect()
        }
    }
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(crate) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

pub(crate) fn add(into: &mut [f64], from: &[f64]) {
    into.iter_mut().zip(from).for_each(|(x, y)| *x += y);
}

/// `state`, or zeros of the length that it would have.
pub(crate) fn or_zeros(state: Option<&[f64]>, len: usize) -> Vec<f64> {
    let state = state.map_or_else(|| vec![0.0; len], <[f64]>::to_vec);
    assert_eq!(state.len(), len, "length of a state or its gradient");
    state
}
