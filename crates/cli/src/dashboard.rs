//! How a run is shown: burn-train's dashboard on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Instant;

use burn_train::Interrupter;
use burn_train::logger::TrainingProgressLogger;
use burn_train::metric::{MetricDefinition, MetricEntry, MetricId, NumericAttributes, NumericEntry, SerializedEntry};
use burn_train::renderer::tui::TuiMetricsRendererWrapper;
use burn_train::renderer::{MetricState, MetricsRenderer, MetricsRendererTraining};
use thalweg_models::{EvaluationProgress, Event, TrainOptions};

/// Shows events; `false` when the user wants to stop.
pub trait Display {
    fn show(&mut self, event: &Event<'_>) -> bool;
}

/// The display that fits stdout, for a run that starts after step `first`.
pub fn open(options: &TrainOptions, first: usize, is_task: bool, plain: bool) -> Box<dyn Display> {
    if !plain && std::io::stdout().is_terminal() {
        Box::new(Dashboard::new(options.steps, first, is_task))
    } else {
        let batch_tokens = options.batch * options.context;
        Box::new(Lines {
            steps: options.steps,
            first,
            is_task,
            batch_tokens,
            start: Instant::now(),
            speed: None,
            next: 0.0,
        })
    }
}

/// Lines of text, about a hundred for a run.
struct Lines {
    steps: usize,
    first: usize,
    is_task: bool,
    /// Tokens of a batch.
    batch_tokens: usize,
    start: Instant,
    /// Tokens per second of the last step.
    speed: Option<f64>,
    /// Seconds into an evaluation after which it is time for a line about it.
    next: f64,
}

/// Seconds of an evaluation that need no line.
const SHORT: f64 = 5.0;

impl Lines {
    fn evaluating(&mut self, progress: &EvaluationProgress) {
        let total = progress.total_batches.unwrap_or(0);
        if progress.batches == 0 {
            self.next = SHORT;
            // Without a backward pass, a batch takes about a third of its time in training.
            let expected = self.speed.map(|speed| (total * self.batch_tokens) as f64 / (3.0 * speed));
            if total > 0 && expected.is_none_or(|seconds| seconds > SHORT) {
                let expected = expected.map_or_else(String::new, |seconds| format!(", about {}", minutes(seconds)));
                say!("evaluating {total} batches of held-out data{expected}");
            }
        } else if progress.seconds >= self.next && progress.batches != total {
            self.next = progress.seconds + 2.0 * SHORT;
            let left = progress.seconds_left().map_or_else(String::new, |left| format!("  {} left", minutes(left)));
            say!("evaluating  batch {}/{total}  {} tokens{left}", progress.batches, progress.tokens);
        }
    }
}

impl Display for Lines {
    fn show(&mut self, event: &Event<'_>) -> bool {
        match event {
            Event::Step(report) => {
                self.speed = Some(report.tokens_per_second);
                let every = (self.steps / 100).clamp(1, 50);
                if report.step != self.first + 1 && report.step != self.steps && !report.step.is_multiple_of(every) {
                    return true;
                }
                let done = (report.step - self.first) as f64;
                let left = self.start.elapsed().as_secs_f64() / done * (self.steps - report.step) as f64;
                let accuracy =
                    if self.is_task { format!("  right {:6.2} %", 100.0 * report.accuracy) } else { String::new() };
                say!(
                    "step {:>6}/{}  loss {:.4}{accuracy}  grad {:.3}  lr {:.2e}  {:.0} tokens/s  {} left",
                    report.step,
                    self.steps,
                    report.loss,
                    report.grad_norm,
                    report.lr,
                    report.tokens_per_second,
                    minutes(left)
                );
            }
            Event::Evaluating(progress) => self.evaluating(progress),
            Event::Evaluation(evaluation) => {
                let part = if evaluation.complete { "held out" } else { "held out (part)" };
                let score = match evaluation.bits_per_byte {
                    Some(bits) => format!("{bits:.4} bits per byte"),
                    None => format!("right {:.2} %", 100.0 * evaluation.held_out_accuracy),
                };
                say!("step {:>6}  {part}: loss {:.4}  {score}", evaluation.step, evaluation.held_out_loss);
            }
            Event::Saved(path) => say!("saved {}", path.display()),
        }
        true
    }
}

fn minutes(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

/// burn-train's terminal dashboard.
struct Dashboard {
    renderer: TuiMetricsRendererWrapper,
    interrupter: Interrupter,
    is_task: bool,
}

/// What the status shows outside of evaluations.
const TRAINING: &str = "training";

const LOSS: &str = "Loss";
const SCORE_BITS: &str = "Bits per byte";
const SCORE_RIGHT: &str = "Right answers";
const RATE: &str = "Learning rate";
const NORM: &str = "Gradient norm";
const SPEED: &str = "Tokens per second";

impl Dashboard {
    fn new(steps: usize, first: usize, is_task: bool) -> Self {
        let interrupter = Interrupter::new();
        let mut renderer = TuiMetricsRendererWrapper::new(interrupter.clone(), None);
        let score = if is_task { (SCORE_RIGHT, Some("%"), true) } else { (SCORE_BITS, None, false) };
        for (name, unit, higher_is_better) in
            [(LOSS, None, false), score, (RATE, None, false), (NORM, None, false), (SPEED, None, true)]
        {
            let attributes = NumericAttributes { unit: unit.map(str::to_owned), higher_is_better };
            renderer.register_metric(MetricDefinition {
                metric_id: id(name),
                name: Arc::new(name.to_owned()),
                description: None,
                attributes: attributes.into(),
            });
        }
        renderer.start(1, 1, Some(steps), Some(TRAINING));
        renderer.start_split("train", steps);
        renderer.update_split(first);
        Self { renderer, interrupter, is_task }
    }
}

impl Display for Dashboard {
    fn show(&mut self, event: &Event<'_>) -> bool {
        match event {
            Event::Step(report) => {
                self.renderer.update_train(number(LOSS, report.loss));
                if self.is_task {
                    self.renderer.update_train(number(SCORE_RIGHT, 100.0 * report.accuracy));
                }
                self.renderer.update_train(number(RATE, report.lr));
                self.renderer.update_train(number(NORM, report.grad_norm));
                self.renderer.update_train(number(SPEED, report.tokens_per_second));
                self.renderer.update_split(report.step);
            }
            Event::Evaluating(progress) => {
                let total = progress.total_batches.map_or_else(String::new, |total| format!("/{total}"));
                let left = progress.seconds_left().map_or_else(String::new, |left| format!(", {} left", minutes(left)));
                self.renderer.start(1, 1, None, Some(&format!("evaluating {}{total}{left}", progress.batches)));
            }
            Event::Evaluation(evaluation) => {
                self.renderer.start(1, 1, None, Some(TRAINING));
                self.renderer.update_valid(number(LOSS, evaluation.held_out_loss));
                let score = match evaluation.bits_per_byte {
                    Some(bits) => number(SCORE_BITS, bits),
                    None => number(SCORE_RIGHT, 100.0 * evaluation.held_out_accuracy),
                };
                self.renderer.update_valid(score);
            }
            Event::Saved(_) => self.renderer.log_event_training("checkpoints".to_owned()),
        }
        !self.interrupter.should_stop()
    }
}

fn id(name: &str) -> MetricId {
    MetricId::new(Arc::new(name.to_owned()))
}

fn number(name: &str, value: f64) -> MetricState {
    let entry = MetricEntry::new(id(name), SerializedEntry::new(format!("{value:.5}"), value.to_string()));
    MetricState::Numeric(entry, Some(NumericEntry::Value(value)))
}
