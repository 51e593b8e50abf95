//! What a run tells about itself.

use std::path::Path;

use serde::Serialize;

use crate::error::Result;

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// Number of the step, counted from 1.
    pub step: usize,
    /// Mean loss over all targets of the step that count, in nats per token, before the step; 0 if none counts.
    pub loss: f64,
    /// The part of the targets that had the largest logit.
    pub accuracy: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// Tokens per second.
    pub tokens_per_second: f64,
}

/// A look at the held-out part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Steps that were done.
    pub step: usize,
    /// Mean loss over all targets that count, in nats per token.
    pub held_out_loss: f64,
    /// Bits per byte of text; absent for tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// The part of the targets that had the largest logit.
    pub held_out_accuracy: f64,
    /// Whether all of the held-out part was looked at.
    pub complete: bool,
}

/// How far an evaluation is.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluationProgress {
    /// Batches that were looked at: 0 at the start.
    pub batches: usize,
    /// All batches of the evaluation, if the source's iterator says so.
    pub total_batches: Option<usize>,
    /// Tokens that were looked at.
    pub tokens: usize,
    /// Seconds since the start.
    pub seconds: f64,
}

impl EvaluationProgress {
    /// Seconds that are left, if the batches that are left take as long as those before; unknown at the start.
    pub fn seconds_left(&self) -> Option<f64> {
        let left = self.total_batches?.checked_sub(self.batches)?;
        (self.batches > 0).then(|| self.seconds / self.batches as f64 * left as f64)
    }
}

/// What a run reports.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a StepReport),
    /// An evaluation starts, or has looked at another batch; `false` ends it too, with what it has seen.
    Evaluating(&'a EvaluationProgress),
    /// An evaluation is done.
    Evaluation(&'a Evaluation),
    /// A checkpoint is on disk.
    Saved(&'a Path),
}

/// Follows a run.
pub trait Observer {
    /// Called as things happen; `false` ends the run after a checkpoint.
    ///
    /// # Errors
    /// Ends the run at once.
    fn observe(&mut self, event: &Event<'_>) -> Result<bool>;
}

impl<F: FnMut(&Event<'_>) -> bool> Observer for F {
    fn observe(&mut self, event: &Event<'_>) -> Result<bool> {
        Ok(self(event))
    }
}
