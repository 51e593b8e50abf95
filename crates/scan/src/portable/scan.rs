//! Element-wise linear recurrences `h_t = a_t h_{t-1} + b_t`, real or complex, over `[B, T, D]`.
//!
//! Blocks of 32 tokens are scanned by doubling (Hillis & Steele 1986), then the same scan runs over
//! the blocks' totals. Only products and sums of the coefficients appear, never their logarithms or
//! quotients, so a coefficient of exactly 0 is an ordinary input. Where products grow, the tokens are walked one by one.

use burn::Tensor;

use super::split;

/// Tokens per block.
const BLOCK: usize = 32;

/// A product of a block's coefficients above 1 that is larger than this is not applied to a state: it overflows where the
/// state is 0 or small, or large terms cancel.
const MAX_GROWTH: f64 = 64.0;

/// What a scan needs of its numbers, laid out `[B, T, D]`.
pub(crate) trait Numbers: Clone {
    fn dims(&self) -> [usize; 3];
    /// `self * x + y`
    fn mul_add(self, x: Self, y: Self) -> Self;
    fn mul(self, x: Self) -> Self;
    /// Applies an operation that only moves elements.
    fn map(self, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Self;
    fn cat(parts: Vec<Self>) -> Self;
    /// The parts along an axis between consecutive bounds.
    fn split_at(self, dim: usize, bounds: &[usize]) -> Vec<Self>;
    fn zeros(&self, shape: [usize; 3]) -> Self;
    /// Whether the coefficients of a block multiply a state by more than [`MAX_GROWTH`], or are not numbers.
    fn grow(&self) -> bool;

    fn tokens(&self, start: usize, length: usize) -> Self {
        self.clone().map(|x| x.narrow(1, start, length))
    }
}

impl Numbers for Tensor<3> {
    fn dims(&self) -> [usize; 3] {
        Tensor::dims(self)
    }

    fn mul_add(self, x: Self, y: Self) -> Self {
        self * x + y
    }

    fn mul(self, x: Self) -> Self {
        self * x
    }

    fn map(self, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Self {
        f(self)
    }

    fn cat(parts: Vec<Self>) -> Self {
        Tensor::cat(parts, 1)
    }

    fn split_at(self, dim: usize, bounds: &[usize]) -> Vec<Self> {
        split(self, dim, bounds)
    }

    fn zeros(&self, shape: [usize; 3]) -> Self {
        Tensor::zeros(shape, (&self.device(), self.dtype()))
    }

    /// Reads one number back: what runs on the host depends on it.
    fn grow(&self) -> bool {
        let growth = self.clone().detach().abs().clamp_min(1.0).log().sum_dim(1);
        !growth.lower_equal_elem(MAX_GROWTH.ln()).all().into_scalar::<bool>()
    }
}

/// Real and imaginary parts.
#[derive(Clone)]
pub(crate) struct Complex {
    pub re: Tensor<3>,
    pub im: Tensor<3>,
}

impl Numbers for Complex {
    fn dims(&self) -> [usize; 3] {
        Tensor::dims(&self.re)
    }

    fn mul_add(self, x: Self, y: Self) -> Self {
        let product = self.mul(x);
        Self { re: product.re + y.re, im: product.im + y.im }
    }

    fn mul(self, x: Self) -> Self {
        Self {
            re: self.re.clone() * x.re.clone() - self.im.clone() * x.im.clone(),
            im: self.re * x.im + self.im * x.re,
        }
    }

