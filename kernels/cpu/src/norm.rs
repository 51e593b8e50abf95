//! Norms over the last axis, with the weight and the output gate that follow them in a layer, in one pass over memory.
//!
//! `y = x r (offset + w) f(z)` with `r = (sum(x^2) / divisor + eps)^-1/2`: a divisor of the number of features makes it the
//! root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), 1 the l2 norm.

use std::mem::MaybeUninit;

use crate::glu::{self, Activation};
use crate::native::plan::each;
use crate::native::rows::{Output, zeroed};
use crate::native::simd::{dot, round, vectorize, widen};
use crate::{Element, Error};

/// Sizes and constants of a norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormProblem {
    /// Features of the last axis.
    pub features: usize,
    /// What the sum of squares is divided by.
    pub divisor: f32,
    /// Added to the quotient.
    pub eps: f32,
    /// Added to the weight: 1 for weights that start at 0.
    pub offset: f32,
}

impl NormProblem {
    /// The root-mean-square norm.
    pub fn rms(features: usize, eps: f32) -> Self {
        Self { features, divisor: features as f32, eps, offset: 0.0 }
    }

    /// The l2 norm.
    pub fn l2(features: usize, eps: f32) -> Self {
        Self { features, divisor: 1.0, eps, offset: 0.0 }
    }

    /// Sets what is added to the weight.
    #[must_use]
    pub fn with_offset(self, offset: f32) -> Self {
        Self { offset, ..self }
    }

    fn check<E>(&self, inputs: &NormInputs<E>) -> Result<(), Error> {
        Error::check_positive("features", self.features)?;
        let NormInputs { x, weight, gate } = inputs;
        if !x.len().is_multiple_of(self.features) {
            let expected = vec![x.len() / self.features, self.features];
            return Err(Error::Shape { argument: "x", found: vec![x.len()], expected });
        }
        if let Some(weight) = weight {
            Error::check_len("weight", weight.len(), &[self.features])?;
        }
        if let Some((_, z)) = gate {
            Error::check_len("z", z.len(), &[x.len()])?;
        }
        Ok(())
    }
}

/// Tensors of a norm.
#[derive(Debug)]
pub struct NormInputs<'a, E> {
    /// `[.., features]`.
    pub x: &'a [E],
    /// `[features]`; no scale if absent.
    pub weight: Option<&'a [E]>,
    /// The output gate: its function `f`, and `z` of the shape of `x`.
    pub gate: Option<(Activation, &'a [E])>,
}

/// Gradients of [`forward`].
#[derive(Debug, Clone, PartialEq)]
pub struct NormGradients<E> {
    /// Of `x`.
    pub dx: Vec<E>,
    /// Of the weight, if there is one.
    pub d_weight: Option<Vec<E>>,
    /// Of `z`, if there is a gate.
    pub dz: Option<Vec<E>>,
}

/// Elements of a task, and up to a row more.
const TASK: usize = 1 << 13;

/// What a task of the backward pass writes.
type Parts<'a, E> = (&'a mut [MaybeUninit<E>], Option<&'a mut [MaybeUninit<E>]>);

/// One row in f32.
struct Row {
    x: Vec<f32>,
    z: Vec<f32>,
    dy: Vec<f32>,
    weight: Vec<f32>,
}

impl Row {
    fn new<E: Element>(problem: &NormProblem, inputs: &NormInputs<E>) -> Self {
        let n = problem.features;
        let mut weight = vec![1.0; n];
        if let Some(w) = inputs.weight {
            widen(w, &mut weight);
            weight.iter_mut().for_each(|w| *w += problem.offset);
        }
        Self { x: vec![0.0; n], z: vec![1.0; n], dy: vec![0.0; n], weight }
    }

    /// Loads `x` and returns `r`.
    fn load<E: Element>(&mut self, problem: &NormProblem, x: &[E]) -> f32 {
        widen(x, &mut self.x);
        (self.dot(|row| &row.x) / problem.divisor + problem.eps).sqrt().recip()
    }

    /// The product of `x` and another part.
    fn dot(&self, other: impl Fn(&Self) -> &[f32]) -> f32 {
        vectorize(
            #[inline(always)]
            || dot(&self.x, other(self)),
        )
    }
}

