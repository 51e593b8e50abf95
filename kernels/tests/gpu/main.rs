//! The GPU kernels against the f64 oracle, on whatever device the machine has; on a machine without a GPU, Mesa's
//! software Vulkan driver will do.
#![cfg(any(feature = "wgpu", feature = "cuda", feature = "rocm"))]

mod matrix;
mod scan;

use std::io::Write as _;
use thalweg_kernels::gpu::{self, Client};

/// The default device. Without one, says on the terminal that the test did not run, or fails if
/// `THALWEG_REQUIRE_GPU` is set. Outputs are NaN until a kernel writes them.
fn client() -> Option<Client> {
    gpu::poison_outputs();
    let client = (!cubecl::Device::enumerate_all().is_empty()).then(|| cubecl::Device::default().client());
    if client.is_none() {
        assert!(
            std::env::var_os("THALWEG_REQUIRE_GPU").is_none(),
            "no GPU and no driver, but THALWEG_REQUIRE_GPU is set"
        );
        // Not `println!`: the test runner would swallow it.
        let name = std::thread::current().name().unwrap_or("a GPU test").to_string();
        let _ = writeln!(std::io::stderr(), "NOT RUN, no GPU and no driver: {name}");
    }
    client
}
