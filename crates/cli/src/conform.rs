//! `thalweg conform`: golden cases through a chosen path.

use crate::{DeviceArgs, Outcome};
use burn::tensor::Device;
use clap::ValueEnum;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use thalweg_conform::{CaseReport, Engine, Error, Reference, Runner, check, load};

/// Compares forward and gradients of every reference case under a folder with those of a path.
///
/// Cases are safetensors files with `op` in their metadata. Prints one line per case with the largest relative error
/// (largest absolute difference over the tensor's largest magnitude, or over that of the terms that cancel in a
/// gradient) and the tensor where it is, then a summary. The exit code is 1 if a case fails. A case whose operation the
/// path does not have fails too, unless `--allow-missing` counts it apart.
#[derive(clap::Args)]
pub struct Args {
    /// Folder of cases, or one that has them under `ops/`.
    dir: PathBuf,
    /// Implementation to run.
    #[arg(long, value_enum, default_value_t = Path::Native)]
    path: Path,
    #[command(flatten)]
    device: DeviceArgs,
    /// Largest relative error that passes.
    #[arg(long, default_value_t = 1e-4, value_parser = tolerance)]
    tolerance: f64,
    /// Count operations that only the oracle has so far apart from failures.
    #[arg(long)]
    allow_missing: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Path {
    /// Kernels, where the device has them.
    Native,
    /// Burn tensor operations.
    Portable,
    /// The f64 oracle.
    Reference,
}

impl Path {
    fn runner(self, device: Device) -> Box<dyn Runner> {
        match self {
            Path::Native => Box::new(Engine::native().on(device)),
            Path::Portable => Box::new(Engine::portable().on(device)),
            Path::Reference => Box::new(Reference),
        }
    }
}

fn tolerance(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected a number that is not negative, such as 1e-4".into())
}

/// Runs every case of the folder.
pub fn run(args: &Args) -> Outcome {
    let found = load(&args.dir)?;
    let runner = args.path.runner(args.device.find()?);
    let (total, mut passed, mut missing, mut largest) = (found.cases.len(), 0, 0, 0.0f64);
    let mut out = io::stdout().lock();
    for (name, case) in found.cases {
        let report = match case {
            Ok(case) => check(runner.as_ref(), &case),
            Err(error) => CaseReport { name, tensors: Err(error) },
        };
        passed += usize::from(report.passes(args.tolerance));
        missing += usize::from(args.allow_missing && matches!(report.tensors, Err(Error::NotImplemented { .. })));
        largest = report.worst().map_or(largest, |worst| largest.max(worst.error));
        line(&mut out, &report, args.tolerance)?;
    }
    let path = args.path.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default();
    let failed = total - passed - missing;
    let missing = if missing > 0 { format!(", {missing} not implemented") } else { String::new() };
    let others = match found.others.len() {
        0 => String::new(),
        n => format!(", {n} files without `op` skipped"),
    };
    writeln!(
        out,
        "{path}: {passed} of {total} cases passed, {failed} failed{missing}; largest relative error {largest:.2e}, tolerance {:.1e}{others}",
        args.tolerance
    )?;
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn line(out: &mut impl Write, report: &CaseReport, tolerance: f64) -> io::Result<()> {
    let name = &report.name;
    match (&report.tensors, report.worst()) {
        (Ok(_), Some(worst)) => {
            let verdict = if report.passes(tolerance) { "ok" } else { "FAILED" };
            writeln!(out, "{name:<36} {verdict:<6} {:.2e} at {}", worst.error, worst.tensor)
        }
        (Ok(_), None) => writeln!(out, "{name:<36} FAILED nothing to compare"),
        (Err(error @ Error::NotImplemented { .. }), _) => writeln!(out, "{name:<36} NOT RUN {error}"),
        (Err(error), _) => writeln!(out, "{name:<36} FAILED {}", error.to_string().replace('\n', "; ")),
    }
}
