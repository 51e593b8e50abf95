//! Cross entropy of a head over many tokens, in memory for a few.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor};

/// Tokens whose logits are in memory at a time.
const CHUNK: usize = 1024;

/// What [`cross_entropy`] gives.
#[derive(Debug, Default)]
pub struct Loss {
    /// A scalar whose *gradient* is that of the mean loss, 0 if no target counts; its value means nothing. Absent without
    /// autodiff.
    pub surrogate: Option<Tensor<1>>,
    /// Sum of the weighted losses, in nats.
    pub nats: f64,
    /// Sum of the weights.
    pub weight: f64,
    /// Sum of the weights of the targets that have the largest logit.
    pub correct: f64,
}

impl Loss {
    /// Nats per target that counts; 0 if none does.
    pub fn mean(&self) -> f64 {
        share(self.nats, self.weight)
    }

    /// The part of the targets that have the largest logit; 0 if none counts.
    pub fn accuracy(&self) -> f64 {
        share(self.correct, self.weight)
    }

    /// Adds the sums of another part of the targets.
    pub(crate) fn add(&mut self, part: &Self) {
        self.nats += part.nats;
        self.weight += part.weight;
        self.correct += part.correct;
    }
}

/// `part / whole`, and 0 of a whole that is empty. A small number under the division is no guard: the smallest of f64 is 0
/// in f32.
pub(crate) fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

