//! The backward pass of the custom operation.
//!
//! Burn's graph has one output per node, but an operation may have several, and one kernel computes the gradients of all of
//! them together. So the last output is the node that owns the operands, and the others are children of it: going backward,
//! they come first, leave their gradients with the last output's node, and that node runs the kernel. Nothing is copied,
//! and a gradient that does not exist costs at most a zero of the size of the last output, which is a state as a rule.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, TensorMetadata};
use thalweg_kernels::Error;

use super::backend::{AnyOperation, Execute, Kernels, Results, Tensors};

/// Operands that an operation has at most: Burn wants the number at compile time.
const PARENTS: usize = 12;

/// Where the other outputs leave their gradients for the node of the last one.
type Cotangents<B> = Arc<Mutex<Vec<Option<FloatTensor<B>>>>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The node of the last output: runs the backward kernel.
#[derive(Debug)]
struct OwnerNode;

#[derive(Debug, Clone)]
struct OwnerState<B: Backend> {
    operation: AnyOperation,
    operands: Vec<NodeId>,
    saved: Vec<FloatTensor<B>>,
    cotangents: Cotangents<B>,
}

impl<B: Kernels> Backward<B, PARENTS> for OwnerNode {
    type State = OwnerState<B>;

    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let last = grads.consume::<B>(&ops.node);
        let OwnerState { operation, operands, saved, cotangents } = ops.state;
        let mut cotangents = std::mem::take(&mut *lock(&cotangents));
        cotangents.push(Some(last));
        let operands = operands.into_iter().map(|node| checkpointer.retrieve_node_output(node)).collect();
        // Burn's backward pass has no way to return an error, and its caller must not go on with missing gradients.
        let gradients = B::backward(&operation, operands, saved, cotangents)
            .unwrap_or_else(|error| panic!("the backward pass of {operation:?} failed: {error}"));
        // There are as many gradients as operands; what pads the parents gets none.
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// The node of another output: hands its gradient over.
#[derive(Debug)]
struct OutputNode;

#[derive(Debug, Clone)]
struct OutputState<B: Backend> {
    index: usize,
    cotangents: Cotangents<B>,
    last: FloatTensor<B>,
}

impl<B: Kernels> Backward<B, 1> for OutputNode {
    type State = OutputState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let OutputState { index, cotangents, last } = ops.state;
        lock(&cotangents)[index] = Some(gradient);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            // Makes sure that the owner finds a gradient of its own.
            let zeros = B::float_zeros(last.shape(), &last.device(), last.dtype().into());
            grads.register::<B>(parent.id, zeros);
        }
    }
}

impl<B: Kernels, C: CheckpointStrategy> Execute for Autodiff<B, C> {
    fn execute(operation: AnyOperation, operands: Tensors<Self>) -> Results<Self> {
        execute::<B, C>(operation, operands.0).into()
    }
}

/// Tensors of a graph.
type Tracked<B, C> = Vec<FloatTensor<Autodiff<B, C>>>;

fn execute<B: Kernels, C: CheckpointStrategy>(
    operation: AnyOperation,
    operands: Tracked<B, C>,
) -> Result<Tracked<B, C>, Error> {
    let guards = parents(operands.iter().map(|x| x.node()), || operands[0].node());
    match OwnerNode.prepare::<C>(guards).compute_bound().stateful() {
        OpsKind::Tracked(mut prep) => {
            let nodes = operands.iter().map(|x| prep.checkpoint(x)).collect();
            let primitives = operands.into_iter().map(|x| x.into_primitive()).collect();
            let forward = B::forward(&operation, primitives, true)?;
            let mut outputs = forward.outputs;
            let saved = operation.saved().iter().map(|&index| outputs[index].clone()).chain(forward.kept).collect();
            let Some(last) = outputs.pop() else { return Ok(Vec::new()) };
            let cotangents: Cotangents<B> = Arc::new(Mutex::new(vec![None; outputs.len()]));
            let state = OwnerState { operation, operands: nodes, saved, cotangents: cotangents.clone() };
            let owner = prep.finish(state, last.clone());
            let child = |(index, output)| {
                let state = OutputState { index, cotangents: cotangents.clone(), last: last.clone() };
                match OutputNode.prepare::<C>([owner.node()]).compute_bound().stateful() {
                    OpsKind::Tracked(prep) => prep.finish(state, output),
                    OpsKind::UnTracked(prep) => prep.finish(output),
                }
            };
            let mut outputs: Tracked<B, C> = outputs.into_iter().enumerate().map(child).collect();
            outputs.push(owner);
            Ok(outputs)
        }
        OpsKind::UnTracked(prep) => {
            let primitives = operands.into_iter().map(|x| x.into_primitive()).collect();
            let mut outputs = B::forward(&operation, primitives, false)?.outputs;
            let Some(last) = outputs.pop() else { return Ok(Vec::new()) };
            let mut outputs: Tracked<B, C> = outputs.into_iter().map(Autodiff::<B, C>::from_inner).collect();
            outputs.push(prep.finish(last));
            Ok(outputs)
        }
    }
}

/// The nodes of the operands, padded to a number known at compile time.
fn parents(mut nodes: impl Iterator<Item = NodeGuard>, pad: impl Fn() -> NodeGuard) -> [NodeGuard; PARENTS] {
    let parents = std::array::from_fn(|_| nodes.next().unwrap_or_else(&pad));
    assert!(nodes.next().is_none(), "an operation has at most {PARENTS} operands");
    parents
}
