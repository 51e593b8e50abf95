//! The recurrences on any GPU that CubeCL reaches: one source for CUDA, ROCm, Metal, Vulkan and WebGPU.
//!
//! The modules are those of [`thalweg_kernels`] with [`Buffer`]s in the place of slices; sizes and costs are shared. A
//! [`Client`] is a CubeCL client with [`Options`]. Runtimes are features (`cuda`, `rocm`, `metal`, `vulkan`, `webgpu`,
//! `wgpu`); without one, callers bring a client of their own. Calls are queued; [`Buffer::read`] waits. Values of gates
//! are not read back, so a positive or NaN gate is not refused.
//!
//! | module | computes |
//! |---|---|
//! | [`matrix`] | recurrences with a matrix state, every gate and write |
//! | [`elementwise_scan`], [`complex_scan`], [`rg_lru`] | recurrences with a vector state |
//! | [`attention`] | causal softmax attention |
//! | [`short_conv`] | depth-wise causal convolution with state |
//!
//! How the kernels are built is in the book: `docs/src/gpu-design.md`.
//!
//! ```no_run
//! use thalweg_gpu::elementwise_scan::{self, ScanGate, ScanInputs};
//! use thalweg_gpu::{Buffer, Client};
//! use thalweg_kernels::ScanProblem;
//!
//! let client = Client::from(cubecl::Device::default().client());
//! let (a, x) = (Buffer::from_slice(&client, &[0.5f32; 3]), Buffer::from_slice(&client, &[1.0f32; 3]));
//! let inputs = ScanInputs { gate: ScanGate::Linear(&a), x: &x, initial_state: None };
//! let out = elementwise_scan::forward(&client, &ScanProblem::new(1, 3, 1), &inputs)?; // batch, time, channels
//! assert_eq!(out.o.read::<f32>(&client)?, [1.0, 1.5, 1.75]);
//! # Ok::<(), thalweg_kernels::Error>(())
//! ```

// What is known when a kernel is compiled and what is not are two conditions.
#![allow(clippy::collapsible_if)]
// Negated comparisons and `x - x` are about NaN; a kernel indexes constant tables, over which it cannot iterate.
#![allow(clippy::neg_cmp_op_on_partial_ord, clippy::eq_op, clippy::needless_range_loop)]

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
