//! Choosing the next token.

use rand::Rng;
use rand::rngs::StdRng;

use crate::data::rng;
use crate::error::{Error, Result};

/// How tokens are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the most likely token always.
    pub temperature: f64,
    /// Only so many of the most likely tokens are considered; 0 is all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability are considered; 1 is all.
    pub top_p: f64,
    /// Fixes what is drawn.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 0.95, seed: 0 }
    }
}

/// Draws tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

impl Sampler {
    /// A sampler that starts from the seed.
    ///
    /// # Errors
    /// If the temperature is negative or `top_p` not in (0, 1].
    pub fn new(sampling: Sampling) -> Result<Self> {
        let Sampling { temperature, top_p, seed, .. } = sampling;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::argument("temperature", format!("must be 0 or more, got {temperature}")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::argument("top-p", format!("must be above 0 and at most 1, got {top_p}")));
        }
        Ok(Self { sampling, rng: rng(seed, 0) })
    }

    /// The next token, given its logits. Tokens at and above `allowed` are never drawn.
    pub fn draw(&mut self, logits: &[f32], allowed: usize) -> u32 {
        let logits = &logits[..allowed.min(logits.len())];
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // Stable and total, so that ties fall to the smaller id on every machine.
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        if temperature == 0.0 {
            return order.first().copied().unwrap_or(0);
        }
        if top_k > 0 {
            order.truncate(top_k);
        }
        let largest = order.first().map_or(0.0, |&id| f64::from(logits[id as usize]));
        let weights: Vec<f64> =
            order.iter().map(|&id| ((f64::from(logits[id as usize]) - largest) / temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let within = weights.iter().take_while(|&&weight| {
            let before = kept;
            kept += weight;
            before < top_p * total
        });
        let count = within.count().max(1);
        let kept: f64 = weights[..count].iter().sum();
        let mut point = self.rng.random::<f64>() * kept;
        for (&id, weight) in order.iter().zip(&weights[..count]) {
            point -= weight;
            if point < 0.0 {
                return id;
            }
        }
        order[count - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(sampling: Sampling) -> Vec<u32> {
        let logits: Vec<f32> = [0.1f32, 0.5, 0.3, 0.1].iter().map(|p| p.ln()).collect();
        let mut sampler = Sampler::new(sampling).unwrap();
        (0..4000).map(|_| sampler.draw(&logits, 4)).collect()
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let plain = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 5 };
        let draws = drawn(plain);
        let share = |id| draws.iter().filter(|&&draw| draw == id).count() as f64 / 4000.0;
        assert!((share(1) - 0.5).abs() < 0.04 && (share(0) - 0.1).abs() < 0.03);
        assert_eq!(draws, drawn(plain));
        assert_ne!(draws, drawn(Sampling { seed: 6, ..plain }));
    }

    #[test]
    fn the_tail_is_cut_off() {
        let plain = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 5 };
        assert!(drawn(Sampling { top_k: 2, ..plain }).iter().all(|id| [1, 2].contains(id)));
        assert!(drawn(Sampling { top_p: 0.75, ..plain }).iter().all(|id| [1, 2].contains(id)));
        assert!(drawn(Sampling { top_p: 0.5, ..plain }).iter().all(|&id| id == 1));
        assert!(drawn(Sampling { temperature: 0.0, ..plain }).iter().all(|&id| id == 1));
    }

    #[test]
    fn bad_options_are_refused() {
        for (sampling, name) in [
            (Sampling { temperature: -1.0, ..Sampling::default() }, "temperature"),
            (Sampling { temperature: f64::NAN, ..Sampling::default() }, "temperature"),
            (Sampling { top_p: 0.0, ..Sampling::default() }, "top-p"),
        ] {
            assert!(Sampler::new(sampling).unwrap_err().to_string().starts_with(name));
        }
    }
}
