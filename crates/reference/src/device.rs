//! What a test does on a machine that lacks its device.

use std::io::Write as _;

/// The device, or nothing after saying on the terminal that the running test is skipped. With `THALWEG_REQUIRE_GPU` set
/// that is a failure.
///
/// # Panics
/// Without a device, if `THALWEG_REQUIRE_GPU` is set.
pub fn or_skip<T>(found: Option<T>) -> Option<T> {
    if found.is_none() {
        let name = std::thread::current().name().unwrap_or("a GPU test").to_string();
        assert!(std::env::var_os("THALWEG_REQUIRE_GPU").is_none(), "{name}: THALWEG_REQUIRE_GPU is set, but no GPU");
        // Not `eprintln!`: the test runner would swallow it.
        let _ = writeln!(std::io::stderr(), "NOT RUN, no GPU and no driver: {name}");
    }
    found
}