/// The norm of each row.
///
/// # Errors
/// If a slice is not as long as the others say.
pub fn forward<E: Element>(problem: &NormProblem, inputs: &NormInputs<E>) -> Result<Vec<E>, Error> {
    problem.check(inputs)?;
    let n = problem.features;
    let run = TASK.div_ceil(n) * n;
    let mut y = Output::new(inputs.x.len(), Vec::new());
    each(y.parts(run).enumerate().collect(), inputs.x.len(), |(task, y): (usize, &mut [MaybeUninit<E>])| {
        let y = zeroed(y);
        let mut row = Row::new(problem, inputs);
        for (i, y) in y.chunks_exact_mut(n).enumerate() {
            let at = task * run + i * n..task * run + (i + 1) * n;
            let r = row.load(problem, &inputs.x[at.clone()]);
            let Row { x, z, weight, .. } = &mut row;
            if let Some((f, values)) = inputs.gate {
                widen(&values[at], z);
                glu::apply(f, z);
            }
            vectorize(
                #[inline(always)]
                || x.iter_mut().zip(&*weight).zip(&*z).for_each(|((x, w), f)| *x *= r * w * f),
            );
            round(x, y);
        }
    });
    // Safety: the tasks have written all of it.
    Ok(unsafe { y.finish() })
}

