//! Sequences cut into chunks of tokens, and where a cube finds its own. Sequences of one length take no table: nothing is
//! copied to the device for them, and a cube reads nothing before it knows what to ask for.

use crate::Client;
use cubecl::prelude::*;

use crate::buffer::Buffer;
use thalweg_kernels::Sequences;

/// The chunks of all sequences.
pub(crate) struct Chunks {
    pub count: usize,
    /// Tokens of each sequence; 0 if they differ.
    time: usize,
    /// Where they differ: for each chunk the number of its sequence, then for each sequence its first token, the token after
    /// its last, and its first chunk.
    pub table: Buffer,
}

impl Chunks {
    pub fn new(client: &Client, sequences: &Sequences, chunk: usize) -> Self {
        if let Some(time) = sequences.common_length() {
            let count = sequences.count() * time.div_ceil(chunk);
            return Self { count, time, table: Buffer::absent(client) };
        }
        let (mut table, mut bounds) = (Vec::new(), Vec::new());
        for n in 0..sequences.count() {
            let range = sequences.range(n);
            bounds.extend([range.start as u32, range.end as u32, table.len() as u32]);
            table.extend(std::iter::repeat_n(n as u32, range.len().div_ceil(chunk)));
        }
        let count = table.len();
        table.extend(bounds);
        Self { count, time: 0, table: Buffer::table(client, &table) }
    }

    pub fn cut(&self) -> CutLaunch {
        CutLaunch::new(self.count, self.time)
    }
}

/// The numbers of [`Chunks`] that are known at launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Cut {
    pub chunks: usize,
    pub time: usize,
}

/// A sequence of at least one token, and the number of its first chunk.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Span {
    pub sequence: usize,
    pub first_token: usize,
    pub end: usize,
    pub first_chunk: usize,
}

#[cube]
impl Span {
    /// A sequence by its number.
    pub fn of_sequence(sequence: usize, cut: &Cut, table: &[u32], #[comptime] chunk: usize) -> Span {
        let mut first_token = sequence * cut.time;
        let mut end = first_token + cut.time;
        let mut first_chunk = sequence * cut.time.div_ceil(chunk);
        if cut.time < 1 {
            let at = cut.chunks + sequence * 3;
            first_token = table[at] as usize;
            end = table[at + 1] as usize;
            first_chunk = table[at + 2] as usize;
        }
        Span { sequence, first_token, end, first_chunk }
    }

    /// The sequence of a chunk.
    pub fn of_chunk(index: usize, cut: &Cut, table: &[u32], #[comptime] chunk: usize) -> Span {
        let sequence = if cut.time < 1 { table[index] as usize } else { index / cut.time.div_ceil(chunk) };
        Span::of_sequence(sequence, cut, table, chunk)
    }

    /// The first token of the sequence's chunk `index`, which counts all chunks, and its tokens.
    pub fn tokens(&self, index: usize, #[comptime] chunk: usize) -> (usize, usize) {
        let first = self.first_token + (index - self.first_chunk) * chunk;
        (first, min(self.end - first, chunk.runtime()))
    }
}
