//! The recurrences on any GPU that CubeCL reaches: one source for CUDA, ROCm, Metal, Vulkan and WebGPU.
// What is known when a kernel is compiled and what is not are two conditions.
#![allow(clippy::collapsible_if)]

pub mod attention;
mod buffer;
mod chunks;
mod client;
mod device;
mod engine;
pub mod matrix;
mod reduce;
mod scan;
pub mod short_conv;
mod tile;
mod transfer;

pub use buffer::{Buffer, Storage};
pub use client::{Client, Options};
pub use scan::{complex_scan, elementwise_scan, rg_lru};
