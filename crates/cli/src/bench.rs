//! `thalweg bench`: verified times of operations, layers and models.

use crate::{DeviceArgs, Outcome};
use burn::tensor::Device;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use thalweg_bench::{Dtype, Effort, Error, Machine, Part, Pass, Path, Report, Row, Runner, Selection, plot, serve};

/// Times operations, layers and models, each compared with the f64 oracle first.
///
/// One line per benchmark: median, fastest sample and interquartile range in milliseconds, GFLOP/s and GB/s, the fraction
/// of the measured ceiling that binds (matrix products in cache, or copies), tokens per second, largest error. A
/// benchmark whose results are wrong is not timed, and the exit code is 1. Lists are separated by commas.
#[derive(clap::Args)]
pub struct Args {
    /// What to run: `ops`, `layers`, `models`; all of them if absent. `serve` answers JSON requests on standard input.
    part: Option<String>,
    /// Only benchmarks whose `part/name/pass` contains one of these, such as `gla/forward`.
    #[arg(long, value_delimiter = ',')]
    filter: Vec<String>,
    /// Sizes in place of the default shapes: `batch,time,heads,key_dim,value_dim`, `batch,time,channels`, ...
    #[arg(long, value_delimiter = ',')]
    shape: Vec<usize>,
    /// Sequence lengths in place of those of the shapes.
    #[arg(long, value_delimiter = ',')]
    time: Vec<usize>,
    /// Features per head in place of those of the shapes.
    #[arg(long, value_delimiter = ',')]
    head_dim: Vec<usize>,
    /// Tokens per chunk.
    #[arg(long, value_delimiter = ',')]
    chunk: Vec<usize>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Numbers of threads; all processors if absent.
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// Element types: `f32`, `bf16`.
    #[arg(long, value_delimiter = ',')]
    dtype: Vec<String>,
    /// Ways to call: `native` (kernels on slices), `burn` (tensors, the same kernels), `portable` (tensor operations), `gpu`
    /// (kernels of matrix recurrences on the first GPU, without Burn).
    #[arg(long, value_delimiter = ',')]
    path: Vec<String>,
    /// Passes: `forward`, `forward+backward`, `step`.
    #[arg(long, value_delimiter = ',')]
    pass: Vec<String>,
    /// Few repetitions: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Writes the report to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Holds the results against an earlier report and marks what changed by more than the spread.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// Draws time, time per token and memory against sequence length, and the roofline, as SVG in this folder.
    #[arg(long)]
    plot: Option<PathBuf>,
}

fn parse<T: FromStr<Err = Error>>(names: &[String]) -> Result<Vec<T>, Error> {
    names.iter().map(|name| name.parse()).collect()
}

/// Runs what the arguments choose.
pub fn run(args: &Args) -> Outcome {
    let effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    if args.threads.contains(&0) {
        return Err("`threads` has a 0, expected at least 1".into());
    }
    let device = args.device.find()?;
    let runner = |threads| match Runner::new(threads, effort) {
        Ok(runner) if device != Device::flex() => runner.on(device.clone(), &args.device.device),
        other => other,
    };
    let threads = if args.threads.is_empty() { vec![0] } else { args.threads.clone() };
    if args.part.as_deref() == Some("serve") {
        let runner = runner(threads[0])?;
        serve(&runner, io::stdin().lock(), io::stdout().lock())?;
        return Ok(ExitCode::SUCCESS);
    }
    let selection = Selection {
        parts: args.part.iter().map(|part| part.parse()).collect::<Result<Vec<Part>, _>>()?,
        filter: args.filter.clone(),
        shape: args.shape.clone(),
        time: args.time.clone(),
        head_dim: args.head_dim.clone(),
        chunk: args.chunk.clone(),
        dtype: parse::<Dtype>(&args.dtype)?,
        path: match parse::<Path>(&args.path)? {
            // Slices are the default where there are any.
            paths if paths.is_empty() && device != Device::flex() => vec![Path::Burn],
            paths => paths,
        },
        pass: parse::<Pass>(&args.pass)?,
    };
    let cases = selection.cases()?;
    let earlier = args.compare.as_deref().map(Report::load).transpose()?;
    writable(args)?;

    let mut report = Report::new();
    describe(&report.machine, earlier.as_ref());
    let mut wrong = 0;
    for threads in threads {
        let runner = runner(threads)?;
        for case in &cases {
            let ceilings = runner.ceilings(case)?;
            if !report.ceilings.contains(ceilings) {
                say!("{ceilings}\n{}", Row::heading());
                report.ceilings.push(ceilings.clone());
            }
            match runner.run(case) {
                Ok(row) => {
                    let change = earlier.as_ref().map(|earlier| format!("  {}", Report::change(&row, earlier)));
                    say!("{row}{}", change.unwrap_or_default());
                    report.rows.push(row);
                }
                Err(error @ Error::Wrong { .. }) => {
                    say!("{case}: NOT TIMED: {error}");
                    wrong += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    if let Some(path) = &args.json {
        report.save(path)?;
    }
    if let Some(folder) = &args.plot {
        for file in plot::draw(&report, folder)? {
            say!("{}", file.display());
        }
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Finds out before the measurements whether their results can be kept.
fn writable(args: &Args) -> Result<(), Error> {
    let file = |path: &std::path::Path| {
        let error = |source| Error::File { path: path.into(), source };
        std::fs::OpenOptions::new().append(true).create(true).open(path).map(drop).map_err(error)
    };
    args.json.as_deref().map(file).transpose()?;
    if let Some(folder) = &args.plot {
        std::fs::create_dir_all(folder).map_err(|source| Error::File { path: folder.clone(), source })?;
    }
    Ok(())
}

fn describe(machine: &Machine, earlier: Option<&Report>) {
    let or = |text: &str, other: &str| if text.is_empty() { other.to_string() } else { text.to_string() };
    let line = |machine: &Machine| -> String {
        let Machine { cpu, target, processors, features, vector_unit, version, commit } = machine;
        let features = or(&features.join(" "), "no vector features");
        let commit = or(commit, "unknown commit");
        let used = if vector_unit.is_empty() { String::new() } else { format!(", kernels use {vector_unit}") };
        format!("thalweg {version} ({commit}); {cpu}, {processors} processors, {target}, {features}{used}")
    };
    say!("{}", line(machine));
    if let Some(earlier) = earlier {
        say!("compared with {}", line(&earlier.machine));
    }
}
