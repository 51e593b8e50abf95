//! The complex recurrence: slots to the kernel's structs. Outputs are the two planes, one after the other.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use thalweg_kernels::complex_scan::{self, Complex, ComplexGradients, ComplexInputs, ComplexOutputs};
use thalweg_kernels::{Error, ScanProblem};

use super::{Number, Operands, gradient, optional, required, slice, tensor};
use crate::native::backend::Forward;

fn inputs<E: Number>(operands: &Operands) -> ComplexInputs<'_, E> {
    ComplexInputs {
        log_a: required(operands, 0),
        theta: required(operands, 1),
        b: Complex { re: required(operands, 2), im: required(operands, 3) },
        initial_state: match (optional(operands, 4), optional(operands, 5)) {
            (Some(re), Some(im)) => Some(Complex { re, im }),
            _ => None,
        },
    }
}

/// Two planes behind each other, as one tensor.
fn join<E: Number>(planes: Complex<Vec<E>>, shape: [usize; 4]) -> FlexTensor {
    let Complex { mut re, im } = planes;
    re.extend_from_slice(&im);
    tensor(re, shape)
}

/// The planes of a tensor made by [`join`].
fn planes<E: Number>(tensor: &FlexTensor) -> Complex<&[E]> {
    let all = slice(tensor);
    let (re, im) = all.split_at(all.len() / 2);
    Complex { re, im }
}

fn shape(problem: &ScanProblem) -> [usize; 4] {
    [2, problem.batch, problem.time, problem.channels]
}

pub(super) fn forward<E: Number>(
    problem: &ScanProblem,
    operands: Operands,
    keep: bool,
) -> Result<Forward<Flex>, Error> {
    let ComplexOutputs { o, final_state } = complex_scan::forward::<E>(problem, &inputs(&operands))?;
    let sequences = final_state.re.len() / problem.channels;
    let o = join(o, shape(problem));
    let saved = if keep { vec![o.clone()] } else { Vec::new() };
    Ok(Forward { o, final_state: join(final_state, [2, 1, sequences, problem.channels]), saved })
}

pub(super) fn backward<E: Number>(
    problem: &ScanProblem,
    operands: Operands,
    saved: Vec<FlexTensor>,
    d_o: Option<FlexTensor>,
    d_final_state: FlexTensor,
) -> Result<Operands, Error> {
    let d_o = d_o.unwrap_or_else(|| FlexTensor::zeros(shape(problem).into(), E::dtype()));
    let [o] = &saved[..] else { unreachable!("the forward pass saves its output") };
    let ComplexGradients { dlog_a, dtheta, db, d_initial_state } = complex_scan::backward::<E>(
        problem,
        &inputs(&operands),
        planes(o),
        planes(&d_o),
        Some(planes(&d_final_state)),
    )?;
    Ok([
        gradient(Some(dlog_a), &operands, 0),
        gradient(Some(dtheta), &operands, 1),
        gradient(Some(db.re), &operands, 2),
        gradient(Some(db.im), &operands, 3),
        gradient(Some(d_initial_state.re), &operands, 4),
        gradient(Some(d_initial_state.im), &operands, 5),
        None,
    ])
}
