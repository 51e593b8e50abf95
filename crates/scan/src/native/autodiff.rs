//! The backward pass of the custom operation.
//!
//! Burn's graph has one output per node, but an operation has two, `o` and the final state, and one
//! kernel computes the gradients of both together. So the final state is the node that owns the
//! operands, and `o` is a child of it: going backward, `o` comes first, leaves its gradient with the
//! final state's node, and that node runs the kernel. Nothing is copied, and a gradient that does not
//! exist costs a zero of the size of the state at most.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, TensorMetadata};

use super::backend::{Forward, Kernels, Recurrence, Results, Slots};
use super::operation::{Operation, SLOTS};

/// Where `o` leaves its gradient for the node of the final state.
type Handover<B> = Arc<Mutex<Option<FloatTensor<B>>>>;

/// The node of the final state: runs the backward kernel.
#[derive(Debug)]
struct StateNode;

#[derive(Debug, Clone)]
struct StateNodeState<B: Backend> {
    operation: Operation,
    operands: [Option<NodeId>; SLOTS],
    saved: Vec<FloatTensor<B>>,
    d_o: Handover<B>,
}

impl<B: Kernels> Backward<B, SLOTS> for StateNode {
    type State = StateNodeState<B>;

    fn backward(self, ops: Ops<Self::State, SLOTS>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let d_final_state = grads.consume::<B>(&ops.node);
        let StateNodeState { operation, operands, saved, d_o } = ops.state;
        let d_o = d_o.lock().unwrap_or_else(PoisonError::into_inner).take();
        let present = operands.map(|node| node.is_some());
        let operands = operands.map(|node| node.map(|node| checkpointer.retrieve_node_output(node)));
        let gradients = match B::backward(&operation, operands, saved, d_o, d_final_state) {
            Ok(gradients) => gradients,
            // The forward pass accepted the same operands.
            Err(error) => unreachable!("backward of {operation:?}: {error}"),
        };
        for ((parent, gradient), present) in ops.parents.into_iter().zip(gradients).zip(present) {
            if let (Some(parent), Some(gradient), true) = (parent, gradient, present) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// The node of `o`: hands its gradient over.
#[derive(Debug)]
struct OutputNode;

#[derive(Debug, Clone)]
struct OutputNodeState<B: Backend> {
    d_o: Handover<B>,
    final_state: FloatTensor<B>,
}

impl<B: Kernels> Backward<B, 1> for OutputNode {
    type State = OutputNodeState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let OutputNodeState { d_o, final_state } = ops.state;
        *d_o.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
        let [parent] = ops.parents;
        if let Some(parent) = parent {
            // Makes sure that the node of the final state finds a gradient of its own.
            let zeros = B::float_zeros(final_state.shape(), &final_state.device(), final_state.dtype().into());
            grads.register::<B>(parent.id, zeros);
        }
    }
}

impl<B: Kernels, C: CheckpointStrategy> Recurrence for Autodiff<B, C> {
    fn recurrence(operation: Operation, slots: Slots<Self>) -> Results<Self> {
        let operands = slots.into_array();
        let [Some(first), ..] = &operands else { unreachable!("the first slot is never empty") };
        // An absent operand is represented by the first; it gets no gradient twice (see `present`).
        let guards = operands.each_ref().map(|x| x.as_ref().unwrap_or(first).node());
        let device = first.device();

        match StateNode.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let nodes = operands.each_ref().map(|x| x.as_ref().map(|x| prep.checkpoint(x)));
                let primitives = operands.map(|x| x.map(|x| x.into_primitive()));
                let Forward { o, final_state, saved } = match B::forward(&operation, primitives, true) {
                    Ok(forward) => forward,
                    Err(error) => return Results::failed(&device, error),
                };
                let d_o = Handover::<B>::default();
                let output = OutputNodeState { d_o: d_o.clone(), final_state: final_state.clone() };
                let state = StateNodeState { operation, operands: nodes, saved, d_o };
                let final_state = prep.finish(state, final_state);
                let o = match OutputNode.prepare::<C>([final_state.node()]).compute_bound().stateful() {
                    OpsKind::Tracked(prep) => prep.finish(output, o),
                    OpsKind::UnTracked(prep) => prep.finish(o),
                };
                Results { o, final_state, status: Ok(()) }
            }
            OpsKind::UnTracked(prep) => {
                let primitives = operands.map(|x| x.map(|x| x.into_primitive()));
                match B::forward(&operation, primitives, false) {
                    Ok(Forward { o, final_state, .. }) => {
                        Results { o: Self::from_inner(o), final_state: prep.finish(final_state), status: Ok(()) }
                    }
                    Err(error) => Results::failed(&device, error),
                }
            }
        }
    }
}
