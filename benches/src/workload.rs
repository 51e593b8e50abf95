//! What a benchmark must be able to do: run, and show its results beside the oracle's.

use crate::{Case, Dtype, Error, Part, Pass};
use burn::tensor::Device;
use thalweg_kernels::cost::Cost;
use thalweg_reference::cases::Precision;
use thalweg_reference::tolerance::{Quantity, relative_error, tolerance};

/// A tensor of results.
pub(crate) struct Named {
    pub name: &'static str,
    pub values: Vec<f64>,
}

/// A tensor that the oracle computed, and how far off a result may be.
pub(crate) struct Expected {
    pub name: &'static str,
    pub values: Vec<f64>,
    pub allowed: f64,
}

/// The allowance of the tolerance table.
pub(crate) fn allowed(dtype: Dtype, quantity: Quantity) -> f64 {
    let precision = if dtype == Dtype::F32 { Precision::F32 } else { Precision::Bf16 };
    tolerance(precision, quantity, false)
}

/// Something that is timed.
pub(crate) trait Workload: Send {
    /// Runs once and keeps the results. A step goes on from the state of the run before.
    fn run(&mut self) -> Result<(), Error>;
    /// The results of the last run.
    fn found(&self) -> Vec<Named>;
    /// The first `len` elements of the main output.
    fn head(&self, len: usize) -> Vec<f64>;
    /// What the first run should give; the main output is the first.
    fn expected(&self) -> Result<Vec<Expected>, Error>;
    /// Work of a call.
    fn cost(&self) -> Cost;
    /// Tokens of a call.
    fn tokens(&self) -> usize;
    /// Bytes of a device's memory that are taken, if it runs on one.
    fn device_bytes(&self) -> Option<u64> {
        None
    }
    /// Calls of what is timed in a run; times are those of one.
    fn calls(&self) -> usize {
        1
    }
}

/// Makes a benchmark ready to run.
pub(crate) fn build(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    let entry = crate::catalogue().into_iter().find(|entry| entry.part == case.part && entry.name == case.name);
    let Some(entry) = entry else {
        return Err(Error::argument("name", format!("`{}` is no benchmark of {}", case.name, case.part)));
    };
    if case.shape.len() != entry.axes.len() || case.shape.contains(&0) {
        let reason = format!("{:?} is not {} sizes: {}", case.shape, entry.axes.len(), entry.axes.join(","));
        return Err(Error::argument("shape", reason));
    }
    if !entry.paths.contains(&case.path) {
        return Err(Error::argument("path", format!("`{}` cannot run {}", case.path, case.name)));
    }
    if !entry.dtypes.contains(&case.dtype) {
        return Err(Error::argument("dtype", format!("`{}` is none that {} takes", case.dtype, case.name)));
    }
    match case.part {
        Part::Ops => crate::ops::build(case, device),
        Part::Layers => Ok(Box::new(crate::layers::Layer::new(case, device)?)),
        Part::Models => Ok(Box::new(crate::models::Whole::new(case, device)?)),
    }
}

/// Compares a small run with the oracle. Returns the largest error.
pub(crate) fn verify(case: &Case, device: &Device) -> Result<f64, Error> {
    let small = case.small(2);
    let mut workload = build(&small, device)?;
    workload.run()?;
    let expected = workload.expected()?;
    let mut largest = 0.0f64;
    for found in workload.found() {
        let Some(expected) = expected.iter().find(|expected| expected.name == found.name) else {
            return Err(wrong(&small, found.name, f64::INFINITY, 0.0));
        };
        largest = largest.max(check(&small, &found.values, expected)?);
    }
    Ok(largest)
}

/// Compares the first tokens of a run at the full shape with the oracle. Returns the largest error.
pub(crate) fn verify_start(case: &Case, workload: &dyn Workload, device: &Device) -> Result<f64, Error> {
    if case.part != Part::Ops || case.pass == Pass::Step {
        return Ok(0.0);
    }
    let small = case.small(1);
    match build(&small, device)?.expected()?.first() {
        Some(expected) => check(case, &workload.head(expected.values.len()), expected),
        None => Ok(0.0),
    }
}

fn check(case: &Case, found: &[f64], expected: &Expected) -> Result<f64, Error> {
    let error = relative_error(found, &expected.values);
    if error <= expected.allowed { Ok(error) } else { Err(wrong(case, expected.name, error, expected.allowed)) }
}

fn wrong(case: &Case, tensor: &str, error: f64, allowed: f64) -> Error {
    Error::Wrong { case: case.to_string(), tensor: tensor.into(), error, allowed }
}
