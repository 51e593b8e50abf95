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

impl Sampling {
    /// Checks every option.
    ///
    /// # Errors
    /// If the temperature is negative or not finite, or `top_p` not in (0, 1].
    pub fn validate(&self) -> Result<()> {
        let Self { temperature, top_p, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::argument("temperature", format!("must be 0 or more and finite, got {temperature}")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::argument("top-p", format!("must be above 0 and at most 1, got {top_p}")));
        }
        Ok(())
    }
}

/// Draws tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
    /// Tokens that were drawn.
    drawn: usize,
}

impl Sampler {
    /// A sampler that starts from the seed.
    ///
    /// # Errors
    /// As [`Sampling::validate`].
    pub fn new(sampling: Sampling) -> Result<Self> {
        sampling.validate()?;
        Ok(Self { sampling, rng: rng(sampling.seed, 0), drawn: 0 })
    }

    /// The next token, given its logits. Tokens at and above `allowed`, and those with logit `-inf`, are never drawn.
    ///
    /// # Errors
    /// [`Error::Draw`] if an allowed logit is NaN or `+inf`, or if there is none to draw.
    pub fn draw(&mut self, logits: &[f32], allowed: usize) -> Result<u32> {
        let logits = &logits[..allowed.min(logits.len())];
        let token = self.drawn + 1;
        if let Some(at) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
            let message = format!("the logit of id {at} is {}, the model's numbers are not finite", logits[at]);
            return Err(Error::Draw { token, message });
        }
        let mut order: Vec<u32> =
            (0..logits.len() as u32).filter(|&id| logits[id as usize] > f32::NEG_INFINITY).collect();
        if order.is_empty() {
            let message = format!("no token is left to draw: none of {} allowed logits is above -inf", logits.len());
            return Err(Error::Draw { token, message });
        }
        // Stable and total, so that ties fall to the smaller id on every machine.
        order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
        self.drawn = token;
        Ok(self.choose(&order, logits))
    }

    /// One of the ids in `order`, which begins with the most likely one and is not empty.
    fn choose(&mut self, order: &[u32], logits: &[f32]) -> u32 {
        let Sampling { temperature, top_k, top_p, .. } = self.sampling;
        if temperature == 0.0 {
            return order[0];
        }
        let order = if top_k > 0 { &order[..top_k.min(order.len())] } else { order };
        let largest = f64::from(logits[order[0] as usize]);
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
        (0..4000).map(|_| sampler.draw(&logits, 4).unwrap()).collect()
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
            (Sampling { temperature: f64::INFINITY, ..Sampling::default() }, "temperature"),
            (Sampling { top_p: 0.0, ..Sampling::default() }, "top-p"),
            (Sampling { top_p: -0.5, ..Sampling::default() }, "top-p"),
            (Sampling { top_p: 1.5, ..Sampling::default() }, "top-p"),
            (Sampling { top_p: f64::NAN, ..Sampling::default() }, "top-p"),
        ] {
            assert!(Sampler::new(sampling).unwrap_err().to_string().starts_with(name));
        }
    }

    const EXTREMES: [Sampling; 5] = [
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 },
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 },
        Sampling { temperature: f64::MIN_POSITIVE, top_k: usize::MAX, top_p: f64::MIN_POSITIVE, seed: 0 },
        Sampling { temperature: f64::MAX, top_k: 1, top_p: 1.0, seed: 0 },
        Sampling { temperature: 5e-324, top_k: 3, top_p: 0.9, seed: 0 },
    ];

    #[test]
    fn logits_that_are_no_distribution_are_told_with_the_token() {
        let minus = f32::NEG_INFINITY;
        for sampling in EXTREMES {
            for (logits, allowed, message) in [
                (&[0.0, 5.0, f32::NAN, 1.0][..], 4, "token 3: the logit of id 2 is NaN"),
                (&[0.0, -f32::NAN], 2, "token 3: the logit of id 1 is NaN"),
                (&[0.0, f32::INFINITY], 2, "token 3: the logit of id 1 is inf"),
                (&[minus, minus, 1.0], 2, "token 3: no token is left"),
                (&[1.0], 0, "token 3: no token is left"),
                (&[], 7, "token 3: no token is left"),
            ] {
                let mut sampler = Sampler::new(sampling).unwrap();
                assert_eq!(sampler.draw(&[minus, 2.0], 2).unwrap(), 1);
                assert_eq!(sampler.draw(&[7.0, f32::NAN], 1).unwrap(), 0, "what is not allowed is not looked at");
                let error = sampler.draw(logits, allowed).unwrap_err();
                assert!(
                    matches!(error, Error::Draw { token: 3, .. }) && error.to_string().contains(message),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn extreme_options_draw_what_has_a_chance() {
        let logits = [f32::NEG_INFINITY, 3.0, f32::MAX, -f32::MAX, f32::MAX];
        for sampling in EXTREMES {
            let mut sampler = Sampler::new(sampling).unwrap();
            let draws: Vec<u32> = (0..200).map(|_| sampler.draw(&logits, 5).unwrap()).collect();
            assert!(draws.iter().all(|&id| id != 0), "{sampling:?} drew a masked token");
            assert!(sampling.temperature == f64::MAX || draws.iter().all(|id| [2, 4].contains(id)), "{sampling:?}");
        }
    }
}
