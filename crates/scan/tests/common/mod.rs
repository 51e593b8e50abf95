//! Devices, random inputs and comparisons shared by the tests.
#![allow(dead_code)]

use std::cell::RefCell;

use burn::Tensor;
use burn::tensor::{DType, Device, Gradients, TensorData};
use thalweg_scan::Path;

thread_local! {
    static DEVICE: RefCell<Device> = RefCell::new(Device::flex());
}

/// The device of the running test, with autodiff.
pub fn device() -> Device {
    DEVICE.with_borrow(|device| device.clone().autodiff())
}

/// Whether that is a GPU.
pub fn is_gpu() -> bool {
    device().inner() != Device::flex()
}

/// Whether it computes with an element type. WGSL counts f64 among its own and gets it wrong.
pub fn computes(dtype: DType) -> bool {
    device().supports_dtype(dtype) && !(dtype == DType::F64 && is_gpu())
}

/// The paths to compare: on a GPU the portable one is Burn's own operations, which run only where there is no kernel. A
/// software driver compiles each of their matrix products for half a minute.
pub fn paths() -> &'static [Path] {
    if is_gpu() { &[Path::Auto] } else { &[Path::Auto, Path::Portable] }
}

/// Runs a test on the first GPU, if there is one.
#[cfg(feature = "cube")]
pub fn on_gpu(test: fn()) {
    let gpu = thalweg_scan::gpus().into_iter().next();
    if let Some(gpu) = thalweg_reference::device::or_skip(gpu) {
        DEVICE.set(gpu);
        test();
    }
}

/// Makes tests of functions: one on the CPU, and one on a GPU in builds that have a backend for it.
macro_rules! on_each_device {
    ($($test:ident),+ $(,)?) => {
        mod cpu {
            $(
                #[test]
                fn $test() {
                    super::$test();
                }
            )+
        }

        #[cfg(feature = "cube")]
        mod gpu {
            $(
                #[test]
                fn $test() {
                    super::on_gpu(super::$test);
                }
            )+
        }
    };
}

/// A small deterministic generator: the tests must fail the same way twice.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Uniform in `[low, high)`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        low + (high - low) * (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A tensor of a leaf that wants gradients.
    pub fn tensor<const D: usize>(&mut self, shape: [usize; D], low: f64, high: f64, dtype: DType) -> Tensor<D> {
        let values: Vec<f64> = (0..shape.iter().product()).map(|_| self.uniform(low, high)).collect();
        leaf(values, shape, dtype)
    }

    /// Log decays of one regime: zero, ordinary, strong, or all of them mixed.
    pub fn gates<const D: usize>(&mut self, shape: [usize; D], regime: Gates, dtype: DType) -> Tensor<D> {
        let values: Vec<f64> = (0..shape.iter().product())
            .map(|_| match regime {
                Gates::Zero => 0.0,
                Gates::Ordinary => self.uniform(-0.3, 0.0),
                Gates::Strong => self.uniform(-12.0, -4.0),
                Gates::Mixed => match self.uniform(0.0, 8.0) as usize {
                    0 => 0.0,
                    1 => -80.0,
                    2 => -1e4,
                    3 => self.uniform(-8.0, 0.0),
                    _ => self.uniform(-0.1, 0.0),
                },
            })
            .collect();
        leaf(values, shape, dtype)
    }
}

#[derive(Debug, Clone, Copy)]
pub enum Gates {
    Zero,
    Ordinary,
    Strong,
    Mixed,
}

pub fn leaf<const D: usize>(values: Vec<f64>, shape: [usize; D], dtype: DType) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (&device(), dtype)).require_grad()
}

/// A copy that shares nothing with the graph of `x`.
pub fn fresh<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    x.clone().detach().require_grad()
}

pub fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.clone().try_into_vec_as::<f64>().expect("f64 data")
}

pub fn gradient<const D: usize>(x: &Tensor<D>, gradients: &Gradients) -> Vec<f64> {
    let gradient = x.grad(gradients).expect("a gradient");
    gradient.try_into_vec_as::<f64>().expect("f64 data")
}

/// Largest difference over the largest magnitude.
#[track_caller]
pub fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let size = expected.iter().fold(0f64, |m, x| m.max(x.abs())).max(1e-30);
    let worst = found.iter().zip(expected).fold(0f64, |m, (f, e)| {
        let d = (f - e).abs();
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    });
    assert!(worst <= tolerance * size, "{what}: off by {:e} of {size:e}, allowed {tolerance:e}", worst / size);
}
