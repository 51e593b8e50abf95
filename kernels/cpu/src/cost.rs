//! Arithmetic and memory traffic of each operation, for rooflines.
//!
//! FLOP are those of the chunked algorithm's matrix products (a product of `[m, k]` and `[k, n]` is `2 m n k`, a lower
//! triangle half of it) or of the element-wise recurrence as it is written, an exponential, root or quotient being one.
//! Scaling by gates inside a chunk is not counted: it is a few per cent, and a kernel should not look busier for it.
//! Bytes are the compulsory ones: every input read once, every output written once, in the element size in memory.
//!
//! With `f` FLOP and `b` bytes no implementation on a machine of `F` FLOP/s and `B` bytes/s needs less than
//! `max(f / F, b / B)`.

pub mod gpu;

use crate::attention::AttentionProblem;
use crate::channels::ScanProblem;
use crate::matrix::{GateKind, MatrixProblem, WriteKind};
use crate::short_conv::{Activation, ConvProblem};
use std::ops::Add;

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// All tokens, outputs and final state.
    Forward,
    /// Gradients of all inputs. What the forward pass keeps for it is counted here, written once and read once.
    Backward,
    /// One token of each sequence on a state in memory.
    Step,
}

/// The work of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

impl Cost {
    /// FLOP per byte.
    pub fn intensity(self) -> f64 {
        self.flops as f64 / self.bytes.max(1) as f64
    }

    /// Seconds that the work takes at the least on a machine with these ceilings, in GFLOP/s and GB/s.
    pub fn floor(self, gflops: f64, gbytes: f64) -> f64 {
        (self.flops as f64 / (gflops * 1e9)).max(self.bytes as f64 / (gbytes * 1e9))
    }
}

impl Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

/// Tokens of each sequence of the batch or of the packed row.
fn lengths(p: &MatrixProblem) -> Vec<usize> {
    match &p.cu_seqlens {
        Some(bounds) => bounds.windows(2).map(|b| b[1].saturating_sub(b[0])).collect(),
        None => vec![p.time; p.batch],
    }
}

/// Bytes of a matrix-state operation's tensors; gradients are as large as what they are of.
struct Tensors {
    /// `q`, and as much again `k`.
    keys: usize,
    /// `v`, and as much again `o`.
    values: usize,
    gates: usize,
    /// What the write has besides `k` and `v`.
    writes: usize,
    /// The states of all sequences.
    states: usize,
}

impl Tensors {
    fn new(p: &MatrixProblem, gate: GateKind, write: WriteKind, element: usize) -> Self {
        let lengths = lengths(p);
        let tokens: usize = lengths.iter().sum();
        let keys = tokens * p.heads * p.key_dim * element;
        Self {
            keys,
            values: tokens * p.value_heads * p.value_dim * element,
            gates: 4 * match gate {
                GateKind::None => 0,
                GateKind::CONSTANT => p.value_heads,
                GateKind::HEAD => tokens * p.value_heads,
                GateKind::KEY => tokens * p.value_heads * p.key_dim,
            },
            writes: match write {
                WriteKind::Additive => 0,
                WriteKind::DELTA => 4 * tokens * p.value_heads,
                WriteKind::LOW_RANK => 2 * keys,
            },
            states: 4 * lengths.len() * p.value_heads * p.key_dim * p.value_dim,
        }
    }

    fn inputs(&self) -> usize {
        2 * self.keys + self.values + self.gates + self.writes
    }
}

/// A matrix-state operation on elements of `element` bytes.
pub fn matrix(p: &MatrixProblem, gate: GateKind, write: WriteKind, element: usize, pass: Pass) -> Cost {
    let lengths = lengths(p);
    let tensors = Tensors::new(p, gate, write, element);
    let (inputs, values, states) = (tensors.inputs(), tensors.values, tensors.states);
    let per_chunk = |rows: usize| chunk_flops(rows as u64, p.key_dim as u64, p.value_dim as u64, write, pass);
    let (flops, bytes) = match pass {
        Pass::Step => {
            let decay = u64::from(gate != GateKind::None);
            let reads_and_writes = if write == WriteKind::Additive { 4 } else { 6 };
            let reads_and_writes = if write == WriteKind::LOW_RANK { 8 } else { reads_and_writes };
            let state = p.key_dim * p.value_dim;
            let tokens: usize = lengths.iter().sum();
            let flops = (tokens * p.value_heads * state) as u64 * (reads_and_writes + decay);
            (flops, inputs + values + 2 * states)
        }
        Pass::Forward | Pass::Backward => {
            let chunk = p.chunk.max(1);
            let whole: u64 = lengths.iter().map(|length| (length / chunk) as u64).sum();
            let rest: u64 = lengths.iter().map(|length| per_chunk(length % chunk)).sum();
            let flops = p.value_heads as u64 * (whole * per_chunk(chunk) + rest);
            let chunks: usize = lengths.iter().map(|length| length.div_ceil(chunk)).sum();
            let kept = 4 * chunks * p.value_heads * p.key_dim * p.value_dim;
            let bytes = match pass {
                Pass::Backward => 2 * inputs + values + 2 * kept,
                _ => inputs + values + states,
            };
            (flops, bytes)
        }
    };
    Cost { flops, bytes: bytes as u64 }
}

