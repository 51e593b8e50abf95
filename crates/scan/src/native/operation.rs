//! The operations that kernels implement, and what their slots hold.

use thalweg_kernels::ScanProblem;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_kernels::glu::Activation;
use thalweg_kernels::matrix::MatrixProblem;
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