/// Weighted mean cross entropy of `softmax(cap(hidden @ head^T))` with the targets.
///
/// | argument | shape |
/// |---|---|
/// | `hidden` | `[N, D]` |
/// | `head` | `[V, D]` |
/// | `targets` | `[N]`, in `0..V` |
/// | `weights` | `[N]`, f32, 0 or more; `None` is all ones |
/// | `soft_cap` | logits become `cap * tanh(logits / cap)` |
///
/// The gradients with respect to `hidden` and `head` are computed here, chunk by chunk, outside of the graph, and handed
/// to it as `sum(hidden * d_hidden) + sum(head * d_head)`. So the graph keeps `[N, D]` and `[V, D]`, never `[N, V]`.
/// Logits and sums are f32 whatever the types of `hidden` and `head`.
pub fn cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Option<Tensor<1>>,
    soft_cap: Option<f64>,
) -> Loss {
    let [tokens, _] = hidden.dims();
    let tracked = hidden.is_autodiff() || head.is_autodiff();
    let (inner_hidden, inner_head) = (hidden.clone().inner().cast(DType::F32), head.clone().inner().cast(DType::F32));
    let (targets, weights) = (targets.inner(), weights.map(Tensor::inner));
    let total: f64 = match &weights {
        Some(weights) => weights.clone().sum().into_scalar::<f32>().into(),
        None => tokens as f64,
    };
    let mut loss = Loss { surrogate: None, nats: 0.0, weight: total, correct: 0.0 };
    let (mut d_hidden, mut sums) = (Vec::new(), Vec::new());
    let mut d_head: Option<Tensor<2>> = None;
    for start in (0..tokens).step_by(CHUNK) {
        let length = CHUNK.min(tokens - start);
        let h = inner_hidden.clone().narrow(0, start, length).cast(inner_head.dtype());
        let target = targets.clone().narrow(0, start, length).unsqueeze_dim::<2>(1);
        let weight = match &weights {
            Some(weights) => weights.clone().narrow(0, start, length).unsqueeze_dim::<2>(1),
            None => Tensor::ones([length, 1], (&h.device(), DType::F32)),
        };
        let mut logits = h.clone().matmul(inner_head.clone().transpose()).cast(DType::F32);
        if let Some(cap) = soft_cap {
            logits = (logits / cap).tanh() * cap;
        }
        let right = logits.clone().argmax(1).equal(target.clone()).float().cast(DType::F32) * weight.clone();
        let log_probs = log_softmax(logits.clone(), 1);
        let picked = log_probs.clone().gather(1, target.clone()) * weight.clone();
        sums.extend([right.sum(), picked.sum()]);
        if !tracked {
            continue;
        }
        // d logits = weight * (softmax - one hot) / total.
        let scale = weight * share(1.0, total);
        let mut d_logits =
            (log_probs.exp() * scale.clone()).scatter(1, target, -scale, burn::tensor::IndexingUpdateOp::Add);
        if let Some(cap) = soft_cap {
            d_logits = d_logits * (1.0 - (logits / cap).square());
        }
        let d_logits = d_logits.cast(inner_head.dtype());
        d_hidden.push(d_logits.clone().matmul(inner_head.clone()).cast(inner_hidden.dtype()));
        let part = d_logits.transpose().matmul(h);
        d_head = Some(match d_head {
            Some(sum) => sum + part,
            None => part,
        });
    }
    if !sums.is_empty() {
        // Read once, when all is queued: a GPU waits at each reading.
        let sums: Vec<f64> = Tensor::cat(sums, 0).into_data().iter().collect();
        loss.correct = sums.iter().step_by(2).sum();
        loss.nats = -sums.iter().skip(1).step_by(2).sum::<f64>();
    }
    if let Some(d_head) = d_head {
        let (d_hidden, d_head) = (Tensor::cat(d_hidden, 0).cast(hidden.dtype()), d_head.cast(head.dtype()));
        let (hidden, head) = ((hidden * d_hidden).sum(), (head * d_head).sum());
        loss.surrogate = Some(hidden.cast(DType::F32) + head.cast(DType::F32));
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    #[test]
    fn gradients_equal_those_of_the_graph() {
        let device = Device::flex().autodiff();
        let (n, d, v) = (CHUNK + 5, 6, 9);
        let random =
            |rows: usize| Tensor::<2>::random([rows, d], Distribution::Normal(0.0, 1.0), &device).require_grad();
        let (hidden, head) = (random(n), random(v));
        let ids: Vec<i64> = (0..n as i64).map(|i| i * i % 9).collect();
        let targets = Tensor::<1, Int>::from_data(ids.as_slice(), &device);
        let weights: Vec<f32> = (0..n).map(|i| (i % 3) as f32).collect();
        let weights = Tensor::<1>::from_data(weights.as_slice(), &device);
        for cap in [None, Some(2.0)] {
            let loss = cross_entropy(hidden.clone(), head.clone(), targets.clone(), Some(weights.clone()), cap);
            let grads = loss.surrogate.as_ref().unwrap().backward();

            let mut logits = hidden.clone().matmul(head.clone().transpose());
            if let Some(cap) = cap {
                logits = (logits / cap).tanh() * cap;
            }
            let picked = log_softmax(logits, 1).gather(1, targets.clone().unsqueeze_dim(1)).squeeze_dim::<1>(1);
            let direct = -(picked * weights.clone()).sum() / weights.clone().sum();
            let expected = direct.backward();
            assert!((loss.mean() - f64::from(direct.into_scalar::<f32>())).abs() < 1e-5);
            for leaf in [&hidden, &head] {
                let actual = leaf.grad(&grads).unwrap().into_data();
                let tolerance = Tolerance::<f32>::rel_abs(1e-4, 1e-7);
                actual.assert_approx_eq::<f32>(&leaf.grad(&expected).unwrap().into_data(), tolerance);
            }
        }
    }
    #[test]
    fn nothing_that_counts_is_a_gradient_of_zero() {
        let device = Device::flex().autodiff();
        let [hidden, head] = [5, 3].map(|rows| Tensor::<2>::ones([rows, 4], &device).require_grad());
        let loss = cross_entropy(
            hidden.clone(),
            head.clone(),
            Tensor::zeros([5], &device),
            Some(Tensor::zeros([5], &device)),
            Some(2.0),
        );
        assert_eq!((loss.mean(), loss.accuracy()), (0.0, 0.0));
        let grads = loss.surrogate.unwrap().backward();
        for leaf in [hidden, head] {
            assert!(leaf.grad(&grads).unwrap().into_data().iter::<f32>().all(|x| x == 0.0));
        }
    }

    #[test]
    fn sums_of_16_bit_tensors_are_those_of_f32() {
        let device = Device::flex().autodiff();
        // Logits below 2, so that their rounding is less than a percent of a gradient.
        let spread = |rows: usize, step: usize| {
            let values: Vec<f32> = (0..rows * 8).map(|i| (i * step % 101) as f32 / 101.0 - 0.5).collect();
            Tensor::<2>::from_data(TensorData::new(values, [rows, 8]), &device).cast(DType::BF16)
        };
        let (hidden, head) = (spread(900, 37), spread(7, 29));
        let targets = Tensor::<1, Int>::zeros([900], &device);
        let weights = Tensor::<1>::full([900], 0.5, &device);
        let run = |hidden: DType, head_type: DType, values: (&Tensor<2>, &Tensor<2>)| {
            let leaves = (values.0.clone().cast(hidden), values.1.clone().cast(head_type));
            let (hidden, head) = (leaves.0.detach().require_grad(), leaves.1.detach().require_grad());
            let loss = cross_entropy(hidden.clone(), head.clone(), targets.clone(), Some(weights.clone()), None);
            let grads = loss.surrogate.as_ref().unwrap().backward();
            let gradient = hidden.grad(&grads).unwrap();
            assert_eq!((gradient.dtype(), head.grad(&grads).unwrap().dtype()), (hidden.dtype(), head.dtype()));
            (loss.mean(), gradient.cast(DType::F32).into_data())
        };
        let (mean, gradient) = run(DType::F32, DType::F32, (&hidden, &head));
        for (hidden_type, head_type) in [(DType::BF16, DType::BF16), (DType::BF16, DType::F32)] {
            let (found, found_gradient) = run(hidden_type, head_type, (&hidden, &head));
            assert!((found / mean - 1.0).abs() < 2e-3, "{found} {mean}");
            found_gradient.assert_approx_eq::<f32>(&gradient, Tolerance::rel_abs(2e-2, 1e-5));
        }
    }
}