/// The products of one chunk of `c` tokens of one head with a `[k, v]` state.
fn chunk_flops(c: u64, k: u64, v: u64, write: WriteKind, pass: Pass) -> u64 {
    if c == 0 {
        return 0;
    }
    let state = 2 * c * k * v;
    // Per feature: a triangle with its diagonal, and one without.
    let (lower, strict) = (c * (c + 1), c * (c - 1));
    // The values that a write solves for; the backward pass computes them again.
    let solve = match write {
        WriteKind::Additive => 0,
        WriteKind::DELTA => state + strict * (k + v),
        WriteKind::LOW_RANK => state + strict * (2 * k + 2 * v),
    };
    let writes = if write == WriteKind::LOW_RANK { 2 } else { 1 };
    if pass == Pass::Forward {
        // q meets the state; each write meets q and goes into the state.
        return solve + state + writes * (lower * (k + v) + state);
    }
    // Of each write: the scores again, gradients of value and key through the state and through the scores.
    let write_back = writes * (lower * k + 2 * state + 2 * lower * v + 2 * lower * k);
    // Gradients of q and of the state through what q read.
    let read_back = 2 * state;
    let solve_back = match write {
        WriteKind::Additive => 0,
        WriteKind::DELTA => 2 * state + strict * (2 * k + 2 * v),
        WriteKind::LOW_RANK => 2 * state + strict * (4 * k + 4 * v),
    };
    solve + write_back + read_back + solve_back
}

/// Tokens, and bytes of an f32 state, of a `[batch, time, channels]` problem; one token per row for a step.
fn tokens(p: &ScanProblem, pass: Pass) -> (usize, usize) {
    let sequences = p.cu_seqlens.as_ref().map_or(p.batch, |bounds| bounds.len().saturating_sub(1));
    (if pass == Pass::Step { p.batch } else { p.batch * p.time }, 4 * sequences * p.channels)
}

/// FLOP and tensor bytes per token and channel, and whole states read or written.
fn elementwise(p: &ScanProblem, pass: Pass, flops: usize, bytes: usize, states: usize) -> Cost {
    let (tokens, state) = tokens(p, pass);
    let elements = tokens * p.channels;
    Cost { flops: (elements * flops) as u64, bytes: (elements * bytes + states * state) as u64 }
}

/// The element-wise scan; `log` says that the gate is given as its logarithm.
pub fn scan(p: &ScanProblem, log: bool, element: usize, pass: Pass) -> Cost {
    let exp = usize::from(log);
    match pass {
        Pass::Forward => elementwise(p, pass, 2 + exp, 3 * element, 1),
        Pass::Backward => elementwise(p, pass, 3 + 2 * exp, 5 * element, 0),
        Pass::Step => elementwise(p, pass, 2 + exp, 3 * element, 2),
    }
}

/// The complex scan; `fixed` says that lambda is one number per channel.
pub fn complex_scan(p: &ScanProblem, fixed: bool, element: usize, pass: Pass) -> Cost {
    // exp, sine and cosine and two products make a lambda.
    let (lambda, planes) = if fixed { (0, 0) } else { (5, 2) };
    match pass {
        Pass::Forward => elementwise(p, pass, 8 + lambda, (4 + planes) * element, 2),
        // b and o and do in, db out; lambda in and its gradient out.
        Pass::Backward => elementwise(p, pass, 16 + lambda, (6 + 2 * planes) * element, 0),
        Pass::Step => elementwise(p, pass, 8 + lambda, (4 + planes) * element, 4),
    }
}

