//! The `thalweg` command.
//!
//! Exit codes: 0 all is well; 1 a check that the user asked for failed; 2 the arguments or the data cannot be worked
//! with, told in one line on stderr.

/// Prints a line. Whoever reads it may go away, as `head` does: what is computed goes on, and to files.
macro_rules! say {
    ($($arguments:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arguments)*);
    }};
}

mod bench;
mod conform;
mod dashboard;
mod generate;
mod memory;
mod plot;
mod train;

use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::any::TypeId;
use std::process::ExitCode;
use std::str::FromStr;

/// What a subcommand hands back: its exit code, or an error that becomes one line on stderr and exit code 2.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

/// Train, run and check sequence models built on linear recurrences.
#[derive(Parser)]
#[command(name = "thalweg", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(train::Args),
    Generate(generate::Args),
    Bench(bench::Args),
    Conform(conform::Args),
}

fn main() -> ExitCode {
    memory::keep();
    let command = Cli::command().mut_subcommands(|command| command.mut_args(numbers));
    let cli = match command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            let _ = error.print(); // --help and --version
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&usage(&error)),
    };
    run(cli.command).unwrap_or_else(|error| fail(&error.to_string()))
}

/// Lets a value begin with a minus, so that a number out of range is told by its option and not taken for a flag.
fn numbers(arg: Arg) -> Arg {
    if !arg.get_action().takes_values() {
        return arg;
    }
    let kind = arg.get_value_parser().type_id();
    let is = |id: TypeId| kind == id;
    if is(TypeId::of::<usize>()) {
        arg.value_parser(whole::<usize>).allow_hyphen_values(true)
    } else if is(TypeId::of::<u64>()) {
        arg.value_parser(whole::<u64>).allow_hyphen_values(true)
    } else if is(TypeId::of::<f64>()) || is(TypeId::of::<f32>()) {
        arg.allow_hyphen_values(true) // -inf, too
    } else {
        arg
    }
}

fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {}", u64::MAX))
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Train(args) => train::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Conform(args) => conform::run(&args),
    }
}

/// Where to compute.
#[derive(Debug, clap::Args)]
struct DeviceArgs {
    /// Where to compute: cpu, gpu, cuda, rocm, metal, vulkan, webgpu or wgpu; `gpu:1` is the second GPU. A build has the
    /// backends of its features.
    #[arg(long, default_value = "cpu")]
    device: String,
}

impl DeviceArgs {
    fn find(&self) -> Result<burn::tensor::Device, String> {
        thalweg_scan::device(&self.device).map_err(|error| format!("device: {error}"))
    }
}

/// The message of a usage error on one line: clap puts names of missing arguments on lines of their own.
fn usage(error: &clap::Error) -> String {
    use clap::error::ErrorKind;
    if matches!(error.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand) {
        return "which subcommand? `thalweg --help` lists them".into();
    }
    let text = error.to_string();
    let message: Vec<_> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    message.join(" ").trim_start_matches("error: ").to_string()
}

/// Says on stderr what the user should know and nothing stops for.
fn tell(notes: &[String]) {
    for note in notes {
        eprintln!("thalweg: {note}");
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("thalweg: {}", message.replace('\n', "; "));
    ExitCode::from(2)
}
