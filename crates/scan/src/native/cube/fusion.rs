//! The custom operation under Burn's fusion decorator: it is queued with the shapes of its results, and runs on the
//! inner backend when the queue comes to it. What goes wrong then is told by whoever reads a result.

use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_fusion::custom::{CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr};
use burn_fusion::{ExecutionError, Fusion, FusionBackend, FusionTensor};
use thalweg_kernels::Error;

use crate::native::backend::{self, Forward, Kernels, Recurrence, Results, Slots};
use crate::native::operation::{Operation, SLOTS};

type Tensor<B> = FusionTensor<<B as FusionBackend>::FusionRuntime>;

impl<B: FusionBackend + Kernels> Recurrence for Fusion<B> {
    fn recurrence(operation: Operation, slots: Slots<Self>) -> Results<Self> {
        backend::plain(operation, slots)
    }
}

impl<B: FusionBackend + Kernels> Kernels for Fusion<B> {
    fn forward(
        operation: &Operation,
        operands: [Option<Tensor<B>>; SLOTS],
        keep: bool,
    ) -> Result<Forward<Self>, Error> {
        let dtype = operands[operation.typed_slot()].as_ref().map_or(DType::F32, |x| x.dtype);
        let [o, state] = operation.shapes();
        let inner = operation.clone();
        let results = defer::<B>(operands.into(), vec![Some((o, dtype)), Some((state, DType::F32))], move |operands| {
            // A backend under the decorator keeps outputs or nothing, and the decorator does that itself.
            let Forward { o, final_state, .. } = B::forward(&inner, array(operands), keep)?;
            Ok(vec![Some(o), Some(final_state)])
        });
        let [Some(o), Some(final_state)] = array(results) else { unreachable!("two results were asked for") };
        let saved = if keep { operation.kept(&o, &final_state) } else { Vec::new() };
        Ok(Forward { o, final_state, saved })
    }

    fn backward(
        operation: &Operation,
        operands: [Option<Tensor<B>>; SLOTS],
        saved: Vec<Tensor<B>>,
        d_o: Option<Tensor<B>>,
        d_final_state: Tensor<B>,
    ) -> Result<[Option<Tensor<B>>; SLOTS], Error> {
        let like = |(slot, x): (usize, &Option<Tensor<B>>)| {
            x.as_ref().filter(|_| operation.has_gradient(slot)).map(|x| (x.shape.clone(), x.dtype))
        };
        let gradients = operands.iter().enumerate().map(like).collect();
        let mut inputs = Vec::from(operands);
        inputs.extend([Some(d_final_state), d_o]);
        inputs.extend(saved.into_iter().map(Some));
        let inner = operation.clone();
        let gradients = defer::<B>(inputs, gradients, move |mut inputs| {
            let saved = inputs.split_off(SLOTS + 2).into_iter().flatten().collect();
            let [Some(d_final_state), d_o] = array(inputs.split_off(SLOTS)) else {
                unreachable!("the final state always has a gradient")
            };
            B::backward(&inner, array(inputs), saved, d_o, d_final_state).map(Vec::from)
        });
        Ok(array(gradients))
    }
}

/// The elements of a vector, as an array.
fn array<T, const N: usize>(values: Vec<Option<T>>) -> [Option<T>; N] {
    let mut values = values.into_iter();
    std::array::from_fn(|_| values.next().flatten())
}

/// Queues `run`, and returns its results to be, of the shapes and types that `outputs` tells.
fn defer<B: FusionBackend>(
    inputs: Vec<Option<Tensor<B>>>,
    outputs: Vec<Option<(Shape, DType)>>,
    run: impl Fn(Vec<Option<FloatTensor<B>>>) -> Result<Vec<Option<FloatTensor<B>>>, Error> + Send + Sync + 'static,
) -> Vec<Option<Tensor<B>>> {
    let Some(client) = inputs.iter().flatten().next().map(|x| x.client.clone()) else {
        unreachable!("the first slot is never empty")
    };
    let inputs: Vec<_> = inputs.into_iter().map(|x| x.map(FusionTensor::into_ir)).collect();
    let uninit = |(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype);
    let outputs: Vec<_> = outputs.into_iter().map(|x| x.map(uninit)).collect();
    let wanted: Vec<_> = outputs.iter().map(Option::is_some).collect();
    let description = CustomOpIr {
        id: "thalweg".into(),
        inputs: inputs.iter().flatten().cloned().collect(),
        outputs: outputs.iter().flatten().cloned().collect(),
        scalars: Vec::new(),
    };
    let execute = move |handles: &mut HandleContainer<B::Handle>| {
        let inputs = inputs.iter().map(|x| x.as_ref().map(|x| handles.get_float_tensor::<B>(x))).collect();
        let results = run(inputs).map_err(|error| ExecutionError::with_context(error.to_string()))?;
        for (output, result) in outputs.iter().zip(results) {
            match (output, result) {
                (Some(output), Some(result)) => handles.register_float_tensor::<B>(&output.id, result),
                (Some(_), None) => return Err(ExecutionError::with_context("a kernel returned too few results")),
                (None, _) => {}
            }
        }
        Ok(())
    };
    let operation = OperationIr::Custom(description);
    let mut results = client.register(StreamId::current(), operation, OperationFn(execute)).into_iter();
    wanted.into_iter().map(|wanted| if wanted { results.next() } else { None }).collect()
}
