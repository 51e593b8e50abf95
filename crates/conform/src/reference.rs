//! The f64 oracle as a runner.

use crate::{Case, Error, Results, Runner};

/// Runs cases through `thalweg-reference`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

impl Runner for Reference {
    fn run(&self, case: &Case) -> Result<Results, Error> {
        Ok((case.operation()?.parse)(case)?.reference(case))
    }
}
