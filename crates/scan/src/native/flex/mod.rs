//! The CPU kernels on Flex tensors: storage is lent to them as slices, without a copy where it is
//! contiguous, and the vectors that they return become storage.

mod attention;
mod complex_scan;
mod glu;
mod linear;
mod matrix;
mod norm;
mod rg_lru;
mod scan;
mod short_conv;

use std::borrow::Cow;

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Bytes, DType, Element as BurnElement, Shape};
use burn_flex::{FlexTensor, Layout};
use thalweg_kernels::{Element, Error};

use super::backend::{self, Forward, Kernels, Recurrence, Results, Slots};
use super::operation::{Operation, SLOTS};

/// Operands of an operation.
type Operands = [Option<FlexTensor>; SLOTS];

/// An element type of both worlds.
trait Number: Element + BurnElement + bytemuck::Pod {}
impl Number for f32 {}
impl Number for half::bf16 {}
impl Number for half::f16 {}

/// Calls a function for the element type of a tensor.
macro_rules! for_element {
    ($dtype:expr, $module:ident::$function:ident($($argument:expr),* $(,)?)) => {
        match $dtype {
            DType::F32 => $module::$function::<f32>($($argument),*),
            DType::BF16 => $module::$function::<half::bf16>($($argument),*),
            DType::F16 => $module::$function::<half::f16>($($argument),*),
            other => unreachable!("no kernel for {other:?}; `native::available` asks first"),
        }
    };
}

impl Recurrence for Flex {
    fn recurrence(operation: Operation, slots: Slots<Self>) -> Results<Self> {
        backend::plain(operation, slots)
    }
}

impl Kernels for Flex {
    fn forward(operation: &Operation, mut operands: Operands, keep: bool) -> Result<Forward<Self>, Error> {
        let operation = &*as_stored(operation, &mut operands, keep);
        make_contiguous(&mut operands);
        let dtype = dtype(&operands, operation);
        match operation {
            Operation::Matrix { problem, gate, write } => {
                for_element!(dtype, matrix::forward(problem, *gate, *write, operands, keep))
            }
            Operation::Scan { problem, log } => for_element!(dtype, scan::forward(problem, *log, operands, keep)),
            Operation::ComplexScan { problem } => for_element!(dtype, complex_scan::forward(problem, operands, keep)),
            Operation::RgLru { problem } => for_element!(dtype, rg_lru::forward(problem, operands, keep)),
            Operation::ShortConv { problem } => for_element!(dtype, short_conv::forward(problem, operands)),
            Operation::Attention { problem } => for_element!(dtype, attention::forward(problem, operands, keep)),
            Operation::Glu { activation } => for_element!(dtype, glu::forward(*activation, operands)),
            Operation::Linear { problem } => for_element!(dtype, linear::forward(problem, operands)),
            Operation::Norm { problem, gate } => for_element!(dtype, norm::forward(problem, *gate, operands)),
        }
    }

    fn backward(
        operation: &Operation,
        mut operands: Operands,
        saved: Vec<FlexTensor>,
        d_o: Option<FlexTensor>,
        d_final_state: FloatTensor<Self>,
    ) -> Result<Operands, Error> {
        let operation = &*as_stored(operation, &mut operands, true);
        make_contiguous(&mut operands);
        let d_o = d_o.map(|d| d.to_contiguous());
        let d_final_state = d_final_state.to_contiguous();
        let dtype = dtype(&operands, operation);
        match operation {
            Operation::Matrix { problem, gate, write } => {
                for_element!(dtype, matrix::backward(problem, *gate, *write, operands, saved, d_o, d_final_state))
            }
            Operation::Scan { problem, log } => {
                for_element!(dtype, scan::backward(problem, *log, operands, saved, d_o, d_final_state))
            }
            Operation::ComplexScan { problem } => {
                for_element!(dtype, complex_scan::backward(problem, operands, saved, d_o, d_final_state))
            }
            Operation::RgLru { problem } => {
                for_element!(dtype, rg_lru::backward(problem, operands, saved, d_o, d_final_state))
            }
            Operation::ShortConv { problem } => {
                for_element!(dtype, short_conv::backward(problem, operands, d_o, d_final_state))
            }
            Operation::Attention { problem } => for_element!(dtype, attention::backward(problem, operands, saved, d_o)),
            Operation::Glu { activation } => for_element!(dtype, glu::backward(*activation, operands, d_o)),
            Operation::Linear { problem } => for_element!(dtype, linear::backward(problem, operands, d_o)),
            Operation::Norm { problem, gate } => for_element!(dtype, norm::backward(problem, *gate, operands, d_o)),
        }
    }
}

/// The operation on its operands as they lie in memory, where a kernel takes more than one order; `gradients` if they are
/// wanted.
fn as_stored<'a>(operation: &'a Operation, operands: &mut Operands, gradients: bool) -> Cow<'a, Operation> {
    match operation {
        Operation::Linear { problem } => {
            return Cow::Owned(Operation::Linear { problem: linear::as_stored(problem, operands) });
        }
        Operation::Attention { problem } if !gradients => attention::as_stored(problem, operands),
        _ => {}
    }
    Cow::Borrowed(operation)
}

/// Views that are no plain run of memory are copied; everything else is lent as it is.
fn make_contiguous(operands: &mut Operands) {
    for x in operands.iter_mut().flatten().filter(|x| !x.is_contiguous()) {
        *x = x.to_contiguous();
    }
}

/// The element type of an operation.
fn dtype(operands: &Operands, operation: &Operation) -> DType {
    operands[operation.typed_slot()].as_ref().map_or(DType::F32, FlexTensor::dtype)
}

/// The elements of a contiguous tensor.
fn slice<E: Number>(tensor: &FlexTensor) -> &[E] {
    match tensor.as_slice() {
        Some(slice) => slice,
        None => unreachable!("{tensor:?} as {}", E::NAME),
    }
}

/// The elements of an operand that the operation always has.
fn required<E: Number>(operands: &Operands, slot: usize) -> &[E] {
    match &operands[slot] {
        Some(tensor) => slice(tensor),
        None => unreachable!("operand {slot} is never absent"),
    }
}

/// The elements of an operand that may be absent.
fn optional<E: Number>(operands: &Operands, slot: usize) -> Option<&[E]> {
    operands[slot].as_ref().map(slice)
}

/// A tensor over the memory of a vector.
fn tensor<E: Number>(values: Vec<E>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape.into()), E::dtype())
}

/// The result of an operation without a state: in the shape of its first operand but for the last axis.
fn stateless<E: Number>(y: Vec<E>, operands: &Operands, features: Option<usize>) -> Forward<Flex> {
    let mut shape = operands[0].as_ref().map_or_else(|| Shape::from([y.len()]), |x| x.layout().shape().clone());
    if let (Some(last), Some(features)) = (shape.rank().checked_sub(1), features) {
        shape[last] = features;
    }
    // The operation's second result is a placeholder.
    Forward { o: tensor(y, shape), final_state: tensor(vec![0.0f32], [1]), saved: Vec::new() }
}

/// The cotangent of the first output; zeros if only the state is used.
fn cotangent<E: Number>(d_o: Option<FlexTensor>, len: usize) -> FlexTensor {
    d_o.unwrap_or_else(|| tensor(vec![E::default(); len], [len]))
}

/// A gradient in the shape of its operand.
fn gradient<E: Number>(values: Option<Vec<E>>, operands: &Operands, slot: usize) -> Option<FlexTensor> {
    let operand = operands[slot].as_ref()?;
    Some(tensor(values?, operand.layout().shape().clone()))
}
