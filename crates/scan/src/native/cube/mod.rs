//! The GPU kernels on CubeCL tensors: handles are lent to the kernels, and the buffers that they return become tensors.

pub(super) mod attention;
mod complex_scan;
mod fusion;
mod matrix;
mod rg_lru;
mod scan;
mod short_conv;

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use thalweg_kernels::Error;
use thalweg_kernels::gpu::{Buffer, Storage};

use super::backend::{self, Forward, Kernels, Recurrence, Results, Slots};
use super::operation::{Operation, SLOTS};

/// Operands of an operation.
type Operands = [Option<CubeTensor>; SLOTS];

/// Operands, or their gradients, as the kernels take them.
type Buffers = [Option<Buffer>; SLOTS];

impl Recurrence for CubeBackend {
    fn recurrence(operation: Operation, slots: Slots<Self>) -> Results<Self> {
        backend::plain(operation, slots)
    }
}

impl Kernels for CubeBackend {
    fn forward(operation: &Operation, operands: Operands, keep: bool) -> Result<Forward<Self>, Error> {
        let mut operands = contiguous(operands);
        if operation.is_step() && !keep {
            let state = operands[matrix::STATE].take();
            return step(operation, &operands, state);
        }
        let (like, x) = (first(&operands), buffers(&operands));
        let [o, final_state] = match operation {
            Operation::Matrix { problem, gate, write } => matrix::forward(&like.client, problem, *gate, *write, &x),
            Operation::Scan { problem, log } => scan::forward(&like.client, problem, *log, &x),
            Operation::ComplexScan { problem } => complex_scan::forward(like, problem, &x),
            Operation::RgLru { problem } => rg_lru::forward(&like.client, problem, &x),
            Operation::Attention { problem } => attention::forward(&like.client, problem, &x),
            Operation::ShortConv { problem } => short_conv::forward(&like.client, problem, &x),
            other => no_kernel(other),
        }?;
        let [o_shape, state_shape] = operation.shapes();
        let (o, final_state) = (tensor(like, &o, o_shape), tensor(like, &final_state, state_shape));
        let saved = if keep { operation.kept(&o, &final_state) } else { Vec::new() };
        Ok(Forward { o, final_state, saved })
    }

    fn backward(
        operation: &Operation,
        operands: Operands,
        saved: Vec<CubeTensor>,
        d_o: Option<CubeTensor>,
        d_final_state: FloatTensor<Self>,
    ) -> Result<Operands, Error> {
        let operands = contiguous(operands);
        let (like, x) = (first(&operands), buffers(&operands));
        // The matrix recurrences need no gradient of an output that nobody used; all others want zeros then.
        let d_o = d_o.or_else(|| {
            let typed = operands[operation.typed_slot()].as_ref()?;
            let zeros = || Self::float_zeros(operation.shapes()[0].clone(), &like.device, typed.dtype.into());
            (!matches!(operation, Operation::Matrix { .. })).then(zeros)
        });
        let mut saved = saved.into_iter();
        let [o, lse, d_o] = [saved.next(), saved.next(), d_o].map(|x| x.map(|x| buffer(&into_contiguous(x))));
        let d_state = buffer(&into_contiguous(d_final_state));
        let gradients = match (operation, o, d_o) {
            (Operation::Attention { problem }, Some(o), Some(d_o)) => {
                let Some(lse) = lse else { unreachable!("attention saves both of its outputs") };
                attention::backward(&like.client, problem, &x, [&o, &lse], &d_o)
            }
            (Operation::Matrix { problem, gate, write }, _, d_o) => {
                matrix::backward(&like.client, problem, *gate, *write, &x, d_o.as_ref(), &d_state)
            }
            (Operation::Scan { problem, log }, Some(o), Some(d_o)) => {
                scan::backward(&like.client, problem, *log, &x, &o, &d_o, &d_state)
            }
            (Operation::ComplexScan { problem }, Some(o), Some(d_o)) => {
                complex_scan::backward(like, problem, &x, &o, &d_o, &d_state)
            }
            (Operation::ShortConv { problem }, _, Some(d_o)) => {
                short_conv::backward(&like.client, problem, &x, &d_o, &d_state)
            }
            (Operation::RgLru { problem }, Some(o), Some(d_o)) => {
                rg_lru::backward(&like.client, problem, &x, &o, &d_o, &d_state)
            }
            (other, ..) => no_kernel(other),
        }?;
        Ok(std::array::from_fn(|slot| {
            let (operand, gradient) = (operands[slot].as_ref()?, gradients[slot].as_ref()?);
            Some(tensor(operand, gradient, operand.shape()))
        }))
    }
}

/// One token: the state is advanced in place if nobody else holds it.
fn step(operation: &Operation, operands: &Operands, state: Option<CubeTensor>) -> Result<Forward<CubeBackend>, Error> {
    let Operation::Matrix { problem, gate, write } = operation else { no_kernel(operation) };
    let like = first(operands);
    let [o_shape, state_shape] = operation.shapes();
    let state = match state {
        Some(state) if state.can_mut() => state,
        Some(state) => state.copy(),
        None => CubeBackend::float_zeros(state_shape, &like.device, FloatDType::F32),
    };
    let o = matrix::step(&like.client, problem, *gate, *write, &buffers(operands), &buffer(&state))?;
    Ok(Forward { o: tensor(like, &o, o_shape), final_state: state, saved: Vec::new() })
}

fn no_kernel(operation: &Operation) -> ! {
    unreachable!("no GPU kernel for {operation:?}; `native::available` asks first")
}

/// Views that are no plain run of memory are copied.
fn contiguous(operands: Operands) -> Operands {
    operands.map(|x| x.map(into_contiguous))
}

/// The first operand, which always exists.
fn first(operands: &Operands) -> &CubeTensor {
    match operands {
        [Some(first), ..] => first,
        _ => unreachable!("the first slot is never empty"),
    }
}

fn buffers(operands: &Operands) -> Buffers {
    operands.each_ref().map(|x| x.as_ref().map(buffer))
}

/// The memory of a contiguous tensor.
fn buffer(tensor: &CubeTensor) -> Buffer {
    Buffer { handle: tensor.handle.clone(), storage: storage(tensor.dtype), len: tensor.shape().num_elements() }
}

fn storage(dtype: DType) -> Storage {
    match dtype {
        DType::F32 => Storage::F32,
        DType::BF16 => Storage::Bf16,
        DType::F16 => Storage::F16,
        other => unreachable!("no kernel for {other:?}; `native::available` asks first"),
    }
}

/// The buffer of an operand that the operation always has.
fn required(buffers: &Buffers, slot: usize) -> &Buffer {
    match &buffers[slot] {
        Some(buffer) => buffer,
        None => unreachable!("operand {slot} is never absent"),
    }
}

/// A tensor over a buffer on the device of another tensor.
fn tensor(like: &CubeTensor, buffer: &Buffer, shape: Shape) -> CubeTensor {
    let dtype = match buffer.storage {
        Storage::F32 => DType::F32,
        Storage::Bf16 => DType::BF16,
        Storage::F16 => DType::F16,
    };
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, buffer.handle.clone(), dtype)
}
