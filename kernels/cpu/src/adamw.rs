//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), all of a step in one pass over memory.
//!
//! ```text
//! m <- beta_1 m + (1 - beta_1) g          v <- beta_2 v + (1 - beta_2) g^2
//! p <- (1 - lr weight_decay) p - lr (m / (1 - beta_1^t)) / (sqrt(v / (1 - beta_2^t)) + epsilon)
//! ```

use rayon::prelude::*;

use crate::Error;
use crate::native::simd::vectorize;

/// Parameters that a task takes at most: four arrays of it stay in a second-level cache.
const TASK: usize = 1 << 14;

/// What a step is made with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rates of the moments.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decay of the parameters per step, in learning rates.
    pub weight_decay: f32,
    /// Number of this step: the first is 1.
    pub time: usize,
}

/// Advances parameters `p` and their moments `m` and `v`, both 0 before the first step, by the gradients `g`.
///
/// # Errors
/// If the slices differ in length, `time` is 0, or a decay rate is not in `[0, 1)`.
pub fn step(step: &AdamWStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> Result<(), Error> {
    for (argument, found) in [("g", g.len()), ("m", m.len()), ("v", v.len())] {
        Error::check_len(argument, found, &[p.len()])?;
    }
    Error::check_positive("time", step.time)?;
    check_betas(step.betas)?;
    let time = i32::try_from(step.time).unwrap_or(i32::MAX);
    let (beta_1, beta_2) = step.betas;
    let (rest_1, rest_2) = (1.0 - beta_1, 1.0 - beta_2);
    let (scale_1, scale_2) = (1.0 / (1.0 - beta_1.powi(time)), 1.0 / (1.0 - beta_2.powi(time)));
    let (lr, keep) = (step.lr as f32, (1.0 - step.lr * f64::from(step.weight_decay)) as f32);
    let epsilon = step.epsilon;
    let tasks = (p.par_chunks_mut(TASK), g.par_chunks(TASK), m.par_chunks_mut(TASK), v.par_chunks_mut(TASK));
    tasks.into_par_iter().with_min_len(2).for_each(|(p, g, m, v)| {
        vectorize(
            #[inline(always)]
            || {
                for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                    *m = beta_1 * *m + rest_1 * g;
                    *v = beta_2 * *v + rest_2 * (g * g);
                    *p = keep * *p - lr * ((*m * scale_1) / ((*v * scale_2).sqrt() + epsilon));
                }
            },
        );
    });
    Ok(())
}

/// Checks the decay rates: a moment is divided by `1 - beta^t`.
///
/// # Errors
/// If one is not in `[0, 1)`.
pub fn check_betas(betas: (f32, f32)) -> Result<(), Error> {
    for beta in [betas.0, betas.1] {
        if !(0.0..1.0).contains(&beta) {
            return Err(Error::Value { argument: "betas", found: beta.to_string(), expected: "0 or more and below 1" });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, wide};

    #[test]
    fn equals_the_definition() {
        let n = 3 * TASK + 5;
        let mut noise = Noise::new(7);
        let mut p: Vec<f32> = noise.uniform(n, -1.0, 1.0);
        let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
        let (mut p64, mut m64, mut v64) = (wide(&p), vec![0f64; n], vec![0f64; n]);
        let mut options = AdamWStep { lr: 0.1, betas: (0.9, 0.99), epsilon: 1e-8, weight_decay: 0.3, time: 0 };
        for time in 1..=3 {
            options.time = time as usize;
            let g: Vec<f32> = noise.uniform(n, -2.0, 2.0);
            step(&options, &mut p, &g, &mut m, &mut v).unwrap();
            let (b1, b2) = (f64::from(0.9f32), f64::from(0.99f32));
            for i in 0..n {
                let g = f64::from(g[i]);
                m64[i] = b1 * m64[i] + (1.0 - b1) * g;
                v64[i] = b2 * v64[i] + (1.0 - b2) * g * g;
                let (m, v) = (m64[i] / (1.0 - b1.powi(time)), v64[i] / (1.0 - b2.powi(time)));
                p64[i] = (1.0 - 0.1 * f64::from(0.3f32)) * p64[i] - 0.1 * m / (v.sqrt() + 1e-8);
            }
        }
        assert_close("p", &p, &p64, 3e-6);
        assert_close("m", &m, &m64, 1e-6);
        assert_close("v", &v, &v64, 1e-6);
    }

    #[test]
    fn refuses_lengths_and_step_0() {
        let options = AdamWStep { lr: 0.1, betas: (0.9, 0.99), epsilon: 1e-8, weight_decay: 0.0, time: 1 };
        let (mut p, mut m, mut v) = ([0f32; 2], [0f32; 2], [0f32; 2]);
        let error = step(&options, &mut p, &[0.0; 3], &mut m, &mut v).unwrap_err();
        assert_eq!(error.to_string(), "`g` has shape [3], expected [2]");
        assert!(step(&AdamWStep { time: 0, ..options }, &mut p, &[0.0; 2], &mut m, &mut v).is_err());
    }
}
