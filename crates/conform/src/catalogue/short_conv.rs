//! Depth-wise causal convolution.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results, values};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::{Shape, short_conv};
use thalweg_scan as scan;

/// Depth-wise causal convolution.
pub(super) struct ShortConv<'a> {
    shape: Shape,
    width: usize,
    x: &'a Tensor,
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
    silu: bool,
    state: Option<&'a Tensor>,
}

impl<'a> ShortConv<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let shape = case.channels("in.x")?;
        let [_, width] = case.sizes("in.weight")?;
        case.output("o", &[shape.batch, shape.time, shape.channels])?;
        Ok(Self {
            width,
            x: case.any("in.x")?,
            weight: case.input("weight", &[shape.channels, width])?,
            bias: case.optional("bias", &[shape.channels])?,
            silu: case.silu()?,
            state: case.state("state", "state", &[shape.sequences().len(), shape.channels, width - 1])?,
            shape,
        })
    }
}

impl Problem for ShortConv<'_> {
    fn reference(&self, case: &Case) -> Results {
        let inputs = short_conv::Inputs {
            x: &self.x.values,
            weight: &self.weight.values,
            bias: values(self.bias),
            silu: self.silu,
            state: values(self.state),
        };
        let (y, state) = short_conv::forward(&self.shape, &inputs);
        let (dy, d_state) = (cotangent(case, "o", y.len()), cotangent(case, "state", state.len()));
        let grad = short_conv::backward(&self.shape, &inputs, &dy, Some(&d_state));
        results([
            ("out.o", y),
            ("out.state", state),
            ("grad.x", grad.x),
            ("grad.weight", grad.weight),
            ("grad.bias", grad.bias),
            ("grad.state", grad.state),
        ])
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let (x, weight) = (graph.input("x", self.x), graph.input("weight", self.weight));
        let bias = graph.optional("bias", self.bias);
        let shape = [self.shape.sequences().len(), self.shape.channels, self.width - 1];
        let options = scan::ShortConvOptions {
            activation: if self.silu { scan::ConvActivation::Silu } else { scan::ConvActivation::None },
            initial_state: graph.state("state", self.state, shape),
            cu_seqlens: self.shape.cu_seqlens.clone(),
            path: graph.path,
        };
        let out = scan::short_conv(x, weight, bias, options)?;
        graph.output("o", out.o);
        graph.output("state", out.final_state);
        Ok(())
    }
}

/// A case of the drawn sizes.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    let ((full, [sequences, channels]), build) = Build::of_channels(op, draw);
    let width = 2 + draw.seed as usize % 4;
    build
        .normal("in.x", &full)
        .normal("in.weight", &[channels, width])
        .normal("cot.o", &full)
        .with_states(draw, "state", "state", &[sequences, channels, width - 1])
        .when(draw.seed.is_multiple_of(2), |b| b.normal("in.bias", &[channels]))
        .when(draw.seed.is_multiple_of(3), |b| b.option("activation", "none".into()))
        .case
}
