//! The matrix-state recurrence in five stages, generic in its decay and its write.
//!
//! Per head, with `S: [K, V]` and gates `g_t <= 0`:
//! - additive: `S_t = exp(g_t) S_{t-1} + k_t v_t^T`
//! - delta: `S_t = exp(g_t) S_{t-1} + k_t u_t^T`, `u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t)`
//! - low rank: `S_t = exp(g_t) S_{t-1} + k_t v_t^T + b_t u_t^T`, `u_t = S_{t-1}^T a_t`
//!
//! and `o_t = scale S_t^T q_t`. A chunk of `C` tokens is one set of matrix products: the `u` of a chunk
//! are affine in the state `S` that enters it, `u = U + W S`, and the state walks from chunk to chunk.
//! Axes below: `M` = sequences x value heads, `N` = chunks, `C` = tokens of a chunk.

use burn::Tensor;

use super::decay::{prefix, prefix_exclusive, suffix_exclusive};
use super::lower::{Lower, Reads};
use super::{split, unbind};
use crate::check::state_type;
use crate::op::matrix::{Decay, Output, Problem, Write};

/// Runs the recurrence over all sequences.
pub(crate) fn forward(problem: Problem) -> Output {
    let dtype = problem.q.dtype();
    let state = state_type(dtype);
    let problem = Problem {
        q: problem.q.cast(state),
        k: problem.k.cast(state),
        v: problem.v.cast(state),
        write: match problem.write {
            Write::LowRank { a, b } => Write::LowRank { a: a.cast(state), b: b.cast(state) },
            other => other,
        },
        ..problem
    };
    let output = match problem.cu_seqlens.clone() {
        None => equal_lengths(problem),
        Some(bounds) => packed(problem, &bounds),
    };
    Output { o: output.o.cast(dtype), ..output }
}

/// Packed sequences, one after the other.
fn packed(problem: Problem, bounds: &[usize]) -> Output {
    let count = bounds.len() - 1;
    let three = |x: Tensor<3>| split(x, 1, bounds);
    let four = |x: Tensor<4>| split(x, 1, bounds);
    let decays = match problem.decay {
        Decay::None => vec![Decay::None; count],
        Decay::Constant(g) => vec![Decay::Constant(g); count],
        Decay::Head(g) => three(g).into_iter().map(Decay::Head).collect(),
        Decay::Key(g) => four(g).into_iter().map(Decay::Key).collect(),
    };
    let writes = match problem.write {
        Write::Additive => vec![Write::Additive; count],
        Write::Delta { beta } => three(beta).into_iter().map(|beta| Write::Delta { beta }).collect(),
        Write::LowRank { a, b } => four(a).into_iter().zip(four(b)).map(|(a, b)| Write::LowRank { a, b }).collect(),
    };
    let states = match problem.initial_state {
        Some(states) => unbind(states, 0).into_iter().map(Some).collect(),
        None => vec![None; count],
    };
    let tokens = four(problem.q).into_iter().zip(four(problem.k)).zip(four(problem.v));
    let rest = decays.into_iter().zip(writes).zip(states);
    let (o, states) = tokens
        .zip(rest)
        .map(|(((q, k), v), ((decay, write), initial_state))| {
            let (scale, chunk) = (problem.scale, problem.chunk);
            let part = Problem { q, k, v, decay, write, initial_state, scale, chunk, cu_seqlens: None };
            let output = equal_lengths(part);
            (output.o, output.final_state)
        })
        .unzip();
    Output { o: Tensor::cat(o, 1), final_state: Tensor::cat(states, 0) }
}

