//! Golden cases of independent packages through the paths that users run.

use std::path::Path;
use thalweg_conform::{Case, Engine, Runner, check, load};

/// Operations whose cases are here but that the engine does not have yet.
const LATER: [&str; 4] = ["rwkv6", "rwkv7", "selective_scan", "ssd"];

/// What `thalweg conform` allows by default.
const TOLERANCE: f64 = 1e-4;

fn cases() -> Vec<Case> {
    let found = load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")).unwrap();
    let cases = found.cases.into_iter().map(|(_, case)| case.unwrap());
    cases.filter(|case| !LATER.contains(&case.op.as_str())).collect()
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
