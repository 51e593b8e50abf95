//! The oracle against results of independent packages.

use std::path::Path;
use thalweg_conform::{Reference, check, load};

/// The golden files hold f64 results rounded to f32.
const TOLERANCE: f64 = 1e-6;

#[test]
fn the_oracle_agrees_with_every_golden_case() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let found = load(&folder).unwrap();
    assert!(found.cases.len() >= 60, "only {} cases", found.cases.len());
    for (_, case) in found.cases {
        let case = case.unwrap();
        let report = check(&Reference, &case);
        assert!(report.passes(TOLERANCE), "{}: {:?}", report.name, report.tensors);
    }
}
