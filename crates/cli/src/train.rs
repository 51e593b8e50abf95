//! `thalweg train`: the main job, and the synthetic tasks.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args as ClapArgs, ValueEnum};
use thalweg_models::data::{BatchSource, Corpus, Document, Task, TaskOptions, read_text, repository_text};
use thalweg_models::metrics::MetricsLog;
use thalweg_models::{
    Alphabet, DataOrigin, Error, Event, ModelConfig, Observer, RunState, Tokenizer, TrainOptions, Trainer, checkpoint,
    preset,
};

use crate::dashboard::{self, Display};
use crate::{DeviceArgs, Outcome, plot};

/// What is trained if nothing is said: two cores show progress within a minute.
const DEFAULT_PRESET: &str = "gated_delta_net-3:1-tiny";

/// Where runs go if nothing is said.
const RUNS: &str = "runs";

/// Train a model; without arguments, a small hybrid on this repository's own text.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A text file, or a folder of them; default: the repository's own sources and docs.
    #[arg(long, conflicts_with = "task")]
    text: Option<PathBuf>,
    /// A Hugging Face tokenizer.json; default: bytes.
    #[arg(long, conflicts_with = "task")]
    tokenizer: Option<PathBuf>,
    /// A synthetic task instead of text.
    #[arg(long, value_enum)]
    task: Option<TaskName>,
    /// Key-value pairs or symbols to copy of the task.
    #[arg(long, requires = "task")]
    task_items: Option<usize>,
    /// Number of symbols of the task.
    #[arg(long, requires = "task")]
    task_symbols: Option<usize>,
    /// A model's configuration, .toml or .json.
    #[arg(long, conflicts_with = "preset")]
    config: Option<PathBuf>,
    /// A ready configuration, like gated_delta_net-3:1-tiny.
    #[arg(long)]
    preset: Option<String>,
    /// Optimizer steps of the whole run. With --resume: default as before; with another number the learning rate falls
    /// from where it is to its floor at the new end (a run that has ended stays at the floor).
    #[arg(long)]
    steps: Option<usize>,
    /// Rows per batch.
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens per row.
    #[arg(long)]
    context: Option<usize>,
    /// Batches per optimizer step; only how much memory a step takes depends on how its rows are spread over them.
    #[arg(long)]
    accumulate: Option<usize>,
    /// Peak of the learning rate, above 0.
    #[arg(long)]
    lr: Option<f64>,
    /// Steps of warm-up, at most --steps; default: 100, or a fifth of --steps if that is less.
    #[arg(long)]
    warmup: Option<usize>,
    /// AdamW's weight decay, for matrices.
    #[arg(long)]
    weight_decay: Option<f32>,
    /// Largest norm of the gradient; 0 is no limit.
    #[arg(long)]
    clip: Option<f64>,
    /// Fixes parameters, data order and examples.
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between evaluations; 0 is only at the end.
    #[arg(long)]
    eval_every: Option<usize>,
    /// Most tokens of an evaluation (one row at least), spread over the held-out text; 0, the default, is no limit but
    /// that of 8 batches before the end. May change with --resume.
    #[arg(long)]
    eval_tokens: Option<usize>,
    /// Steps between checkpoints; 0 is only at the end.
    #[arg(long)]
    save_every: Option<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// The run's folder; default: a new one in runs/.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Go on with the run in --out, or with the latest in runs/.
    #[arg(long)]
    resume: bool,
    /// Plain lines even if there is a terminal.
    #[arg(long)]
    plain: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum TaskName {
    /// Multi-query associative recall.
    Mqar,
    /// Repeat symbols in their order.
    Copy,
    /// Repeat the symbols among noise.
    SelectiveCopy,
    /// Parity of all bits so far.
    Parity,
    /// Sum of all digits so far, modulo the number of symbols.
    ModularSum,
    /// Product of all permutations of 3 things so far.
    S3,
    /// Product of all permutations of 5 things so far.
    S5,
}

impl From<TaskName> for Task {
    fn from(name: TaskName) -> Self {
        match name {
            TaskName::Mqar => Self::Mqar,
            TaskName::Copy => Self::Copy,
            TaskName::SelectiveCopy => Self::SelectiveCopy,
            TaskName::Parity => Self::Parity,
            TaskName::ModularSum => Self::ModularSum,
            TaskName::S3 => Self::S3,
            TaskName::S5 => Self::S5,
        }
    }
}

/// Text with its tokenizer, or a task.
struct Data {
    source: Box<dyn BatchSource>,
    tokenizer: Option<Tokenizer>,
    summary: String,
}