/// Gradients of [`forward`] for the cotangent `dy` of its result.
///
/// # Errors
/// If a slice is not as long as the others say.
pub fn backward<E: Element>(
    problem: &NormProblem,
    inputs: &NormInputs<E>,
    dy: &[E],
) -> Result<NormGradients<E>, Error> {
    problem.check(inputs)?;
    Error::check_len("dy", dy.len(), &[inputs.x.len()])?;
    let n = problem.features;
    let run = TASK.div_ceil(n) * n;
    let mut dx = Output::new(dy.len(), Vec::new());
    let mut dz = inputs.gate.map(|_| Output::new(dy.len(), Vec::new()));
    let mut others = dz.as_mut().map(|dz| dz.parts(run));
    let parts = dx.parts(run).map(|dx| (dx, others.as_mut().and_then(Iterator::next))).enumerate().collect();
    let sums = each(parts, dy.len(), |(task, (dx, dz)): (usize, Parts<'_, E>)| {
        let (dx, mut dz) = (zeroed(dx), dz.map(zeroed));
        let mut row = Row::new(problem, inputs);
        let (mut d_weight, mut slope) = (vec![0.0; n], vec![0.0; n]);
        for (i, dx) in dx.chunks_exact_mut(n).enumerate() {
            let at = task * run + i * n..task * run + (i + 1) * n;
            let r = row.load(problem, &inputs.x[at.clone()]);
            let Row { x, z, dy: d, weight } = &mut row;
            widen(&dy[at.clone()], d);
            vectorize(
                #[inline(always)]
                || x.iter_mut().for_each(|x| *x *= r),
            );
            // From here on x is the normalised row.
            if let (Some((f, values)), Some(dz)) = (inputs.gate, &mut dz) {
                widen(&values[at], z);
                glu::apply_with_slope(f, z, &mut slope);
                vectorize(
                    #[inline(always)]
                    || {
                        let rows = slope.iter_mut().zip(d.iter_mut()).zip(z.iter());
                        for (((slope, d), f), (x, w)) in rows.zip(x.iter().zip(&*weight)) {
                            *slope *= *d * x * w;
                            *d *= f;
                        }
                    },
                );
                round(&slope, &mut dz[i * n..(i + 1) * n]);
            }
            vectorize(
                #[inline(always)]
                || {
                    for (((d, x), w), sum) in d.iter_mut().zip(x.iter()).zip(&*weight).zip(&mut d_weight) {
                        *sum += *d * x;
                        *d *= w;
                    }
                },
            );
            // d(x r) / dx leaves what is orthogonal to x, if eps is nothing.
            let along = row.dot(|row| &row.dy) / problem.divisor;
            let Row { x, dy: d, .. } = &mut row;
            vectorize(
                #[inline(always)]
                || x.iter_mut().zip(d.iter()).for_each(|(x, d)| *x = r * (d - *x * along)),
            );
            round(x, dx);
        }
        d_weight
    });
    let d_weight = inputs.weight.map(|_| {
        let mut total = vec![0.0; n];
        sums.iter().for_each(|sums| total.iter_mut().zip(sums).for_each(|(t, x)| *t += x));
        E::from_f32_vec(total)
    });
    // Safety: the tasks have written all of both.
    Ok(unsafe { NormGradients { dx: dx.finish(), d_weight, dz: dz.map(|dz| dz.finish()) } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, wide};

    /// The definition in f64, and its derivative in a direction by central differences.
    fn definition(p: &NormProblem, x: &[f64], w: Option<&[f64]>, z: Option<&[f64]>) -> Vec<f64> {
        let n = p.features;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let mut y = x.to_vec();
        for (i, row) in y.chunks_mut(n).enumerate() {
            let sum: f64 = row.iter().map(|x| x * x).sum();
            let r = (sum / f64::from(p.divisor) + f64::from(p.eps)).sqrt().recip();
            for (j, y) in row.iter_mut().enumerate() {
                let z = z.map_or(1.0, |z| z[i * n + j] * sigmoid(z[i * n + j]));
                *y *= r * z * w.map_or(1.0, |w| f64::from(p.offset) + w[j]);
            }
        }
        y
    }

    #[test]
    fn equals_the_definition() {
        for (rows, features) in [(1, 1), (3, 64), (700, 40), (5, 300), (400, 128)] {
            let mut noise = Noise::new(rows as u64);
            let n = rows * features;
            let [x, z, dy] = [0; 3].map(|_| noise.uniform::<f32>(n, -2.0, 2.0));
            let w = noise.uniform::<f32>(features, -1.0, 1.0);
            let plain = NormProblem::rms(features, 1e-5);
            for (p, weighted, gated) in [
                (plain, true, false),
                (plain.with_offset(1.0), true, true),
                (NormProblem::l2(features, 1e-6), false, false),
                (plain, false, true),
            ] {
                let inputs = NormInputs {
                    x: &x,
                    weight: weighted.then_some(&w[..]),
                    gate: gated.then_some((Activation::Silu, &z[..])),
                };
                let [x64, w64, z64, d64] = [&x, &w, &z, &dy].map(|x| wide(x));
                let value =
                    |x: &[f64], w: &[f64], z: &[f64]| definition(&p, x, weighted.then_some(w), gated.then_some(z));
                assert_close("y", &forward(&p, &inputs).unwrap(), &value(&x64, &w64, &z64), 1e-6);
                let grads = backward(&p, &inputs, &dy).unwrap();
                // Along one direction per tensor, which mixes all of its gradients.
                let check = |name: &str, found: Option<&[f32]>, which: usize| {
                    let Some(found) = found else { return };
                    let direction: Vec<f64> =
                        (0..found.len()).map(|i| ((i * 7 + 3) % 11) as f64 / 11.0 - 0.4).collect();
                    let moved = |h: f64| {
                        let mut tensors = [x64.clone(), w64.clone(), z64.clone()];
                        tensors[which].iter_mut().zip(&direction).for_each(|(x, d)| *x += h * d);
                        let y = value(&tensors[0], &tensors[1], &tensors[2]);
                        y.iter().zip(&d64).map(|(y, d)| y * d).sum::<f64>()
                    };
                    let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let along: f64 = found.iter().zip(&direction).map(|(f, d)| f64::from(*f) * d).sum();
                    let size: f64 = found.iter().zip(&direction).map(|(f, d)| (f64::from(*f) * d).abs()).sum();
                    assert!((along - want).abs() < 2e-6 * size.max(1.0), "{p:?} {name}: {along}, expected {want}");
                };
                check("dx", Some(&grads.dx), 0);
                check("d_weight", grads.d_weight.as_deref(), 1);
                check("dz", grads.dz.as_deref(), 2);
                assert_eq!((grads.d_weight.is_some(), grads.dz.is_some()), (weighted, gated));
            }
        }
    }

    #[test]
    fn refuses_lengths() {
        let inputs = |x, weight| NormInputs::<f32> { x, weight, gate: None };
        let p = NormProblem::rms(4, 1e-6);
        let error = forward(&p, &inputs(&[0.0; 6], None)).unwrap_err();
        assert_eq!(error.to_string(), "`x` has shape [6], expected [1, 4]");
        assert!(forward(&p, &inputs(&[0.0; 8], Some(&[0.0; 3]))).is_err());
        assert!(backward(&p, &inputs(&[0.0; 8], None), &[0.0; 7]).is_err());
        // A row of zeros is as good as any.
        assert_eq!(forward(&p, &inputs(&[0.0; 8], None)).unwrap(), [0.0; 8]);
    }
}
