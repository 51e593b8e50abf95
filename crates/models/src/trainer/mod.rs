//! The training loop.

mod options;
mod report;

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Reader, Snapshot};
use crate::data::{Batch, BatchSource, TaskOptions, ids_tensor};
use crate::error::{Error, Result};
use crate::loss::{Loss, cross_entropy, share};
use crate::schedule::Cosine;
use crate::storage::Lock;
use crate::{Model, ModelConfig, Tokenizer};
use crate::{optimizer, params};
pub use options::TrainOptions;
pub use report::{Evaluation, EvaluationProgress, Event, Observer, StepReport};

/// Where a run's data comes from, so that it can be found again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataOrigin {
    /// The file or folder; `None` with no task is the program's own repository.
    pub text: Option<PathBuf>,
    /// The synthetic task.
    pub task: Option<TaskOptions>,
}

/// What a checkpoint says about its run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Steps that were done.
    pub step: usize,
    /// The options of the run.
    pub options: TrainOptions,
    /// Where the data comes from.
    pub data: DataOrigin,
    /// What tells the data from other data.
    pub fingerprint: String,
    /// The learning rate over the run; absent in checkpoints that follow from their options alone.
    #[serde(default)]
    pub schedule: Option<Cosine>,
}

impl RunState {
    /// Reads the run's state from a checkpoint, or from the newest one in a run's folder.
    ///
    /// # Errors
    /// If there is no checkpoint or it is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        Reader::open(path)?.training()
    }
}

/// A model in training.
pub struct Trainer<'a> {
    model: Model,
    optimizer: ModuleOptimizer,
    source: &'a dyn BatchSource,
    tokenizer: Option<&'a Tokenizer>,
    options: TrainOptions,
    schedule: Cosine,
    origin: DataOrigin,
    /// Where checkpoints are written to, by nobody else while the trainer lives.
    out: Option<Lock>,
    step: usize,
    device: Device,
}

impl<'a> Trainer<'a> {
    /// A fresh model. Without [`with_output`](Self::with_output), nothing is written.
    ///
    /// # Errors
    /// If the configuration or the options cannot be used, or the vocabulary is smaller than the data's.
    pub fn new(
        config: &ModelConfig,
        source: &'a dyn BatchSource,
        tokenizer: Option<&'a Tokenizer>,
        options: TrainOptions,
        device: &Device,
    ) -> Result<Self> {
        options.validate()?;
        let needed = source.vocab_size();
        let mut config = config.clone();
        match config.vocab_size {
            None => config.vocab_size = Some(needed),
            Some(size) if size < needed => {
                return Err(Error::config("vocab_size", format!("is {size}, the data needs {needed}")));
            }
            Some(_) => {}
        }
        let device = device.clone().autodiff();
        let model = Model::new(&config, options.seed, &device)?;
        let optimizer = optimizer::adamw(&model, options.betas, options.weight_decay);
        let schedule = options.schedule();
        let (origin, out, step) = (DataOrigin::default(), None, 0);
        Ok(Self { model, optimizer, source, tokenizer, options, schedule, origin, out, step, device })
    }

    /// Writes checkpoints below `run`, which must not have any yet. `origin` is kept in them.
    ///
    /// # Errors
    /// If `run` already has checkpoints, another run writes into it ([`Error::Locked`]), or it cannot be made.
    pub fn with_output(mut self, run: &Path, origin: DataOrigin) -> Result<Self> {
        std::fs::create_dir_all(run).map_err(Error::io(run))?;
        let lock = Lock::take(run)?;
        if !checkpoint::list(run).is_empty() {
            return Err(Error::argument(
                "out",
                format!("{} already holds checkpoints; resume them or name another folder", run.display()),
            ));
        }
        checkpoint::clean(run)?;
        (self.out, self.origin) = (Some(lock), origin);
        Ok(self)
    }