pub fn run(args: &Args) -> Outcome {
    let device = args.device.find()?;
    if args.resume {
        return resume(args, &device);
    }
    let mut options = TrainOptions::default();
    args.apply(&mut options);
    if let Some(warmup) = args.warmup.filter(|&warmup| warmup > options.steps) {
        return Err(format!("warmup: is {warmup}, the run has {} steps", options.steps).into());
    }
    options.validate()?;
    let (name, config) = args.model()?;
    let origin = DataOrigin { text: args.text.clone(), task: args.task(&options) };
    let data = load_data(&origin, args.tokenizer()?, &options)?;
    let trainer = Trainer::new(&config, &*data.source, data.tokenizer.as_ref(), options, &device)?;
    let run = match &args.out {
        Some(out) => out.clone(),
        None => match &origin.task {
            Some(task) => new_folder(&format!("{:?}-{name}", task.task).to_lowercase())?,
            None => new_folder(&name)?,
        },
    };
    let trainer = trainer.with_output(&run, origin)?;
    train(args, trainer, &run, &data)
}

fn resume(args: &Args, device: &burn::tensor::Device) -> Outcome {
    if let Some(flag) = args.fixed() {
        return Err(format!("{flag}: cannot change when a run is resumed").into());
    }
    let run = match &args.out {
        Some(out) => out.clone(),
        None => latest_run().ok_or("resume: no run with a checkpoint in runs/; name one with --out")?,
    };
    let state = RunState::load(&run)?;
    let tokenizer = checkpoint::tokenizer(&run)?;
    let data = load_data(&state.data, tokenizer, &state.options)?;
    let mut trainer = Trainer::resume(&run, &*data.source, data.tokenizer.as_ref(), args.steps, device)?;
    if let Some(tokens) = args.eval_tokens {
        trainer = trainer.with_eval_tokens(tokens)?;
    }
    train(args, trainer, &run, &data)
}

