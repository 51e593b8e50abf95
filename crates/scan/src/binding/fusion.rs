//! The custom operation under Burn's fusion decorator: it is queued with the shapes of its results, and runs on the
//! inner backend when the queue comes to it. Whoever reads a result is told what went wrong.

use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_fusion::custom::{CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr};
use burn_fusion::{ExecutionError, Fusion, FusionBackend, FusionTensor};
use thalweg_kernels::Error;

use super::backend::{self, AnyOperation, Execute, Kernels, Results, Tensors};
use super::operation::Forward;

type Tensor<B> = FusionTensor<<B as FusionBackend>::FusionRuntime>;

impl<B: FusionBackend + Kernels> Execute for Fusion<B> {
    fn execute(operation: AnyOperation, operands: Tensors<Self>) -> Results<Self> {
        backend::plain(operation, operands)
    }
}

impl<B: FusionBackend + Kernels> Kernels for Fusion<B> {
    fn forward(operation: &AnyOperation, operands: Vec<Tensor<B>>, _: bool) -> Result<Forward<Tensor<B>>, Error> {
        let dtype = operands.get(operation.typed()).map_or(DType::F32, |x| x.dtype);
        let outputs = operation.outputs().into_iter().map(|x| (x.dtype(dtype), x.shape)).collect();
        let inner = operation.clone();
        // A backend under the decorator keeps nothing but outputs.
        let run = move |operands| Ok(B::forward(&inner, operands, false)?.outputs);
        Ok(Forward::of(defer::<B>(operands, outputs, run)))
    }

    fn backward(
        operation: &AnyOperation,
        operands: Vec<Tensor<B>>,
        saved: Vec<Tensor<B>>,
        cotangents: Vec<Option<Tensor<B>>>,
    ) -> Result<Vec<Option<Tensor<B>>>, Error> {
        let differentiable = operation.differentiable();
        let gradients = operands.iter().zip(&differentiable).filter(|(_, has)| **has);
        let gradients = gradients.map(|(x, _)| (x.dtype, x.shape.clone())).collect();
        // One list for the queue: operands, outputs that were saved, cotangents that are there.
        let (count, kept) = (operands.len(), saved.len());
        let present: Vec<_> = cotangents.iter().map(Option::is_some).collect();
        let mut inputs = operands;
        inputs.extend(saved);
        inputs.extend(cotangents.into_iter().flatten());
        let inner = operation.clone();
        let run = move |mut inputs: Vec<FloatTensor<B>>| {
            let mut cotangents = inputs.split_off(count + kept).into_iter();
            let cotangents = present.iter().map(|&present| if present { cotangents.next() } else { None }).collect();
            let saved = inputs.split_off(count);
            let gradients = B::backward(&inner, inputs, saved, cotangents)?;
            Ok(gradients.into_iter().flatten().collect())
        };
        let mut results = defer::<B>(inputs, gradients, run).into_iter();
        Ok(differentiable.iter().map(|&has| if has { results.next() } else { None }).collect())
    }
}

/// Queues `run`, and returns its results to be, of the types and shapes `outputs`.
fn defer<B: FusionBackend>(
    inputs: Vec<Tensor<B>>,
    outputs: Vec<(DType, Shape)>,
    run: impl Fn(Vec<FloatTensor<B>>) -> Result<Vec<FloatTensor<B>>, Error> + Send + Sync + 'static,
) -> Vec<Tensor<B>> {
    let Some(client) = inputs.first().map(|x| x.client.clone()) else { return Vec::new() };
    let inputs: Vec<_> = inputs.into_iter().map(FusionTensor::into_ir).collect();
    let uninit = |(dtype, shape)| TensorIr::uninit(client.create_empty_handle(), shape, dtype);
    let outputs: Vec<_> = outputs.into_iter().map(uninit).collect();
    let description =
        CustomOpIr { id: "thalweg".into(), inputs: inputs.clone(), outputs: outputs.clone(), scalars: Vec::new() };
    let execute = move |handles: &mut HandleContainer<B::Handle>| {
        let inputs = inputs.iter().map(|x| handles.get_float_tensor::<B>(x)).collect();
        let results = run(inputs).map_err(|error| ExecutionError::with_context(error.to_string()))?;
        if results.len() != outputs.len() {
            let found = format!("a kernel returned {} results in the place of {}", results.len(), outputs.len());
            return Err(ExecutionError::with_context(found));
        }
        for (output, result) in outputs.iter().zip(results) {
            handles.register_float_tensor::<B>(&output.id, result);
        }
        Ok(())
    };
    client.register(StreamId::current(), OperationIr::Custom(description), OperationFn(execute))
}
