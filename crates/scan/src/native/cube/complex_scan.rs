//! The complex recurrence: slots to the kernel's structs. Outputs are the two planes, one after the other.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::Shape;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::{into_contiguous, slice};
use burn_cubecl::tensor::CubeTensor;
use thalweg_kernels::complex_scan::Complex;
use thalweg_kernels::gpu::Buffer;
use thalweg_kernels::gpu::complex_scan::{self, ComplexGradients, ComplexInputs, ComplexOutputs};
use thalweg_kernels::{Error, ScanProblem};

use super::{Buffers, buffer, required, tensor};

fn inputs(x: &Buffers) -> ComplexInputs<'_> {
    ComplexInputs {
        log_a: required(x, 0),
        theta: required(x, 1),
        b: Complex { re: required(x, 2), im: required(x, 3) },
        initial_state: match (&x[4], &x[5]) {
            (Some(re), Some(im)) => Some(Complex { re, im }),
            _ => None,
        },
    }
}

/// Two planes behind each other, as one buffer.
fn join(like: &CubeTensor, planes: Complex<Buffer>) -> Buffer {
    let planes = [planes.re, planes.im].map(|plane| tensor(like, &plane, Shape::new([plane.len])));
    buffer(&CubeBackend::float_cat(planes.into(), 0))
}

/// The planes of a buffer made by [`join`].
fn planes(like: &CubeTensor, joined: &Buffer) -> Complex<Buffer> {
    let all = tensor(like, joined, Shape::new([joined.len]));
    let half = all.shape().num_elements() / 2;
    let [re, im] = [0..half, half..2 * half].map(|part| buffer(&into_contiguous(slice(all.clone(), &[part]))));
    Complex { re, im }
}

pub(super) fn forward(like: &CubeTensor, problem: &ScanProblem, x: &Buffers) -> Result<[Buffer; 2], Error> {
    let ComplexOutputs { o, final_state } = complex_scan::forward(&like.client, problem, &inputs(x))?;
    Ok([o, final_state].map(|x| join(like, x)))
}

pub(super) fn backward(
    like: &CubeTensor,
    problem: &ScanProblem,
    x: &Buffers,
    o: &Buffer,
    d_o: &Buffer,
    d_final_state: &Buffer,
) -> Result<Buffers, Error> {
    let split = [o, d_o, d_final_state].map(|x| planes(like, x));
    let [o, d_o, d_final_state] = split.each_ref().map(|x| Complex { re: &x.re, im: &x.im });
    let ComplexGradients { dlog_a, dtheta, db, d_initial_state: d_h } =
        complex_scan::backward(&like.client, problem, &inputs(x), o, d_o, Some(d_final_state))?;
    Ok([Some(dlog_a), Some(dtheta), Some(db.re), Some(db.im), Some(d_h.re), Some(d_h.im), None])
}
