//! The recurrences on any GPU that CubeCL reaches: one source for CUDA, ROCm, Metal, Vulkan and WebGPU.
// What is known when a kernel is compiled and what is not are two conditions.
#![allow(clippy::collapsible_if)]

pub mod attention;
mod buffer;
mod chunks;
mod device;
mod engine;
pub mod matrix;
mod reduce;
mod scan;
pub mod short_conv;
mod tile;
mod transfer;

pub use buffer::{Buffer, Storage, poison_outputs};
pub use cubecl::client::Client;
pub use device::wide_addresses;
pub use scan::{complex_scan, elementwise_scan, hgrn, rg_lru};
