//! Causal softmax attention for hybrids: grouped key/value heads, sliding window, packed sequences, and decoding from a
//! cache. Memory is linear in the sequence length, forward and backward.
//!
//! `o_i = sum_j softmax_j(scale * q_i . k_j) v_j` over `i - window < j <= i`. The forward pass goes over tiles of keys
//! with a running maximum and sum (FlashAttention-2, Dao 2023, arXiv:2307.08691) and keeps the log of each row's sum;
//! the backward pass recomputes the scores from it.
//!
//! | argument | shape |
//! |---|---|
//! | `q` | `[batch, time, heads, key_dim]` |
//! | `k` | `[batch, kv_time, kv_heads, key_dim]` |
//! | `v` | `[batch, kv_time, kv_heads, value_dim]` |
//! | `o` | `[batch, time, heads, value_dim]` |
//! | `lse` | `[batch, heads, time]`, f32 |

use crate::{element::Element, error::Error, native, sequences::Sequences};

/// Sizes and options of attention.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionProblem {
    /// Sequences of equal length; 1 for packed ones.
    pub batch: usize,
    /// Queries of a sequence, or of all packed ones together.
    pub time: usize,
    /// Keys of a sequence, at least `time`: the queries are the last of them (prefill behind a cache).
    pub kv_time: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Features of `q` and `k`.
    pub key_dim: usize,
    /// Features of `v`.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// A query sees itself and the `window - 1` tokens before it; everything before it if absent.
    pub window: Option<usize>,
    /// Boundaries `[0, .., time]` of packed sequences; `batch` is then 1 and `kv_time` is `time`.
    pub cu_seqlens: Option<Vec<usize>>,
}

impl AttentionProblem {
    /// Full causal attention of a sequence to itself, with the usual scale `key_dim^-0.5`.
    pub fn new(batch: usize, time: usize, heads: usize, head_dim: usize) -> Self {
        Self {
            batch,
            time,
            kv_time: time,
            heads,
            kv_heads: heads,
            key_dim: head_dim,
            value_dim: head_dim,
            scale: (head_dim as f32).powf(-0.5),
            window: None,
            cu_seqlens: None,
        }
    }

    #[doc(hidden)]
    pub fn check_sizes(&self) -> Result<Sequences, Error> {
        for (name, size) in [("heads", self.heads), ("key_dim", self.key_dim), ("value_dim", self.value_dim)] {
            Error::check_positive(name, size)?;
        }
        let sequences = Sequences::new(self.batch, self.time, self.cu_seqlens.as_deref())?;
        let fail = |argument, found: String, expected| Err(Error::Value { argument, found, expected });
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return fail("kv_heads", self.kv_heads.to_string(), "a divisor of `heads`");
        }
        if self.kv_time < self.time || (self.cu_seqlens.is_some() && self.kv_time != self.time) {
            return fail("kv_time", self.kv_time.to_string(), "at least `time`, and equal to it for packed sequences");
        }
        if self.window == Some(0) {
            return fail("window", "0".to_string(), "at least 1");
        }
        if !self.scale.is_finite() {
            return fail("scale", self.scale.to_string(), "a finite number");
        }
        Ok(sequences)
    }

    fn check<E>(&self, q: &[E], k: &[E], v: &[E]) -> Result<Sequences, Error> {
        let sequences = self.check_sizes()?;
        Error::check_len("q", q.len(), &[self.batch, self.time, self.heads, self.key_dim])?;
        Error::check_len("k", k.len(), &[self.batch, self.kv_time, self.kv_heads, self.key_dim])?;
        Error::check_len("v", v.len(), &[self.batch, self.kv_time, self.kv_heads, self.value_dim])?;
        Ok(sequences)
    }
}

/// What [`forward`] returns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionOutputs<E> {
    /// `[batch, time, heads, value_dim]`.
    pub o: Vec<E>,
    /// Natural log of the sum of the exponentials of a query's scores, `[batch, heads, time]`.
    pub lse: Vec<f32>,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionGradients<E> {
    /// Of `q`.
    pub dq: Vec<E>,
    /// Of `k`.
    pub dk: Vec<E>,
    /// Of `v`.
    pub dv: Vec<E>,
}

/// Attention of every sequence to itself (and to what is before it, where `kv_time > time`).
///
/// # Errors
/// [`Error`] for sizes or a window of zero, heads that are not a multiple of `kv_heads`, fewer keys than queries,
/// buffers of the wrong length and bad `cu_seqlens`.
///
/// # Example
/// ```
/// use thalweg_kernels::attention::{self, AttentionProblem};
/// let problem = AttentionProblem::new(1, 2, 1, 1);
/// // Equal keys: every query takes the mean of the values up to its own.
/// let out = attention::forward(&problem, &[1.0f32, 1.0], &[1.0, 1.0], &[2.0, 4.0]).unwrap();
/// assert_eq!(out.o, [2.0, 3.0]);
/// ```
pub fn forward<E: Element>(
    problem: &AttentionProblem,
    q: &[E],
    k: &[E],
    v: &[E],
) -> Result<AttentionOutputs<E>, Error> {
    let sequences = problem.check(q, k, v)?;
    Ok(native::attention::forward(problem, &sequences, q, k, v))
}