/// Runs to the end, then draws the curve and says how to go on.
fn train(args: &Args, mut trainer: Trainer<'_>, run: &Path, data: &Data) -> Outcome {
    crate::tell(data.tokenizer.as_ref().map_or(&[], Tokenizer::notes));
    let first = trainer.steps_done();
    let mut log = MetricsLog::open(run, first)?;
    say!("{}", describe(&trainer));
    say!("{}", data.summary);
    say!("run folder {}", run.display());
    if first > 0 {
        let (steps, schedule) = (trainer.options().steps, trainer.schedule());
        let (now, end) = (schedule.at(first), schedule.at(steps.saturating_sub(1)));
        say!("from step {first} on; learning rate {now:.2e}, {end:.2e} at step {steps}");
    }
    let mut display = dashboard::open(trainer.options(), first, data.tokenizer.is_none(), args.plain);
    let evaluation = trainer.run(&mut Both(&mut log, &mut *display));
    drop(display); // gives the terminal back before anything else is printed
    let evaluation = evaluation?;
    match plot::loss_curve(run) {
        Ok(picture) => say!("loss curve: {}", picture.display()),
        Err(error) => eprintln!("thalweg: loss curve: {error}"),
    }
    let part = if evaluation.complete { "" } else { " (part)" };
    match evaluation.bits_per_byte {
        Some(bits) => say!("held-out text{part}: {bits:.4} bits per byte after step {}", evaluation.step),
        None => say!("held-out examples{part}: {:.2} % right", 100.0 * evaluation.held_out_accuracy),
    }
    if trainer.steps_done() < trainer.options().steps {
        say!("go on with: thalweg train --resume --out {}", run.display());
    }
    if data.tokenizer.is_some() {
        say!("generate with: thalweg generate --checkpoint {} --prompt \"fn main\"", run.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// The log first: what is on the screen is then also on disk.
struct Both<'a>(&'a mut MetricsLog, &'a mut dyn Display);

impl Observer for Both<'_> {
    fn observe(&mut self, event: &Event<'_>) -> thalweg_models::Result<bool> {
        self.0.observe(event)?;
        Ok(self.1.show(event))
    }
}

fn describe(trainer: &Trainer<'_>) -> String {
    use burn::module::Module;
    let (model, options) = (trainer.model(), trainer.options());
    let config = model.config();
    format!(
        "model {} x {} layers of [{}], {:.2} M parameters; {} steps of {} x {} tokens",
        config.hidden_size,
        config.layers(),
        config.pattern.join(", "),
        model.num_params() as f64 / 1e6,
        options.steps,
        options.batch * options.accumulate,
        options.context
    )
}

fn load_data(origin: &DataOrigin, tokenizer: Option<Tokenizer>, options: &TrainOptions) -> Result<Data, Error> {
    if let Some(task) = &origin.task {
        task.validate()?;
        let summary = format!("task {:?}, {} tokens per example", task.task, task.length);
        return Ok(Data { source: Box::new(task.clone()), tokenizer: None, summary });
    }
    let documents = match &origin.text {
        Some(path) => read_text(path)?,
        None => repository_text(&std::env::current_dir().unwrap_or_default())?,
    };
    let tokenizer = tokenizer.unwrap_or_else(|| Tokenizer::Bytes(alphabet(&documents)));
    let corpus = Corpus::new(&documents, &tokenizer, options.context, options.seed)?;
    let summary = format!(
        "text {} documents, {} bytes, {} tokens to train on, {} held out",
        documents.len(),
        documents.iter().map(|document| document.bytes.len()).sum::<usize>(),
        corpus.train_stream().ids.len(),
        corpus.held_out_stream().ids.len()
    );
    Ok(Data { source: Box::new(corpus), tokenizer: Some(tokenizer), summary })
}

fn alphabet(documents: &[Document]) -> Alphabet {
    Alphabet::of(documents.iter().map(|document| document.bytes.as_slice()))
}

/// Makes the first folder in runs/ called `name`, `name-2`, ... that is not there, even if another run starts meanwhile.
fn new_folder(name: &str) -> Result<PathBuf, Error> {
    let name = name.replace(':', "to");
    let runs = Path::new(RUNS);
    std::fs::create_dir_all(runs).map_err(|source| Error::Io { path: runs.to_owned(), source })?;
    let mut folder = runs.join(&name);
    for number in 2.. {
        match std::fs::create_dir(&folder) {
            Ok(()) => break,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => folder = runs.join(format!("{name}-{number}")),
            Err(source) => return Err(Error::Io { path: folder, source }),
        }
    }
    Ok(folder)
}

/// The folder in runs/ with the newest checkpoint.
fn latest_run() -> Option<PathBuf> {
    let runs = std::fs::read_dir(RUNS).ok()?.flatten().map(|entry| entry.path());
    let newest = |run: &PathBuf| {
        let (_, checkpoint) = checkpoint::list(run).pop()?;
        checkpoint.metadata().and_then(|metadata| metadata.modified()).ok()
    };
    runs.filter_map(|run| Some((newest(&run)?, run))).max().map(|(_, run)| run)
}

impl Args {
    /// The model's name and configuration.
    fn model(&self) -> Result<(String, ModelConfig), Error> {
        if let Some(path) = &self.config {
            let name = path.file_stem().map_or_else(|| "model".into(), |stem| stem.to_string_lossy().into_owned());
            return Ok((name, ModelConfig::load(path)?));
        }
        match &self.preset {
            Some(name) => Ok((name.clone(), preset(name)?)),
            None => Ok(("default".to_owned(), preset(DEFAULT_PRESET)?)),
        }
    }

    fn tokenizer(&self) -> Result<Option<Tokenizer>, Error> {
        self.tokenizer.as_deref().map(Tokenizer::load).transpose()
    }

    fn task(&self, options: &TrainOptions) -> Option<TaskOptions> {
        let mut task = TaskOptions::new(self.task?.into(), options.context, options.seed);
        if let Some(items) = self.task_items {
            task.items = items;
        }
        if let Some(symbols) = self.task_symbols {
            task.symbols = symbols;
        }
        Some(task)
    }

    fn apply(&self, options: &mut TrainOptions) {
        fn set<T: Copy>(option: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *option = value;
            }
        }
        if self.task.is_some() {
            // Examples are short, and many are needed.
            (options.context, options.batch, options.lr) = (64, 32, 1e-3);
        }
        set(&mut options.steps, self.steps);
        set(&mut options.batch, self.batch);
        set(&mut options.context, self.context);
        set(&mut options.accumulate, self.accumulate);
        set(&mut options.lr, self.lr);
        options.warmup = self.warmup.unwrap_or(options.warmup.min(options.steps / 5));
        set(&mut options.weight_decay, self.weight_decay);
        set(&mut options.clip, self.clip);
        set(&mut options.seed, self.seed);
        set(&mut options.eval_every, self.eval_every);
        set(&mut options.eval_tokens, self.eval_tokens);
        set(&mut options.save_every, self.save_every);
    }

    /// A flag that was given and that a resumed run takes from its checkpoint instead.
    fn fixed(&self) -> Option<&'static str> {
        [
            ("text", self.text.is_some()),
            ("tokenizer", self.tokenizer.is_some()),
            ("task", self.task.is_some()),
            ("config", self.config.is_some()),
            ("preset", self.preset.is_some()),
            ("batch", self.batch.is_some()),
            ("context", self.context.is_some()),
            ("accumulate", self.accumulate.is_some()),
            ("lr", self.lr.is_some()),
            ("warmup", self.warmup.is_some()),
            ("weight-decay", self.weight_decay.is_some()),
            ("clip", self.clip.is_some()),
            ("seed", self.seed.is_some()),
            ("eval-every", self.eval_every.is_some()),
            ("save-every", self.save_every.is_some()),
        ]
        .into_iter()
        .find_map(|(name, given)| given.then_some(name))
    }
}
