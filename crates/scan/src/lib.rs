//! Burn operations over the linear-recurrence kernels.
//!
//! Every operation takes Burn tensors laid out `[batch, time, heads, feature]`, an optional initial
//! state and optional bounds of packed sequences, and returns its outputs and the final state; all of
//! them are differentiable through Burn's autodiff, the states included. Gates are natural logs of
//! decays, at most 0. On the Flex backend the native kernels of [`kernels`] run, on the CubeCL backends (features
//! `cuda`, `rocm`, `metal`, `vulkan`, `webgpu`, `wgpu`) the GPU kernels; what a backend has no kernel for is the
//! chunked algorithm in Burn tensor operations ([`Path`] chooses). [`device`] finds a device by its name.

mod binding;
mod check;
mod device;
mod error;
mod op;
mod options;
mod portable;

pub use device::{DeviceError, device, gpus};
pub use error::Error;
pub use op::*;
pub use options::{
    AttentionOptions, ComplexScanOptions, MatrixOptions, Path, ScanOptions, ShortConvOptions, StepOptions,
};
pub use thalweg_kernels as kernels;
