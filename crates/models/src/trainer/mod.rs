//! The training loop.

mod options;

use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Reader, Snapshot};
use crate::data::{Batch, BatchSource, TaskOptions, ids_tensor};
use crate::error::{Error, Result};
use crate::loss::{Loss, cross_entropy};
use crate::{Model, ModelConfig, Tokenizer};
use crate::{optimizer, params};
pub use options::TrainOptions;

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

/// One optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// Number of the step, counted from 1.
    pub step: usize,
    /// Mean loss in nats per token, before the step.
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
    /// Mean loss in nats per token.
    pub held_out_loss: f64,
    /// Bits per byte of text; absent for tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// The part of the targets that had the largest logit.
    pub held_out_accuracy: f64,
    /// Whether all of the held-out part was looked at.
    pub complete: bool,
}

/// What a run reports.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step is done.
    Step(&'a StepReport),
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

/// A model in training.
pub struct Trainer<'a> {
    model: Model,
    optimizer: ModuleOptimizer,
    source: &'a dyn BatchSource,
    tokenizer: Option<&'a Tokenizer>,
    options: TrainOptions,
    origin: DataOrigin,
    out: Option<PathBuf>,
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
        let (out, origin) = (None, DataOrigin::default());
        Ok(Self { model, optimizer, source, tokenizer, options, origin, out, step: 0, device })
    }

    /// Writes checkpoints below `run`, which must not have any yet. `origin` is kept in them.
    ///
    /// # Errors
    /// If `run` already has checkpoints or cannot be made.
    pub fn with_output(mut self, run: &Path, origin: DataOrigin) -> Result<Self> {
        if !checkpoint::list(run).is_empty() {
            return Err(Error::argument(
                "out",
                format!("{} already holds checkpoints; resume them or name another folder", run.display()),
            ));
        }
        std::fs::create_dir_all(run).map_err(Error::io(run))?;
        self.out = Some(run.to_owned());
        self.origin = origin;
        Ok(self)
    }

    /// Goes on from the newest checkpoint in `run`, with the options that are in it; `steps` may be larger than before.
    ///
    /// # Errors
    /// If there is no checkpoint, it is damaged, or `source` has other data than the run had.
    pub fn resume(
        run: &Path,
        source: &'a dyn BatchSource,
        tokenizer: Option<&'a Tokenizer>,
        steps: Option<usize>,
        device: &Device,
    ) -> Result<Self> {
        let reader = Reader::open(run)?;
        let state: RunState = reader.training()?;
        if state.fingerprint != fingerprint(source) {
            return Err(Error::checkpoint(reader.folder(), "its run was on other data than this"));
        }
        let mut options = state.options;
        if let Some(steps) = steps {
            if steps < state.step {
                return Err(Error::argument("steps", format!("is {steps}, the run has done {} already", state.step)));
            }
            options.steps = steps;
        }
        options.validate()?;
        let device = device.clone().autodiff();
        let model = reader.model(&device)?;
        let fresh = optimizer::adamw(&model, options.betas, options.weight_decay);
        let optimizer = reader.optimizer(fresh, params::names(&model).len())?;
        let (out, origin, step) = (Some(run.to_owned()), state.data, state.step);
        Ok(Self { model, optimizer, source, tokenizer, options, origin, out, step, device })
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

    /// Does one optimizer step.
    ///
    /// # Errors
    /// If a layer fails or the loss is not a number.
    pub fn step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let TrainOptions { batch: rows, accumulate, clip, .. } = self.options;
        let mut accumulator = GradientsAccumulator::new();
        let (mut nats, mut weight, mut correct, mut tokens) = (0.0, 0.0, 0.0, 0);
        for micro in 0..accumulate {
            let batch = self.source.train((self.step * accumulate + micro) as u64, rows);
            let loss = batch_loss(&self.model, &batch, &self.device)?;
            tokens += batch.inputs.len();
            (nats, weight, correct) = (nats + loss.nats, weight + loss.weight, correct + loss.correct);
            if !loss.nats.is_finite() {
                let message = format!("the loss is {}; try a smaller learning rate", loss.nats);
                return Err(Error::Diverged { step: self.step + 1, message });
            }
            if let Some(surrogate) = loss.surrogate {
                accumulator.accumulate(&self.model, GradientsParams::from_grads(surrogate.backward(), &self.model));
            }
        }
        let (grads, grad_norm) =
            params::scale_and_clip(&self.model, accumulator.grads(), 1.0 / accumulate as f64, clip);
        if !grad_norm.is_finite() {
            let message = format!("the gradient's norm is {grad_norm}; try a smaller learning rate");
            return Err(Error::Diverged { step: self.step + 1, message });
        }
        let lr = self.options.schedule().at(self.step);
        self.model = self.optimizer.step(lr, self.model.clone(), grads);
        self.step += 1;
        Ok(StepReport {
            step: self.step,
            loss: nats / f64::max(weight, f64::MIN_POSITIVE),
            accuracy: correct / f64::max(weight, f64::MIN_POSITIVE),
            grad_norm,
            lr,
            tokens_per_second: tokens as f64 / start.elapsed().as_secs_f64(),
        })
    }

    /// Judges the model by the held-out part, or by at most `limit` batches of it.
    ///
    /// # Errors
    /// If a layer fails.
    pub fn evaluate(&self, limit: Option<usize>) -> Result<Evaluation> {
        let model = self.model.valid();
        let device = self.device.clone().inner();
        let (mut nats, mut weight, mut correct) = (0.0, 0.0, 0.0);
        for batch in self.source.held_out(self.options.batch, limit) {
            let loss = batch_loss(&model, &batch, &device)?;
            (nats, weight, correct) = (nats + loss.nats, weight + loss.weight, correct + loss.correct);
        }
        let mean = nats / f64::max(weight, f64::MIN_POSITIVE);
        Ok(Evaluation {
            step: self.step,
            held_out_loss: mean,
            bits_per_byte: self.source.bytes_per_token().map(|bytes| mean / bytes / std::f64::consts::LN_2),
            held_out_accuracy: correct / f64::max(weight, f64::MIN_POSITIVE),
            complete: limit.is_none(),
        })
    }

    /// Writes a checkpoint; `None` if the run has no folder.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn save(&self) -> Result<Option<PathBuf>> {
        let Some(run) = &self.out else { return Ok(None) };
        let state = RunState {
            step: self.step,
            options: self.options.clone(),
            data: self.origin.clone(),
            fingerprint: fingerprint(self.source),
        };
        let training = toml::to_string(&state).map_err(|error| Error::checkpoint(run, error.to_string()))?;
        let (model, tokenizer, optimizer) = (&self.model, self.tokenizer, &self.optimizer);
        checkpoint::save(run, self.step, &Snapshot { model, tokenizer, optimizer, training }).map(Some)
    }

    /// Runs to the end, evaluating and saving on the way. Returns the evaluation on all of the held-out part.
    ///
    /// # Errors
    /// As [`step`](Self::step), [`evaluate`](Self::evaluate) and [`save`](Self::save), and what the observer returns.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Evaluation> {
        let due = |every: usize, step: usize| every > 0 && step.is_multiple_of(every);
        let mut going = true;
        while going && self.step < self.options.steps {
            let report = self.step()?;
            going &= observer.observe(&Event::Step(&report))?;
            let last = !going || self.step == self.options.steps;
            if !last && due(self.options.eval_every, self.step) {
                let evaluation = self.evaluate(Some(self.options.eval_batches))?;
                going &= observer.observe(&Event::Evaluation(&evaluation))?;
            }
            if (last || due(self.options.save_every, self.step))
                && let Some(path) = self.save()?
            {
                going &= observer.observe(&Event::Saved(&path))?;
            }
        }
        let evaluation = self.evaluate(None)?;
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
pub(crate) mod tests {
    use super::*;
    use crate::data::{Corpus, Document};
    use crate::metrics::MetricsLog;
    use crate::{checkpoint, preset};

