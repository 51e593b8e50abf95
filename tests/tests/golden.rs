//! Golden cases of independent packages through the paths that users run.

use std::path::Path;
use thalweg_conform::{CATALOGUE, Case, Engine, Runner, check, load};

/// What `thalweg conform` allows by default.
const TOLERANCE: f64 = 1e-4;

/// Golden cases of the operations that are implemented.
fn cases() -> Vec<Case> {
    let found = load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")).unwrap();
    let cases = found.cases.into_iter().map(|(_, case)| case.unwrap());
    cases.filter(|case| case.operation().unwrap().implemented).collect()
}

fn passes(engine: &Engine) {
    let failures: Vec<_> = cases().iter().map(|case| check(engine, case)).filter(|r| !r.passes(TOLERANCE)).collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn native_path_agrees_with_every_golden_case() {
    passes(&Engine::native());
}

#[test]
fn portable_path_agrees_with_every_golden_case() {
    passes(&Engine::portable());
}

/// A native path that quietly fell back to the portable one would pass the tests above; its bits give it away.
#[test]
fn native_path_is_not_the_portable_one() {
    let [native, portable] = [Engine::native(), Engine::portable()];
    let fell_back: Vec<_> = cases()
        .iter()
        .filter(|case| native.run(case).unwrap() == portable.run(case).unwrap())
        .map(|case| case.name.clone())
        .collect();
    assert!(fell_back.is_empty(), "same bits on both paths: {fell_back:?}");
}

/// Nothing that is implemented goes without golden results.
#[test]
fn every_operation_has_a_golden_case() {
    let known: Vec<_> = cases().iter().map(|case| case.operation().unwrap().name).collect();
    let missing: Vec<_> =
        CATALOGUE.iter().filter(|op| op.implemented && !known.contains(&op.name)).map(|op| op.name).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