/// A batch of sequences of one length.
fn equal_lengths(problem: Problem) -> Output {
    let [batch, time, _, key_dim] = problem.q.dims();
    let [_, _, heads, value_dim] = problem.v.dims();
    let c = problem.chunk.min(time).next_power_of_two();
    let chunks = Chunking { batch, time, heads, n: time.div_ceil(c), c };
    let q = chunks.split(problem.q).mul_scalar(problem.scale);
    let k = chunks.split(problem.k);
    let v = chunks.split(problem.v);
    let g = match problem.decay {
        Decay::None => None,
        Decay::Constant(g) => {
            let g: Tensor<3> = g.reshape([1, 1, heads]).expand([batch, time, heads]);
            Some(chunks.split(g.unsqueeze_dim(3)))
        }
        Decay::Head(g) => Some(chunks.split(g.unsqueeze_dim(3))),
        Decay::Key(g) => Some(chunks.split(g)),
    };
    let initial = match problem.initial_state {
        Some(state) => state.reshape([batch * heads, key_dim, value_dim]),
        None => Tensor::zeros([batch * heads, key_dim, value_dim], (&v.device(), v.dtype())),
    };

    // What the tokens write: `k v^T` right away, and `keys u^T` once the entering state is known.
    let (additive, corrected) = match problem.write {
        Write::Additive => (Some((k, v)), None),
        Write::Delta { beta } => {
            let beta = chunks.split(beta.unsqueeze_dim(3));
            (None, Some(delta(k, v, beta, g.as_ref())))
        }
        Write::LowRank { a, b } => {
            let (a, b) = (chunks.split(a), chunks.split(b));
            let corrected = low_rank(a, b, k.clone(), v.clone(), g.as_ref());
            (Some((k, v)), Some(corrected))
        }
    };
    let rows = time - (chunks.n - 1) * c;
    let states = walk(additive.as_ref(), corrected.as_ref(), g.as_ref(), initial, rows);

    // Stage 5: o = (q exp(c)) S + A v + A' u, all chunks at once.
    let mut o = scaled(q.clone(), g.clone().map(prefix)).matmul(states.entering);
    if let Some((k, v)) = additive {
        o = o + Lower::scores(&q, &k, g.as_ref(), Reads::Decayed).apply(&v);
    }
    if let (Some(corrected), Some(u)) = (corrected, states.u) {
        o = o + Lower::scores(&q, &corrected.keys, g.as_ref(), Reads::Decayed).apply(&u);
    }
    Output { o: chunks.join(o), final_state: states.last.reshape([batch, heads, key_dim, value_dim]) }
}

/// Values that depend on the state entering the chunk, `u = constant + linear S`, and their keys.
struct Corrected {
    keys: Tensor<4>,
    constant: Tensor<4>,
    linear: Tensor<4>,
}

/// Delta rule: `u_i = beta_i (v_i - exp(c_i) S^T k_i - sum_{j<i} exp(c_i - c_j) (k_i . k_j) u_j)`.
fn delta(k: Tensor<4>, v: Tensor<4>, beta: Tensor<4>, g: Option<&Tensor<4>>) -> Corrected {
    let value_dim = v.dims()[3];
    let key_dim = k.dims()[3];
    let beta_k = k.clone() * beta.clone();
    let lower = Lower::scores(&beta_k, &k, g, Reads::Below);
    let right = Tensor::cat(vec![v * beta, scaled(beta_k, g.cloned().map(prefix)).neg()], 3);
    let solved = lower.solve(right);
    Corrected {
        keys: k,
        constant: solved.clone().narrow(3, 0, value_dim),
        linear: solved.narrow(3, value_dim, key_dim),
    }
}

/// Low rank: `u_i = S_{i-1}^T a_i`, so row `i` reads with the gates up to token `i - 1`.
fn low_rank(a: Tensor<4>, b: Tensor<4>, k: Tensor<4>, v: Tensor<4>, g: Option<&Tensor<4>>) -> Corrected {
    let value_dim = v.dims()[3];
    let key_dim = k.dims()[3];
    let lower = Lower::scores(&a.clone().neg(), &b, g, Reads::Before);
    let values = Lower::scores(&a, &k, g, Reads::Before).apply(&v);
    let right = Tensor::cat(vec![values, scaled(a, g.cloned().map(prefix_exclusive))], 3);
    let solved = lower.solve(right);
    Corrected {
        keys: b,
        constant: solved.clone().narrow(3, 0, value_dim),
        linear: solved.narrow(3, value_dim, key_dim),
    }
}

/// Result of stage 4.
struct States {
    /// State entering each chunk, `[M, N, K, V]`.
    entering: Tensor<4>,
    /// The corrected values, `[M, N, C, V]`.
    u: Option<Tensor<4>>,
    /// State after the last chunk, `[M, K, V]`.
    last: Tensor<3>,
}