    /// Goes on from the newest checkpoint in `run`, with the options that are in it.
    ///
    /// `steps` are those of the whole run. As many as before, or `None`, and the run goes on as if it had never stopped.
    /// With another number the learning rate falls from where it is to its floor at the new end ([`Cosine::refit`]).
    ///
    /// # Errors
    /// If there is no checkpoint, it is damaged, another run writes into `run` ([`Error::Locked`]), `source` has other data
    /// than the run had, or `steps` are fewer than were done or more with a learning rate that has fallen to 0.
    pub fn resume(
        run: &Path,
        source: &'a dyn BatchSource,
        tokenizer: Option<&'a Tokenizer>,
        steps: Option<usize>,
        device: &Device,
    ) -> Result<Self> {
        checkpoint::find(run)?; // before anything is made
        let lock = Lock::take(run)?;
        checkpoint::clean(run)?;
        let reader = Reader::open(run)?;
        let state: RunState = reader.training()?;
        if state.fingerprint != fingerprint(source) {
            return Err(Error::checkpoint(reader.folder(), "its run was on other data than this"));
        }
        let (mut options, step, origin) = (state.options, state.step, state.data);
        let mut schedule = state.schedule.unwrap_or_else(|| options.schedule());
        if let Some(steps) = steps {
            if steps < step {
                return Err(Error::argument("steps", format!("is {steps}, the run has done {step} already")));
            }
            if steps != options.steps {
                schedule = schedule.refit(step, steps);
            }
            if steps > step && schedule.at(step) == 0.0 {
                let message = format!("is {steps}, but the learning rate has fallen to 0 after {step} steps");
                return Err(Error::argument("steps", message));
            }
            options.steps = steps;
        }
        options.validate()?;
        let device = device.clone().autodiff();
        let model = reader.model(&device)?;
        let fresh = optimizer::adamw(&model, options.betas, options.weight_decay);
        let optimizer = reader.optimizer(fresh, params::names(&model).len())?;
        let out = Some(lock);
        Ok(Self { model, optimizer, source, tokenizer, options, schedule, origin, out, step, device })
    }

    /// Bounds the tokens of evaluations from here on ([`TrainOptions::eval_tokens`]); training is not touched.
    ///
    /// # Errors
    /// If the number is too large to be kept.
    pub fn with_eval_tokens(mut self, tokens: usize) -> Result<Self> {
        self.options.eval_tokens = tokens;
        self.options.validate()?;
        Ok(self)
    }

    /// The model as it is now.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Steps that were done.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// The options of the run.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// The learning rate over the run.
    pub fn schedule(&self) -> &Cosine {
        &self.schedule
    }

