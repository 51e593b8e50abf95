//! What a training run is told.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::schedule::Cosine;

/// Steps of warm-up by default.
const WARMUP: usize = 100;

/// Tokens of a step at most: more are a slip of the keyboard, and do not fit into any memory.
const STEP_TOKENS: usize = i32::MAX as usize;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainOptions {
    /// Optimizer steps of the whole run; the learning rate's schedule spans them.
    pub steps: usize,
    /// Rows per batch.
    pub batch: usize,
    /// Tokens per row.
    pub context: usize,
    /// Batches that are taken together for one step.
    pub accumulate: usize,
    /// The peak of the learning rate.
    pub lr: f64,
    /// The learning rate at the end, as a part of the peak.
    pub lr_floor: f64,
    /// Steps of linear warm-up, at most `steps`; but the default, 100, becomes a fifth of a run with fewer steps.
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
    /// Most tokens of any evaluation (one row at least), spread over the held-out part of a text; 0 is no limit.
    #[serde(default)]
    pub eval_tokens: usize,
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
            warmup: WARMUP,
            betas: (0.9, 0.95),
            weight_decay: 0.1,
            clip: 1.0,
            seed: 0,
            eval_every: 250,
            eval_batches: 8,
            eval_tokens: 0,
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
        // Checkpoints keep them as TOML, whose integers have a sign.
        for (name, value) in [
            ("steps", self.steps as u64),
            ("warmup", self.warmup as u64),
            ("seed", self.seed),
            ("eval-every", self.eval_every as u64),
            ("eval-batches", self.eval_batches as u64),
            ("eval-tokens", self.eval_tokens as u64),
            ("save-every", self.save_every as u64),
        ] {
            if i64::try_from(value).is_err() {
                return Err(Error::argument(name, format!("must be at most {}, got {value}", i64::MAX)));
            }
        }
        let mut tokens = Some(1usize);
        for (name, factor) in [("context", self.context), ("batch", self.batch), ("accumulate", self.accumulate)] {
            tokens = tokens.and_then(|tokens| tokens.checked_mul(factor)).filter(|&tokens| tokens <= STEP_TOKENS);
            if tokens.is_none() {
                let message = format!("is {factor}, with which a step has more than {STEP_TOKENS} tokens");
                return Err(Error::argument(name, message));
            }
        }
        // The kernels compute in f32, where a number may be 0 or infinite that is neither in f64.
        let finite = |value: f64| (value as f32).is_finite();
        let decay_rate = |beta: f32| (0.0..1.0).contains(&beta);
        let (positive, not_negative) = ("above 0 and finite in f32", "0 or more and finite in f32");
        for (name, value, allowed, expected) in [
            ("lr", self.lr.to_string(), self.lr as f32 > 0.0 && finite(self.lr), positive),
            ("lr-floor", self.lr_floor.to_string(), (0.0..=1.0).contains(&self.lr_floor), "between 0 and 1"),
            ("betas", self.betas.0.to_string(), decay_rate(self.betas.0), "0 or more and below 1"),
            ("betas", self.betas.1.to_string(), decay_rate(self.betas.1), "0 or more and below 1"),
            (
                "weight-decay",
                self.weight_decay.to_string(),
                self.weight_decay >= 0.0 && self.weight_decay.is_finite(),
                not_negative,
            ),
            ("clip", self.clip.to_string(), self.clip >= 0.0 && finite(self.clip), not_negative),
        ] {
            if !allowed {
                return Err(Error::argument(name, format!("must be {expected}, got {value}")));
            }
        }
        if self.warmup > self.steps && self.warmup != WARMUP {
            return Err(Error::argument("warmup", format!("is {}, the run has {} steps", self.warmup, self.steps)));
        }
        Ok(())
    }

    pub(super) fn schedule(&self) -> Cosine {
        let warmup = if self.warmup > self.steps { self.steps / 5 } else { self.warmup };
        Cosine { peak: self.lr, floor: self.lr_floor, warmup, total: self.steps }
    }

    /// Rows of a batch of evaluations, and how many batches `eval_tokens` allow.
    pub(super) fn evaluation_batches(&self) -> (usize, Option<usize>) {
        if self.eval_tokens == 0 {
            return (self.batch, None);
        }
        let rows = (self.eval_tokens / self.context).max(1);
        (rows.min(self.batch), Some((rows / self.batch).max(1)))
    }
}
