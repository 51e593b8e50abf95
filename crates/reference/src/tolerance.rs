//! The table of tolerances that implementations have against the oracle.

use crate::cases::Precision;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// An output or a state.
    Value,
    /// A gradient.
    Gradient,
}

/// The largest [`relative_error`] that an implementation with `precision` input and output may have.
///
/// | in and out | value | value, extreme gates | gradient |
/// |---|---|---|---|
/// | f32 | 1e-5 | 1e-4 | 1e-4 |
/// | bf16 | 2^-7 | 2^-7 | 2^-6 |
///
/// f32 is the engine's promise. bf16 rounds once at the exit (2^-9 of the largest element), and products inside of a
/// chunk may take bf16 operands once more on each side; gradients pass through twice as many of them.
pub fn tolerance(precision: Precision, quantity: Quantity, extreme_gates: bool) -> f64 {
    match (precision, quantity, extreme_gates) {
        (Precision::F32, Quantity::Value, false) => 1e-5,
        (Precision::F32, Quantity::Value, true) | (Precision::F32, Quantity::Gradient, _) => 1e-4,
        (Precision::Bf16, Quantity::Value, _) => 2f64.powi(-7),
        (Precision::Bf16, Quantity::Gradient, _) => 2f64.powi(-6),
    }
}

/// Differences below this are f32 underflow (`e^-88` times a state of some hundreds), not error.
const UNDERFLOW: f64 = 1e-35;

/// Largest absolute difference over the largest magnitude of `expected`; the absolute difference itself where that
/// magnitude is 0. NaN anywhere, or lengths that differ, give infinity.
pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    largest_difference(found, expected) / if largest > 0.0 { largest } else { 1.0 }
}

/// Largest absolute difference. NaN anywhere, or lengths that differ, give infinity.
pub fn largest_difference(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let mut difference = 0.0f64;
    for (x, y) in found.iter().zip(expected) {
        let d = (x - y).abs();
        if d.is_nan() {
            return f64::INFINITY;
        }
        if d > UNDERFLOW {
            difference = difference.max(d);
        }
    }
    difference
}

/// [`relative_error`] of f32 results.
pub fn relative_error_f32(found: &[f32], expected: &[f64]) -> f64 {
    let found: Vec<_> = found.iter().map(|&x| f64::from(x)).collect();
    relative_error(&found, expected)
}

/// Fails with the tensor's name and the error unless `found` is within the table of `expected`.
#[track_caller]
pub fn assert_close(
    name: &str,
    found: &[f32],
    expected: &[f64],
    precision: Precision,
    quantity: Quantity,
    extreme_gates: bool,
) {
    let (error, allowed) = (relative_error_f32(found, expected), tolerance(precision, quantity, extreme_gates));
    assert!(error <= allowed, "{name}: relative error {error:.2e} above {allowed:.0e}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_lengths_never_pass() {
        assert_eq!(relative_error(&[1.5, 2.0], &[1.0, 2.0]), 0.25);
        assert_eq!(relative_error(&[1e-3], &[0.0]), 1e-3);
        assert_eq!(relative_error(&[f64::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(relative_error(&[1.0], &[f64::NAN]), f64::INFINITY);
        assert_eq!(relative_error(&[], &[1.0]), f64::INFINITY);
    }
}