    pub(crate) fn corpus() -> Corpus {
        // Three documents, so that rows have boundaries.
        let text =
            |word: &str| Document { name: word.to_owned(), bytes: (word.to_owned() + " runs. ").repeat(40).into() };
        let documents = [text("water"), text("the river"), text("a thalweg")];
        Corpus::new(&documents, &Tokenizer::bytes(), 16, 0).unwrap()
    }

    pub(crate) fn small() -> ModelConfig {
        let mut config = preset("gated_delta_net-3:1-tiny").unwrap();
        config.hidden_size = 32;
        config.pattern = vec!["gated_delta_net".to_owned(), "attention".to_owned()];
        config.layers = None;
        config.channel_mixer.intermediate_size = Some(48);
        if let Some(thalweg_layers::MixerConfig::GatedDeltaNet(mixer)) = config.mixers.get_mut("gated_delta_net") {
            (mixer.num_heads, mixer.head_dim) = (2, 16);
        }
        if let Some(thalweg_layers::MixerConfig::Attention(mixer)) = config.mixers.get_mut("attention") {
            mixer.num_heads = 2;
        }
        config
    }

    pub(crate) fn options(steps: usize) -> TrainOptions {
        TrainOptions {
            steps,
            batch: 4,
            context: 16,
            lr: 1e-2,
            warmup: 4,
            eval_every: 5,
            save_every: 5,
            ..TrainOptions::default()
        }
    }