/// Gradients of `q`, `k` and `v`, given the outputs of [`forward`] and the cotangent `do_` of `o`. Deterministic.
///
/// # Errors
/// As [`forward`].
pub fn backward<E: Element>(
    problem: &AttentionProblem,
    q: &[E],
    k: &[E],
    v: &[E],
    outputs: &AttentionOutputs<E>,
    do_: &[E],
) -> Result<AttentionGradients<E>, Error> {
    let sequences = problem.check(q, k, v)?;
    let p = problem;
    Error::check_len("o", outputs.o.len(), &[p.batch, p.time, p.heads, p.value_dim])?;
    Error::check_len("lse", outputs.lse.len(), &[p.batch, p.heads, p.time])?;
    Error::check_len("do", do_.len(), &[p.batch, p.time, p.heads, p.value_dim])?;
    Ok(native::attention::backward(problem, &sequences, q, k, v, outputs, do_))
}

/// Sizes of one decoding step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepProblem {
    /// Sequences, one query each.
    pub batch: usize,
    /// Tokens that the cache has room for.
    pub capacity: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Features of `q` and `k`.
    pub key_dim: usize,
    /// Features of `v`.
    pub value_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// One query per sequence (`q`: `[batch, heads, key_dim]`) against its cache; returns `[batch, heads, value_dim]`.
