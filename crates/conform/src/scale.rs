//! What an error is measured against.

use crate::{Case, Tensor};

/// Digits that the terms of a gradient may lose against each other before its error is measured against the terms.
const SHARE: f64 = 1.0 / 16.0;

/// A magnitude that is rounding of f64 where the terms have magnitude 1.
const ROUNDING: f64 = 1e-12;

/// The magnitude that a difference from tensor `name` of `case` is divided by: the tensor's largest one, but at least a
/// sixteenth of the terms whose difference it is; 1 if all of that is 0. The rule is told in `docs/src/conform.md`.
pub(crate) fn scale(case: &Case, name: &str, golden: &Tensor) -> f64 {
    let own = largest(&golden.values);
    let floor = name.strip_prefix("grad.").and_then(|input| floor(case, input, own));
    let scale = own.max(floor.unwrap_or(0.0));
    if scale > 0.0 { scale } else { 1.0 }
}

/// The least scale of the gradient of `input`, if it is a difference of terms that are larger than what is left.
fn floor(case: &Case, input: &str, own: f64) -> Option<f64> {
    let problem = (case.operation().ok()?.parse)(case).ok()?;
    let terms = match (problem.cancelling_terms(case, input), input) {
        (Some(terms), _) => terms,
        // d g = q . dq - k . dk, summed to the end: a natural form, but others keep small gradients exact.
        (None, "g" | "g_gamma" | "w" | "log_a" | "theta") => {
            Some(loss_terms(case, "")).filter(|terms| own <= ROUNDING * terms)?
        }
        _ => return None,
    };
    Some(SHARE * terms).filter(|floor| floor.is_finite())
}

/// The largest part of the loss in one row of the outputs whose names begin with `prefix`, all its terms taken with the
/// same sign; 0 if the file does not have them.
pub(crate) fn loss_terms(case: &Case, prefix: &str) -> f64 {
    let rows = case.tensors.iter().filter_map(|(name, output)| {
        let cotangent = case.cotangent(name.strip_prefix("out.").filter(|name| name.starts_with(prefix))?)?;
        let terms: Vec<f64> = output.values.iter().zip(&cotangent.values).map(|(o, d)| (o * d).abs()).collect();
        Some(longest(&Tensor { shape: output.shape.clone(), values: terms }))
    });
    rows.fold(0.0, f64::max)
}

pub(crate) fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()))
}

/// The largest sum of magnitudes of a row.
pub(crate) fn longest(tensor: &Tensor) -> f64 {
    let width = tensor.shape.last().map_or(1, |&width| width.max(1));
    tensor.values.chunks(width).map(|row| row.iter().map(|x| x.abs()).sum()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_tensors_are_measured_against_themselves() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
        for (_, case) in crate::load(&folder).unwrap().cases {
            let case = case.unwrap();
            for (name, tensor) in &case.tensors {
                let own = largest(&tensor.values);
                assert!(own == 0.0 || scale(&case, name, tensor) == own, "{name} of {}", case.name);
            }
        }
    }
}
