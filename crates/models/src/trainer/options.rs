//! What a training run is told.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::schedule::Cosine;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainOptions {
    /// Optimizer steps of the whole run; the schedule spans them.
    pub steps: usize,
    /// Rows per batch.
    pub batch: usize,
    /// Tokens per row.
    pub context: usize,
    /// Batches whose gradients are averaged for one step.
    pub accumulate: usize,
    /// The peak of the learning rate.
    pub lr: f64,
    /// The learning rate at the end, as a part of the peak.
    pub lr_floor: f64,
    /// Steps of linear warm-up.
    pub warmup: usize,
    /// AdamW's decay rates of the moments.
    pub betas: (f32, f32),
    /// AdamW's weight decay, for matrices.
    pub weight_decay: f32,
    /// Largest l2 norm of the gradient; 0 is no limit.
    pub clip: f64,
    /// Fixes parameters and the order of the data.
    pub seed: u64,
    /// Steps between evaluations on the held-out part; 0 is only at the end.
    pub eval_every: usize,
    /// Batches of an evaluation before the end, which takes all.
    pub eval_batches: usize,
    /// Steps between checkpoints; 0 is only at the end.
    pub save_every: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            steps: 1500,
            batch: 8,
            context: 256,
            accumulate: 1,
            lr: 3e-3,
            lr_floor: 0.1,
            warmup: 100,
            betas: (0.9, 0.95),
            weight_decay: 0.1,
            clip: 1.0,
            seed: 0,
            eval_every: 250,
            eval_batches: 8,
            save_every: 250,
        }
    }
}

impl TrainOptions {
    /// Checks every option.
    ///
    /// # Errors
    /// Names the first option that cannot be used.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [
            ("steps", self.steps),
            ("batch", self.batch),
            ("context", self.context),
            ("accumulate", self.accumulate),
            ("eval-batches", self.eval_batches),
        ] {
            if value == 0 {
                return Err(Error::argument(name, "must be at least 1, got 0"));
            }
        }
        let decay = self.weight_decay;
        for (name, value, allowed, expected) in [
            ("lr", self.lr, self.lr > 0.0 && self.lr.is_finite(), "above 0 and finite"),
            ("lr-floor", self.lr_floor, (0.0..=1.0).contains(&self.lr_floor), "from 0 to 1"),
            ("weight-decay", decay.into(), decay >= 0.0 && decay.is_finite(), "0 or more and finite"),
            ("clip", self.clip, self.clip >= 0.0 && self.clip.is_finite(), "0 or more and finite"),
        ] {
            if !allowed {
                return Err(Error::argument(name, format!("must be {expected}, got {value}")));
            }
        }
        Ok(())
    }

    pub(super) fn schedule(&self) -> Cosine {
        let warmup = self.warmup.min(self.steps / 5);
        Cosine { peak: self.lr, floor: self.lr_floor, warmup, total: self.steps }
    }
}