    pub(crate) fn trainer<'a>(source: &'a Corpus, tokenizer: &'a Tokenizer, steps: usize) -> Trainer<'a> {
        Trainer::new(&small(), source, Some(tokenizer), options(steps), &Device::flex()).unwrap()
    }

    #[test]
    fn a_small_hybrid_learns_a_simple_text() {
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let mut trainer = trainer(&corpus, &tokenizer, 40);
        let before = trainer.evaluate(None).unwrap().bits_per_byte.unwrap();
        let after = trainer.run(&mut |_: &Event<'_>| true).unwrap().bits_per_byte.unwrap();
        assert!(before > 7.0 && after < 0.4 * before, "from {before} to {after} bits per byte");
    }

    #[test]
    fn a_run_that_is_killed_and_resumed_has_the_same_losses() {
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let folder = tempfile::tempdir().unwrap();
        let mut whole = Vec::new();
        let mut record = |event: &Event<'_>| {
            if let Event::Step(report) = event {
                whole.push(report.loss.to_bits());
            }
            true
        };
        trainer(&corpus, &tokenizer, 20).run(&mut record).unwrap();

        let run = folder.path();
        let mut first = trainer(&corpus, &tokenizer, 20).with_output(run, DataOrigin::default()).unwrap();
        let mut parts = Vec::new();
        // Goes on to step 13 after the checkpoint of step 10, then is gone.
        for _ in 0..13 {
            parts.push(first.step().unwrap().loss.to_bits());
            if first.steps_done() == 10 {
                first.save().unwrap();
            }
        }
        drop(first);
        parts.truncate(10);
        let mut second = Trainer::resume(run, &corpus, Some(&tokenizer), None, &Device::flex()).unwrap();
        assert_eq!(second.steps_done(), 10);
        let mut record = |event: &Event<'_>| {
            if let Event::Step(report) = event {
                parts.push(report.loss.to_bits());
            }
            true
        };
        second.run(&mut record).unwrap();
        assert_eq!(parts, whole);
        assert_eq!(checkpoint::list(run).into_iter().map(|(step, _)| step).collect::<Vec<_>>(), [15, 20]);
    }

    #[test]
    fn accumulated_batches_make_the_step_of_the_larger_batch() {
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let step = |batch, accumulate| {
            let options = TrainOptions { batch, accumulate, ..options(4) };
            let mut trainer = Trainer::new(&small(), &corpus, Some(&tokenizer), options, &Device::flex()).unwrap();
            trainer.step().unwrap()
        };
        let (large, small) = (step(4, 1), step(2, 2));
        assert!((large.loss - small.loss).abs() < 1e-5);
        assert!((large.grad_norm / small.grad_norm - 1.0).abs() < 1e-4, "{large:?} {small:?}");
    }

    #[test]
    fn an_observer_ends_a_run_after_a_checkpoint() {
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let folder = tempfile::tempdir().unwrap();
        let mut trainer = trainer(&corpus, &tokenizer, 20).with_output(folder.path(), DataOrigin::default()).unwrap();
        let mut log = MetricsLog::open(folder.path(), 0).unwrap();
        let mut stop = |event: &Event<'_>| {
            log.observe(event).unwrap();
            !matches!(event, Event::Step(report) if report.step == 3)
        };
        trainer.run(&mut stop).unwrap();
        assert_eq!(RunState::load(folder.path()).unwrap().step, 3);
        assert_eq!(crate::metrics::read(folder.path()).unwrap().len(), 4, "three steps and the last evaluation");
    }

    #[test]
    fn what_cannot_be_trained_is_refused() {
        let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
        let refuse = |config: ModelConfig, options: TrainOptions| {
            Trainer::new(&config, &corpus, Some(&tokenizer), options, &Device::flex()).unwrap_err().to_string()
        };
        assert!(refuse(small().with_vocab_size(9), options(1)).starts_with("config: `vocab_size`"));
        assert!(refuse(small(), TrainOptions { lr: f64::NAN, ..options(1) }).starts_with("lr: "));
        assert!(refuse(small(), TrainOptions { batch: 0, ..options(1) }).starts_with("batch: "));
        let options = TrainOptions { lr: 1e30, clip: 0.0, ..options(9) };
        let mut trainer = Trainer::new(&small(), &corpus, Some(&tokenizer), options, &Device::flex()).unwrap();
        let error = trainer.run(&mut |_: &Event<'_>| true).unwrap_err();
        assert!(matches!(error, Error::Diverged { .. }), "{error}");
    }
}