///
/// The cache is `k: [batch, capacity, kv_heads, key_dim]`, `v: [batch, capacity, kv_heads, value_dim]`, with the new
/// token's key and value already in it. Sequence `n` uses the slots `0..lengths[n]`, in any order: for a sliding
/// window the cache is a ring of `window` slots, and `lengths[n]` is the smaller of the tokens seen and the window.
///
/// # Errors
/// [`Error`] for sizes of zero, heads that are not a multiple of `kv_heads`, buffers of the wrong length, and lengths
/// of zero or above the capacity.
pub fn step<E: Element>(problem: &StepProblem, q: &[E], k: &[E], v: &[E], lengths: &[usize]) -> Result<Vec<E>, Error> {
    let p = problem;
    let whole = AttentionProblem {
        kv_time: p.capacity,
        kv_heads: p.kv_heads,
        value_dim: p.value_dim,
        scale: p.scale,
        ..AttentionProblem::new(p.batch, 1, p.heads, p.key_dim)
    };
    whole.check(q, k, v)?;
    Error::check_len("lengths", lengths.len(), &[p.batch])?;
    if let Some(&found) = lengths.iter().find(|&&n| n == 0 || n > p.capacity) {
        let expected = "at least 1 and at most the capacity";
        return Err(Error::Value { argument: "lengths", found: found.to_string(), expected });
    }
    Ok(native::attention::step(problem, q, k, v, lengths))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, wide};
    use half::bf16;
    use thalweg_reference::attention as oracle;

    fn oracle_of(p: &AttentionProblem) -> oracle::Problem {
        oracle::Problem {
            batch: p.batch,
            time: p.kv_time,
            heads: p.heads,
            kv_heads: p.kv_heads,
            key_dim: p.key_dim,
            value_dim: p.value_dim,
            scale: p.scale as f64,
            window: p.window,
            cu_seqlens: p.cu_seqlens.clone(),
        }
    }

    /// Tokens `from..` of each row of a `[batch, time, features]` tensor.
    fn tail<T: Copy>(x: &[T], batch: usize, features: usize, from: usize) -> Vec<T> {
        x.chunks(x.len() / batch).flat_map(|row| row[from * features..].to_vec()).collect()
    }

    /// The oracle has as many queries as keys: those before the problem's own get a cotangent of zero.
    fn check<E: Element>(p: &AttentionProblem, size: f64, tolerance: f64) {
        let mut noise = Noise::new((p.time + p.heads) as u64);
        let (queries, keys, before) = (p.batch * p.kv_time, p.batch * p.kv_time * p.kv_heads, p.kv_time - p.time);
        let all_q: Vec<E> = noise.uniform(queries * p.heads * p.key_dim, -size, size);
        let k: Vec<E> = noise.uniform(keys * p.key_dim, -size, size);
        let v: Vec<E> = noise.uniform(keys * p.value_dim, -1.0, 1.0);
        let mut all_do: Vec<E> = noise.uniform(queries * p.heads * p.value_dim, -1.0, 1.0);
        let (fq, fo) = (p.heads * p.key_dim, p.heads * p.value_dim);
        all_do.chunks_mut(p.kv_time * fo).for_each(|row| row[..before * fo].fill(E::default()));
        let (q, do_) = (tail(&all_q, p.batch, fq, before), tail(&all_do, p.batch, fo, before));
        let out = forward(p, &q, &k, &v).unwrap();
        let grads = backward(p, &q, &k, &v, &out, &do_).unwrap();

        let (q, k, v, o) = (wide(&all_q), wide(&k), wide(&v), oracle_of(p));
        let want = oracle::backward(&o, &q, &k, &v, &wide(&all_do));
        assert_close("o", &out.o, &tail(&oracle::forward(&o, &q, &k, &v), p.batch, fo, before), tolerance);
        assert_close("dq", &grads.dq, &tail(&want.q, p.batch, fq, before), 10.0 * tolerance);
        assert_close("dk", &grads.dk, &want.k, 10.0 * tolerance);
        assert_close("dv", &grads.dv, &want.v, 10.0 * tolerance);
    }

    #[test]
    fn equals_the_oracle() {
        for time in [1, 5, 63, 64, 65, 200] {
            check::<f32>(&AttentionProblem::new(2, time, 2, 24), 1.0, 1e-5);
            let odd = AttentionProblem { value_dim: 10, kv_heads: 2, ..AttentionProblem::new(1, time, 6, 17) };
            check::<f32>(&odd, 2.0, 1e-5);
            check::<bf16>(&odd, 1.0, 2e-2);
            for window in [1, 3, 64, 150] {
                check::<f32>(&AttentionProblem { window: Some(window), ..odd.clone() }, 1.0, 1e-5);
            }
        }
        let packed = AttentionProblem { cu_seqlens: Some(vec![0, 1, 70, 300]), ..AttentionProblem::new(1, 300, 2, 16) };
        check::<f32>(&packed, 1.0, 1e-5);
        check::<f32>(&AttentionProblem { window: Some(40), kv_heads: 1, ..packed }, 1.0, 1e-5);
        for (time, kv_time) in [(70, 310), (150, 157), (150, 203)] {
            let behind_a_cache = AttentionProblem { kv_time, ..AttentionProblem::new(2, time, 2, 16) };
            check::<f32>(&behind_a_cache, 1.0, 1e-5);
            check::<f32>(&AttentionProblem { window: Some(33), ..behind_a_cache }, 1.0, 1e-5);
        }
        // Scores in the hundreds: the softmax is nearly one-hot.
        check::<f32>(&AttentionProblem::new(1, 130, 1, 64), 6.0, 1e-4);
    }

    #[test]
    fn decoding_equals_the_last_row() {
        for (capacity, length) in [(1, 1), (7, 5), (400, 333)] {
            let p = AttentionProblem { kv_heads: 2, value_dim: 20, ..AttentionProblem::new(1, 1, 4, 24) };
            let mut noise = Noise::new(length as u64);
            let q: Vec<f32> = noise.uniform(4 * 24, -2.0, 2.0);
            let (k, v): (Vec<f32>, Vec<f32>) =
                (noise.uniform(capacity * 2 * 24, -2.0, 2.0), noise.uniform(capacity * 2 * 20, -1.0, 1.0));
            let want =
                forward(&AttentionProblem { kv_time: length, ..p.clone() }, &q, &k[..length * 48], &v[..length * 40]);
            let step_problem =
                StepProblem { batch: 1, capacity, heads: 4, kv_heads: 2, key_dim: 24, value_dim: 20, scale: p.scale };
            let o = step(&step_problem, &q, &k, &v, &[length]).unwrap();
            assert_close("o", &o, &wide(&want.unwrap().o), 1e-5);
            assert!(matches!(
                step(&step_problem, &q, &k, &v, &[capacity + 1]),
                Err(Error::Value { argument: "lengths", .. })
            ));
        }
    }

    #[test]
    fn names_the_bad_argument() {
        let x = [0.0f32; 8];
        let problem = AttentionProblem::new(1, 2, 2, 2);
        let name = |p: AttentionProblem| match forward(&p, &x, &x, &x) {
            Err(Error::Value { argument, .. } | Error::Shape { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        assert_eq!(name(AttentionProblem { kv_heads: 3, ..problem.clone() }), "kv_heads");
        assert_eq!(name(AttentionProblem { window: Some(0), ..problem.clone() }), "window");
        assert_eq!(name(AttentionProblem { kv_time: 1, ..problem.clone() }), "kv_time");
        assert_eq!(name(AttentionProblem { scale: f32::NAN, ..problem.clone() }), "scale");
        assert_eq!(name(AttentionProblem { key_dim: 3, ..problem.clone() }), "q");
        assert_eq!(name(AttentionProblem { value_dim: 3, ..problem }), "v");
    }
}
