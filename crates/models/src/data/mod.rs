//! Text and synthetic tasks as batches of tokens.

mod corpus;
mod files;
mod tasks;

pub use corpus::{Corpus, TokenStream};
pub use files::{Document, read_text, repository_text};
pub use tasks::{Task, TaskOptions};

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Rows of tokens and what follows them.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `[rows * context]`, row after row.
    pub inputs: Vec<u32>,
    /// `[rows * context]`: the token that should follow each input.
    pub targets: Vec<u32>,
    /// `[rows * context]`: how much each target counts, 0 or more; `None` is 1 for all.
    pub weights: Option<Vec<f32>>,
    /// Number of rows.
    pub rows: usize,
    /// Tokens per row.
    pub context: usize,
    /// If documents meet inside a row, the boundaries of all documents over the rows laid end to end; the model then
    /// gets `[1, rows * context]`.
    pub cu_seqlens: Option<Vec<usize>>,
}

impl Batch {
    /// The inputs as `[rows, context]`, or `[1, rows * context]` with `cu_seqlens`.
    pub fn input_tensor(&self, device: &Device) -> Tensor<2, Int> {
        let shape = if self.cu_seqlens.is_some() { [1, self.inputs.len()] } else { [self.rows, self.context] };
        ids_tensor(&self.inputs, shape, device)
    }

    /// Sum of the weights of the targets.
    pub fn weight(&self) -> f64 {
        match &self.weights {
            Some(weights) => weights.iter().map(|&weight| f64::from(weight)).sum(),
            None => self.targets.len() as f64,
        }
    }
}

/// Ids as an integer tensor.
pub(crate) fn ids_tensor<const D: usize>(ids: &[u32], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    Tensor::from_data(TensorData::new(ids, shape), device)
}

/// Where batches come from. A batch depends on its index alone, so that a resumed run sees the same ones.
pub trait BatchSource: Send + Sync {
    /// Training batch number `index` of `rows` rows.
    fn train(&self, index: u64, rows: usize) -> Batch;

    /// The held-out batches of `rows` rows, at most `limit` of them, spread evenly. Where the iterator knows its length,
    /// evaluations tell how long they will take.
    fn held_out(&self, rows: usize, limit: Option<usize>) -> Box<dyn Iterator<Item = Batch> + '_>;

    /// One more than the largest id.
    fn vocab_size(&self) -> usize;

    /// Bytes of text per token of the held-out part; `None` if the tokens are not text.
    fn bytes_per_token(&self) -> Option<f64>;

    /// A number that other data most likely do not have.
    fn fingerprint(&self) -> u64;
}

/// A generator for `stream` of `seed`. Streams of the same seed are independent.
pub(crate) fn rng(seed: u64, stream: u64) -> rand::rngs::StdRng {
    use rand::SeedableRng;
    // One round of SplitMix64, so that neighbouring seeds and streams do not overlap.
    let mut mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0x94d0_49bb_1331_11eb);
    rand::rngs::StdRng::seed_from_u64(mixed ^ (mixed >> 31))
}

/// FNV-1a over bytes, continued from `hash`.
pub(crate) fn fnv1a(hash: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(hash, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The start of [`fnv1a`].
pub(crate) const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;
