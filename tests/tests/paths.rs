//! Every operation of the catalogue through Burn, native and portable, against the oracle: drawn shapes, packing, regimes,
//! gradients of all inputs.

use proptest::prelude::*;
use thalweg_conform::{CATALOGUE, Case, Draw, Engine, Reference, Results, Runner};
use thalweg_reference::cases::{Betas, Gates, Precision};
use thalweg_reference::tolerance::{Quantity, relative_error, tolerance};
use thalweg_tests::{config, matrix_draws};

/// How much larger than a tensor the terms are whose sum it is, where that is known: the gradient of a constant gate adds
/// up the terms `q dq` of all tokens, with either sign, to one number.
fn cancellation(case: &Case, expected: &Results, name: &str) -> f64 {
    if name != "grad.g_gamma" {
        return 1.0;
    }
    let terms: f64 = case.tensors["in.q"].values.iter().zip(&expected["grad.q"]).map(|(q, dq)| (q * dq).abs()).sum();
    let largest = expected[name].iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if largest > 0.0 { (terms / largest).max(1.0) } else { 1.0 }
}

/// Both paths give the oracle's outputs and gradients.
fn agrees(case: &Case, gates: Gates) -> Result<(), TestCaseError> {
    let expected = Reference.run(case).unwrap();
    for (path, engine) in [("native", Engine::native()), ("portable", Engine::portable())] {
        let found = engine.run(case);
        prop_assert!(found.is_ok(), "{} {}: {}", path, case.op, found.unwrap_err());
        for (name, values) in found.unwrap() {
            let quantity = if name.starts_with("grad") { Quantity::Gradient } else { Quantity::Value };
            let allowed = tolerance(Precision::F32, quantity, gates.extreme());
            let error = relative_error(&values, &expected[&name]) / cancellation(case, &expected, &name);
            prop_assert!(
                error <= allowed,
                "{} {}: {} off by {:.2e}, {:.0e} allowed",
                path,
                case.op,
                name,
                error,
                allowed
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn every_operation_equals_the_oracle(draw in matrix_draws(3), op in prop::sample::select(CATALOGUE)) {
        let mut problem = draw.problem;
        if !op.grouped {
            problem.value_heads = problem.heads;
        }
        // Other step sizes make gradients that are rounding alone; the kernels' own test knows how to weigh those.
        let (seed, gates, keys) = (draw.seed, draw.gates, draw.keys);
        let draw = Draw { problem, seed, gates, keys, betas: Betas::Uniform, initial_state: draw.initial_state };
        if let Some(case) = op.sample(&draw) {
            agrees(&case, gates)?;
        }
    }
}

/// A new row without a sample is not tested above: each such row is one that another covers, or that only the oracle has.
#[test]
fn every_operation_has_a_sample() {
    let without: Vec<_> = CATALOGUE.iter().filter(|op| op.implemented && !op.has_sample()).map(|op| op.name).collect();
    assert_eq!(without, ["rwkv7"], "`rwkv7` is `dplr` with other names");
}