    /// Does one optimizer step on `accumulate` batches. Its loss is the sum over all targets of the step, divided once by
    /// the sum of their weights: how they are spread over the batches changes nothing.
    ///
    /// # Errors
    /// If a layer fails or the loss is not a number.
    pub fn step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let TrainOptions { batch: rows, accumulate, clip, .. } = self.options;
        let first = (self.step * accumulate) as u64;
        let batches: Vec<Batch> =
            (first..first + accumulate as u64).map(|index| self.source.train(index, rows)).collect();
        let weight: f64 = batches.iter().map(Batch::weight).sum();
        let mut accumulator = GradientsAccumulator::new();
        let mut sum = Loss::default();
        for batch in &batches {
            let loss = batch_loss(&self.model, batch, &self.device)?;
            sum.add(&loss);
            if !loss.nats.is_finite() {
                let message = format!("the loss is {}; try a smaller learning rate", loss.nats);
                return Err(Error::Diverged { step: self.step + 1, message });
            }
            if let Some(mean) = loss.surrogate {
                let surrogate = mean * share(batch.weight(), weight);
                accumulator.accumulate(&self.model, GradientsParams::from_grads(surrogate.backward(), &self.model));
            }
        }
        let (grads, grad_norm) = params::clip(&self.model, accumulator.grads(), clip);
        if !grad_norm.is_finite() {
            let message = format!("the gradient's norm is {grad_norm}; try a smaller learning rate");
            return Err(Error::Diverged { step: self.step + 1, message });
        }
        let lr = self.schedule.at(self.step);
        self.model = self.optimizer.step(lr, self.model.clone(), grads);
        self.step += 1;
        let tokens: usize = batches.iter().map(|batch| batch.inputs.len()).sum();
        Ok(StepReport {
            step: self.step,
            loss: sum.mean(),
            accuracy: sum.accuracy(),
            grad_norm,
            lr,
            tokens_per_second: tokens as f64 / start.elapsed().as_secs_f64(),
        })
    }

    /// Judges the model by the held-out part, or by at most `limit` batches and [`TrainOptions::eval_tokens`] tokens of it.
    ///
    /// # Errors
    /// If a layer fails or no held-out target counts.
    pub fn evaluate(&self, limit: Option<usize>) -> Result<Evaluation> {
        self.judge(limit, &mut |_: &Event<'_>| true).map(|(evaluation, _)| evaluation)
    }

    /// [`evaluate`](Self::evaluate) under the eyes of `observer`, and whether that wants the run to go on.
    fn judge(&self, limit: Option<usize>, observer: &mut dyn Observer) -> Result<(Evaluation, bool)> {
        let start = Instant::now();
        let model = self.model.valid();
        let device = self.device.clone().inner();
        let (rows, bound) = self.options.evaluation_batches();
        let available = self.source.held_out(rows, None).size_hint().1;
        let limit = limit.into_iter().chain(bound).min().filter(|&limit| available.is_none_or(|all| limit < all));
        let batches = self.source.held_out(rows, limit);
        let total_batches = batches.size_hint().1;
        let mut progress = EvaluationProgress { batches: 0, total_batches, tokens: 0, seconds: 0.0 };
        let mut going = observer.observe(&Event::Evaluating(&progress))?;
        let mut sum = Loss::default();
        let mut complete = limit.is_none();
        // One batch at least, for whoever asks to stop.
        for batch in batches {
            if !going && progress.batches > 0 {
                complete = false;
                break;
            }
            sum.add(&batch_loss(&model, &batch, &device)?);
            progress.batches += 1;
            progress.tokens += batch.inputs.len();
            progress.seconds = start.elapsed().as_secs_f64();
            going &= observer.observe(&Event::Evaluating(&progress))?;
        }
        if sum.weight <= 0.0 {
            return Err(Error::argument("held-out", "has no target that counts, so there is nothing to judge by"));
        }
        let evaluation = Evaluation {
            step: self.step,
            held_out_loss: sum.mean(),
            bits_per_byte: self.source.bytes_per_token().map(|bytes| sum.mean() / bytes / std::f64::consts::LN_2),
            held_out_accuracy: sum.accuracy(),
            complete,
        };
        Ok((evaluation, going))
    }

    /// Writes a checkpoint; `None` if the run has no folder.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn save(&self) -> Result<Option<PathBuf>> {
        let Some(run) = self.out.as_ref().map(Lock::folder) else { return Ok(None) };
        let state = RunState {
            step: self.step,
            options: self.options.clone(),
            data: self.origin.clone(),
            fingerprint: fingerprint(self.source),
            schedule: Some(self.schedule),
        };
        let training = toml::to_string(&state).map_err(|error| Error::checkpoint(run, error.to_string()))?;
        let (model, tokenizer, optimizer) = (&self.model, self.tokenizer, &self.optimizer);
        checkpoint::save(run, self.step, &Snapshot { model, tokenizer, optimizer, training }).map(Some)
    }

    /// Runs to the end, evaluating and saving on the way. Returns the evaluation on all of the held-out part, or on
    /// [`TrainOptions::eval_tokens`] tokens of it.
    ///
    /// # Errors
    /// As [`step`](Self::step), [`evaluate`](Self::evaluate) and [`save`](Self::save), and what the observer returns.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Evaluation> {
        let due = |every: usize, step: usize| every > 0 && step.is_multiple_of(every);
        let mut going = true;
        while going && self.step < self.options.steps {
            let report = self.step()?;
            going &= observer.observe(&Event::Step(&report))?;
            let finished = self.step == self.options.steps;
            if going && !finished && due(self.options.eval_every, self.step) {
                let (evaluation, goes_on) = self.judge(Some(self.options.eval_batches), observer)?;
                going = observer.observe(&Event::Evaluation(&evaluation))? && goes_on;
            }
            if (!going || finished || due(self.options.save_every, self.step))
                && let Some(path) = self.save()?
            {
                going &= observer.observe(&Event::Saved(&path))?;
            }
        }
        let (evaluation, _) = self.judge(None, observer)?;
        observer.observe(&Event::Evaluation(&evaluation))?;
        Ok(evaluation)
    }
}

impl std::fmt::Debug for Trainer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer").field("step", &self.step).field("options", &self.options).finish_non_exhaustive()
    }
}

fn fingerprint(source: &dyn BatchSource) -> String {
    format!("{:016x}", source.fingerprint())
}

/// The loss of `model` on a batch.
///
/// # Errors
/// If a layer fails.
pub fn batch_loss(model: &Model, batch: &Batch, device: &Device) -> Result<Loss> {
    let (hidden, _) = model.forward(batch.input_tensor(device), None, batch.cu_seqlens.as_deref())?;
    let [rows, time, features] = hidden.dims();
    let tokens = rows * time;
    let targets = ids_tensor(&batch.targets, [tokens], device);
    let weights = batch.weights.as_ref().map(|weights| Tensor::<1>::from_data(weights.as_slice(), device));
    let hidden = hidden.reshape([tokens, features]);
    Ok(cross_entropy(hidden, model.head(), targets, weights, model.config().logits_soft_cap))
}

#[cfg(test)]
pub(crate) mod tests;