    fn map(self, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Self {
        Self { re: f(self.re), im: f(self.im) }
    }

    fn cat(parts: Vec<Self>) -> Self {
        let (re, im) = parts.into_iter().map(|p| (p.re, p.im)).unzip();
        Self { re: Tensor::cat(re, 1), im: Tensor::cat(im, 1) }
    }

    fn split_at(self, dim: usize, bounds: &[usize]) -> Vec<Self> {
        let parts = split(self.re, dim, bounds).into_iter().zip(split(self.im, dim, bounds));
        parts.map(|(re, im)| Self { re, im }).collect()
    }

    fn zeros(&self, shape: [usize; 3]) -> Self {
        Self { re: Numbers::zeros(&self.re, shape), im: Numbers::zeros(&self.im, shape) }
    }

    /// They are `exp(log_a + i theta)` with `log_a <= 0`.
    fn grow(&self) -> bool {
        false
    }
}

/// Runs the recurrence over a batch, or over packed sequences one after the other.
/// `a, b: [B, T, D]`, `initial: [N, 1, D]` `->` all states `[B, T, D]` and the last ones `[N, 1, D]`.
pub(crate) fn forward<N: Numbers>(a: N, b: N, initial: Option<N>, cu_seqlens: Option<&[usize]>) -> (N, N) {
    let [batch, time, d] = b.dims();
    let Some(bounds) = cu_seqlens else {
        let initial = initial.unwrap_or_else(|| b.zeros([batch, 1, d]));
        let h = scan(a, b, initial);
        let last = h.tokens(time - 1, 1);
        return (h, last);
    };
    let each: Vec<usize> = (0..bounds.len()).collect();
    let initial: Vec<Option<N>> = match initial {
        Some(initial) => initial.split_at(0, &each).into_iter().map(Some).collect(),
        None => vec![None; bounds.len() - 1],
    };
    let parts = a.split_at(1, bounds).into_iter().zip(b.split_at(1, bounds)).zip(initial);
    let (all, last): (Vec<_>, Vec<_>) = parts.map(|((a, b), initial)| forward(a, b, initial, None)).unzip();
    let count = last.len();
    (N::cat(all), N::cat(last).map(|x| x.reshape([count, 1, d])))
}

/// `[B, T, D]`, `initial: [B, 1, D] -> [B, T, D]`
fn scan<N: Numbers>(a: N, b: N, initial: N) -> N {
    let [batch, time, d] = b.dims();
    let n = time.div_ceil(BLOCK);
    let split = |x: &N| {
        let missing = n * BLOCK - time;
        let x = if missing > 0 && n > 1 {
            let zeros = x.zeros([batch, missing, d]);
            N::cat(vec![x.clone(), zeros])
        } else {
            x.clone()
        };
        x.map(|x| x.reshape([batch * n, time.min(BLOCK), d]))
    };
    let factors = split(&a);
    if factors.grow() {
        return walk(a, b, initial);
    }
    let (a, b) = within_block(factors, split(&b));
    if n == 1 {
        return a.mul_add(initial, b);
    }
    let total = |x: &N| x.tokens(BLOCK - 1, 1).map(|x| x.reshape([batch, n, d]));
    let ends = scan(total(&a), total(&b), initial.clone());
    let entering = N::cat(vec![initial, ends.tokens(0, n - 1)]);
    a.mul_add(entering.map(|x| x.reshape([batch * n, 1, d])), b)
        .map(|x| x.reshape([batch, n * BLOCK, d]).narrow(1, 0, time))
}

/// The same, token by token.
fn walk<N: Numbers>(a: N, b: N, initial: N) -> N {
    let each: Vec<usize> = (0..=b.dims()[1]).collect();
    let mut state = initial;
    let maps = a.split_at(1, &each).into_iter().zip(b.split_at(1, &each));
    N::cat(
        maps.map(|(a, b)| {
            state = a.mul_add(state.clone(), b);
            state.clone()
        })
        .collect(),
    )
}

/// Composes each token's map `h -> a h + b` with all earlier ones of its block.
fn within_block<N: Numbers>(mut a: N, mut b: N) -> (N, N) {
    let [_, time, _] = b.dims();
    let mut reach = 1;
    while reach < time {
        let rest = time - reach;
        let later = a.tokens(reach, rest);
        let next = later.clone().mul_add(b.tokens(0, rest), b.tokens(reach, rest));
        b = N::cat(vec![b.tokens(0, reach), next]);
        let next = later.mul(a.tokens(0, rest));
        a = N::cat(vec![a.tokens(0, reach), next]);
        reach *= 2;
    }
    (a, b)
}
