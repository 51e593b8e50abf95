//! A runner's results against a case's golden tensors.

use crate::scale::scale;
use crate::{Case, Error, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind};
use thalweg_reference::tolerance::largest_difference;

/// How far one tensor is from the golden one.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorError {
    /// Its name in the file.
    pub tensor: String,
    /// Largest absolute difference over the golden tensor's largest magnitude, or, for a gradient whose terms cancel, over
    /// a sixteenth of theirs if that is more (over 1 if all of that is 0); infinite for NaN.
    pub error: f64,
}

/// What came of one case.
#[derive(Debug)]
pub struct CaseReport {
    /// The case's name.
    pub name: String,
    /// Every golden tensor's error, largest first, or why there is none.
    pub tensors: Result<Vec<TensorError>, Error>,
}

impl CaseReport {
    /// The tensor that is furthest off; `None` if the case did not run.
    pub fn worst(&self) -> Option<&TensorError> {
        self.tensors.as_ref().ok().and_then(|tensors| tensors.first())
    }

    /// Whether every tensor is within `tolerance`.
    pub fn passes(&self, tolerance: f64) -> bool {
        self.worst().is_some_and(|worst| worst.error <= tolerance)
    }
}

/// Runs `case` and compares every `out.X` and `grad.X` that its file has. A panic of the implementation is reported as
/// this case's error.
pub fn check(runner: &dyn Runner, case: &Case) -> CaseReport {
    let run = catch_unwind(AssertUnwindSafe(|| runner.run(case))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(Error::Engine(format!("panicked: {}", text.unwrap_or("no message"))))
    });
    let tensors = run.and_then(|results| {
        let golden = case.tensors.iter().filter(|(name, _)| name.starts_with("out.") || name.starts_with("grad."));
        let mut errors = Vec::new();
        for (name, tensor) in golden {
            let found = results.get(name).ok_or_else(|| Error::Engine(format!("gave no `{name}`")))?;
            let error = largest_difference(found, &tensor.values) / scale(case, name, tensor);
            errors.push(TensorError { tensor: name.clone(), error });
        }
        errors.sort_by(|a, b| b.error.total_cmp(&a.error));
        match errors.is_empty() {
            true => Err(Error::Missing { tensor: "out.o".into() }),
            false => Ok(errors),
        }
    });
    CaseReport { name: case.name.clone(), tensors }
}