/// RG-LRU from its gates' logits.
pub fn rg_lru(p: &ScanProblem, element: usize, pass: Pass) -> Cost {
    // Two sigmoids of 3, log a, exp, 1 - a^2 and its root, i x times the root, a h plus that.
    const FORWARD: usize = 14;
    match pass {
        Pass::Forward => elementwise(p, pass, FORWARD, 4 * element, 1),
        Pass::Backward => elementwise(p, pass, 2 * FORWARD + 10, 8 * element, 0),
        Pass::Step => elementwise(p, pass, FORWARD, 4 * element, 2),
    }
}

/// The short convolution with its activation.
pub fn short_conv(p: &ConvProblem, element: usize, pass: Pass) -> Cost {
    let silu = if p.activation == Activation::Silu { 4 } else { 0 };
    let (taps, states) = (2 * p.width, p.width - 1);
    match pass {
        Pass::Forward => elementwise(&p.shape, pass, taps + silu, 2 * element, states),
        Pass::Backward => elementwise(&p.shape, pass, 3 * taps + 2 * silu, 3 * element, 0),
        Pass::Step => elementwise(&p.shape, pass, taps + silu, 2 * element, 2 * states),
    }
}

/// Softmax attention. A step is a problem whose `time` is 1 and whose `kv_time` counts the tokens seen, its own included.
pub fn attention(p: &AttentionProblem, element: usize, pass: Pass) -> Cost {
    let lengths: Vec<(usize, usize)> = match &p.cu_seqlens {
        Some(bounds) => bounds.windows(2).map(|b| b[1].saturating_sub(b[0])).map(|n| (n, n)).collect(),
        None => vec![(p.time, p.kv_time); p.batch],
    };
    // Query i of the last `time` sees what came before it, but no more than the window.
    let seen = |&(time, kv_time): &(usize, usize)| -> u64 {
        let window = p.window.unwrap_or(kv_time);
        (kv_time - time.min(kv_time)..kv_time).map(|i| (i + 1).min(window) as u64).sum()
    };
    let pairs = p.heads as u64 * lengths.iter().map(seen).sum::<u64>();
    let (k, v) = (p.key_dim as u64, p.value_dim as u64);
    let queries = p.batch * p.time * p.heads;
    let keys = p.batch * p.kv_time.min(p.window.map_or(usize::MAX, |window| p.time + window)) * p.kv_heads;
    let [q, k_v, o] = [queries * p.key_dim, keys * (p.key_dim + p.value_dim), queries * p.value_dim];
    let log_sums = 4 * queries;
    match pass {
        Pass::Step => Cost { flops: 2 * pairs * (k + v), bytes: (element * (q + k_v + o)) as u64 },
        Pass::Forward => Cost { flops: 2 * pairs * (k + v), bytes: (element * (q + k_v + o) + log_sums) as u64 },
        // The scores again; dP, dV; dQ, dK.
        Pass::Backward => {
            Cost { flops: 2 * pairs * (3 * k + 2 * v), bytes: (element * (2 * q + 2 * k_v + 2 * o) + log_sums) as u64 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use GateKind as G;
    use WriteKind as W;

    fn forward(p: &MatrixProblem, gate: GateKind, write: WriteKind) -> Cost {
        matrix(p, gate, write, 4, Pass::Forward)
    }

    #[test]
    fn a_chunk_of_one_is_the_recurrence() {
        let p = MatrixProblem { chunk: 1, ..MatrixProblem::new(1, 10, 1, 8, 4) };
        // q^T S and k v^T, and the product q . k times v that a chunk of one keeps apart.
        assert_eq!(forward(&p, G::None, W::Additive).flops, 10 * (4 * 8 * 4 + 2 * (8 + 4)));
    }

    #[test]
    fn a_longer_chunk_does_more_work_inside_and_as_much_on_the_state() {
        let flops = |chunk| {
            forward(&MatrixProblem { chunk, ..MatrixProblem::new(1, 256, 2, 64, 64) }, G::KEY, W::Additive).flops
        };
        assert_eq!(flops(64) - flops(16), 256 * 2 * (64 - 16) * (64 + 64));
    }

    #[test]
    fn twice_the_time_costs_twice_as_much() {
        for write in [W::Additive, W::DELTA, W::LOW_RANK] {
            for pass in [Pass::Forward, Pass::Backward] {
                let flops = |time| matrix(&MatrixProblem::new(2, time, 3, 16, 32), G::KEY, write, 4, pass).flops;
                assert_eq!(2 * flops(128), flops(256));
            }
        }
    }

    #[test]
    fn packing_costs_as_much_as_the_sequences_apart() {
        let packed = MatrixProblem { cu_seqlens: Some(vec![0, 70, 100]), ..MatrixProblem::new(1, 100, 2, 8, 8) };
        let apart = |time| forward(&MatrixProblem::new(1, time, 2, 8, 8), G::HEAD, W::DELTA);
        assert_eq!(forward(&packed, G::HEAD, W::DELTA), apart(70) + apart(30));
    }

    #[test]
    fn delta_costs_more_than_additive_and_low_rank_more_than_delta() {
        let p = MatrixProblem::new(1, 256, 4, 128, 128);
        for pass in [Pass::Forward, Pass::Backward, Pass::Step] {
            let p = if pass == Pass::Step { &MatrixProblem::new(1, 1, 4, 128, 128) } else { &p };
            let [additive, delta, low_rank] =
                [W::Additive, W::DELTA, W::LOW_RANK].map(|write| matrix(p, G::KEY, write, 4, pass).flops);
            assert!(additive < delta && delta < low_rank, "{pass:?}: {additive} {delta} {low_rank}");
        }
    }

    #[test]
    fn a_step_is_bound_by_the_bytes_of_the_state() {
        let step = matrix(&MatrixProblem::new(8, 1, 4, 128, 128), G::HEAD, W::DELTA, 4, Pass::Step);
        let state = 8 * 4 * 128 * 128 * 4;
        assert!(step.bytes > 2 * state && step.bytes < 2 * state + state / 10);
        assert!(step.intensity() < 1.0);
    }

    #[test]
    fn a_gate_per_head_reads_no_more_than_one_number_per_token() {
        let p = MatrixProblem::new(1, 100, 4, 64, 64);
        let bytes = |gate| forward(&p, gate, W::Additive).bytes;
        assert_eq!(bytes(G::HEAD) - bytes(G::None), 100 * 4 * 4);
        assert_eq!(bytes(G::KEY) - bytes(G::None), 100 * 4 * 64 * 4);
    }

    #[test]
    fn half_the_element_size_is_half_the_bytes_of_a_scan_but_for_its_state() {
        let p = ScanProblem::new(4, 4096, 1024);
        let bytes = |element| scan(&p, true, element, Pass::Forward).bytes - 4 * 4 * 1024;
        assert_eq!(bytes(4), 2 * bytes(2));
        assert_eq!(bytes(4), 12 * 4 * 4096 * 1024);
    }

    #[test]
    fn element_wise_operations_are_bound_by_memory() {
        let p = ScanProblem::new(1, 2048, 2560);
        let conv = ConvProblem { shape: p.clone(), width: 4, activation: Activation::Silu };
        for pass in [Pass::Forward, Pass::Backward] {
            let costs = [scan(&p, true, 4, pass), complex_scan(&p, false, 4, pass), rg_lru(&p, 4, pass)];
            for cost in costs.into_iter().chain([short_conv(&conv, 4, pass)]) {
                assert!(cost.intensity() < 3.0 && cost.floor(300.0, 30.0) == cost.bytes as f64 / 30e9);
            }
        }
    }

    #[test]
    fn a_causal_query_sees_itself_and_what_came_before() {
        let p = AttentionProblem::new(1, 4, 1, 8);
        assert_eq!(attention(&p, 4, Pass::Forward).flops, (1 + 2 + 3 + 4) * 2 * (8 + 8));
        let windowed = AttentionProblem { window: Some(2), ..p.clone() };
        assert_eq!(attention(&windowed, 4, Pass::Forward).flops, (1 + 2 + 2 + 2) * 2 * (8 + 8));
        let step = AttentionProblem { kv_time: 4, ..AttentionProblem::new(1, 1, 1, 8) };
        assert_eq!(attention(&step, 4, Pass::Step).flops, 4 * 2 * (8 + 8));
    }

    #[test]
    fn attention_grows_with_the_square_of_the_time() {
        let flops = |time| attention(&AttentionProblem::new(1, time, 4, 128), 4, Pass::Forward).flops as f64;
        assert!((flops(8192) / flops(2048) - 16.0).abs() < 0.01);
    }
}