/// Stage 4: the state walks over the chunks, `S' = exp(c_C) S + sum_j (k_j exp(c_C - c_j)) v_j^T`. The last chunk
/// has `rows` tokens.
fn walk(
    additive: Option<&(Tensor<4>, Tensor<4>)>,
    corrected: Option<&Corrected>,
    g: Option<&Tensor<4>>,
    initial: Tensor<3>,
    rows: usize,
) -> States {
    let to_end = |keys: &Tensor<4>| scaled(keys.clone(), g.cloned().map(suffix_exclusive)).transpose();
    let added = additive.map(|(k, v)| to_end(k).matmul(v.clone()));
    let keys = corrected.map(|corrected| to_end(&corrected.keys));
    // [M, N, D, 1], to scale the rows of the state.
    let whole = g.map(|g| g.clone().sum_dim(2).exp().transpose());
    let n = match (additive, corrected) {
        (Some((k, _)), _) => k.dims()[1],
        (None, Some(corrected)) => corrected.keys.dims()[1],
        (None, None) => 0,
    };

    let chunks = |x: Tensor<4>| unbind(x, 1).into_iter().map(|x| x.squeeze_dim::<3>(1));
    let mut whole = whole.map(chunks);
    let mut added = added.map(chunks);
    let mut keys = keys.map(chunks);
    let mut constant = corrected.map(|corrected| chunks(corrected.constant.clone()));
    let mut linear = corrected.map(|corrected| chunks(corrected.linear.clone()));
    fn next<T>(parts: &mut Option<impl Iterator<Item = T>>) -> Option<T> {
        parts.as_mut().and_then(Iterator::next)
    }

    let (mut entering, mut u) = (Vec::with_capacity(n), Vec::with_capacity(n));
    let mut state = initial;
    for i in 0..n {
        entering.push(state.clone());
        let mut leaving = match next(&mut whole) {
            Some(decay) => state.clone() * decay,
            None => state.clone(),
        };
        if let Some(added) = next(&mut added) {
            leaving = leaving + added;
        }
        if let (Some(constant), Some(linear), Some(keys)) = (next(&mut constant), next(&mut linear), next(&mut keys)) {
            let values = constant + linear.matmul(state);
            // Not of the zeros behind the last token, which would hide no infinite gradient of the state.
            let rows = if i + 1 == n { rows } else { keys.dims()[2] };
            leaving = leaving + keys.narrow(2, 0, rows).matmul(values.clone().narrow(1, 0, rows));
            u.push(values);
        }
        state = leaving;
    }
    States { entering: Tensor::stack(entering, 1), u: corrected.map(|_| Tensor::stack(u, 1)), last: state }
}

/// `x exp(sum)`, where the sums of gates are at most 0.
fn scaled(x: Tensor<4>, sums: Option<Tensor<4>>) -> Tensor<4> {
    match sums {
        Some(sums) => x * sums.exp(),
        None => x,
    }
}

/// How tokens are laid out in chunks.
struct Chunking {
    batch: usize,
    time: usize,
    heads: usize,
    n: usize,
    c: usize,
}

impl Chunking {
    /// `[B, T, H, D] -> [B * HV, N, C, D]`. Head `h` serves the value heads `h G .. (h + 1) G`; the last
    /// chunk is filled with zeros, which neither decay the state nor write to it.
    fn split(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, time, heads, d] = x.dims();
        let group = self.heads / heads;
        let mut x = x.permute([0, 2, 1, 3]);
        let missing = self.n * self.c - time;
        if missing > 0 {
            let zeros = Tensor::zeros([batch, heads, missing, d], (&x.device(), x.dtype()));
            x = Tensor::cat(vec![x, zeros], 2);
        }
        if group > 1 {
            let padded = self.n * self.c;
            x = x
                .unsqueeze_dim::<5>(2)
                .expand([batch, heads, group, padded, d])
                .reshape([batch, self.heads, padded, d]);
        }
        x.reshape([batch * self.heads, self.n, self.c, d])
    }

    /// `[B * HV, N, C, V] -> [B, T, HV, V]`
    fn join(&self, x: Tensor<4>) -> Tensor<4> {
        let d = x.dims()[3];
        x.reshape([self.batch, self.heads, self.n * self.c, d]).narrow(2, 0, self.time).permute([0, 2, 1, 3])
    }
}
