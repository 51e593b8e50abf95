//! The GPU kernels against the f64 oracle, on whatever device the machine has; on a machine without a GPU, Mesa's
//! software Vulkan driver will do.
#![cfg(any(feature = "wgpu", feature = "cuda", feature = "rocm"))]

mod attention;
mod attention_check;
mod matrix;
mod matrix_check;
mod nonfinite;
mod scan;
mod scan_extremes;
mod short_conv;
mod smoke;

use thalweg_gpu::Client;

/// The default device, if there is one. Outputs are NaN until a kernel writes them.
fn client() -> Option<Client> {
    let client = (!cubecl::Device::enumerate_all().is_empty()).then(|| cubecl::Device::default().client());
    thalweg_reference::device::or_skip(client).map(|client| Client::from(client).with_poisoned_outputs())
}
