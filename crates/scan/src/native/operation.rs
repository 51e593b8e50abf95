//! The operations that kernels implement, and what their slots hold.

#[cfg(feature = "cube")]
use burn::tensor::Shape;
use thalweg_kernels::ScanProblem;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_kernels::glu::Activation;
use thalweg_kernels::linear::LinearProblem;
use thalweg_kernels::matrix::MatrixProblem;
use thalweg_kernels::norm::NormProblem;
use thalweg_kernels::short_conv::ConvProblem;

/// Tensors that an operation takes at most.
pub(crate) const SLOTS: usize = 7;

/// Which operation runs. Everything here is known on the host; tensors are in the slots.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    /// `q, k, v, g, beta | a, b, initial_state -> o, final_state`
    Matrix { problem: MatrixProblem, gate: GateKind, write: WriteKind },
    /// `a | g, x, initial_state -> o, final_state`
    Scan { problem: ScanProblem, log: bool },
    /// `log_a, theta, b_re, b_im, initial_re, initial_im -> o, final_state`, whose leading axis of size 2
    /// holds real and imaginary parts
    ComplexScan { problem: ScanProblem },
    /// `x, recurrent gate, input gate, a_param, reset (0 or 1), initial_state -> o, final_state`
    RgLru { problem: ScanProblem },
    /// `x, weight, bias, state -> y, new state`
    ShortConv { problem: ConvProblem },
    /// `q, k, v -> o, log-sum-exp`; the second is for the backward pass and takes no gradient
    Attention { problem: AttentionProblem },
    /// `x, z -> f(x) z, nothing`
    Glu { activation: Activation },
    /// `x, weight, bias -> y, nothing`
    Linear { problem: LinearProblem },
    /// `x, weight, z -> y, nothing`
    Norm { problem: NormProblem, gate: Activation },
}

/// What the gate of a matrix-state operation depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GateKind {
    None,
    Constant,
    Head,
    Key,
}

/// The write of a matrix-state operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteKind {
    Additive,
    Delta,
    LowRank,
}

impl Operation {
    /// The slot whose element type the first output has.
    pub(crate) fn typed_slot(&self) -> usize {
        match self {
            Operation::Scan { .. } => 1,
            Operation::ComplexScan { .. } => 2,
            _ => 0,
        }
    }
}

/// What backends need to know that queue operations or check them late.
#[cfg(feature = "cube")]
impl Operation {
    /// Of the outputs, what the backward pass wants.
    pub(crate) fn kept<T: Clone>(&self, o: &T, second: &T) -> Vec<T> {
        match self {
            Operation::Scan { .. } | Operation::ComplexScan { .. } | Operation::RgLru { .. } => vec![o.clone()],
            Operation::Attention { .. } => vec![o.clone(), second.clone()],
            _ => Vec::new(),
        }
    }

    /// Whether an operand has a gradient: all but the resets of the RG-LRU.
    pub(crate) fn has_gradient(&self, slot: usize) -> bool {
        !matches!((self, slot), (Operation::RgLru { .. }, 4))
    }

    /// Shapes of the outputs of an operation that has a GPU kernel.
    pub(crate) fn shapes(&self) -> [Shape; 2] {
        let states = |p: &ScanProblem| p.cu_seqlens.as_ref().map_or(p.batch, |bounds| bounds.len().saturating_sub(1));
        match self {
            Operation::Matrix { problem: p, .. } => [p.value_shape().into(), p.state_shape().into()],
            Operation::Scan { problem: p, .. } | Operation::RgLru { problem: p } => {
                [[p.batch, p.time, p.channels].into(), [states(p), p.channels].into()]
            }
            Operation::ComplexScan { problem: p } => {
                [[2, p.batch, p.time, p.channels].into(), [2, 1, states(p), p.channels].into()]
            }
            Operation::Attention { problem: p } => {
                [[p.batch, p.time, p.heads, p.value_dim].into(), [p.batch, p.heads, p.time].into()]
            }
            Operation::ShortConv { problem: ConvProblem { shape: p, width, .. } } => {
                [[p.batch, p.time, p.channels].into(), [states(p), p.channels, width - 1].into()]
            }
            other => unreachable!("{other:?} has no GPU kernel"),
        }
    }

    /// Whether this is one token of sequences of equal length, which advances the state in place.
    pub(crate) fn is_step(&self) -> bool {
        matches!(self, Operation::Matrix { problem, .. } if problem.time == 1 && problem.cu_seqlens.is_none())
    }
}
