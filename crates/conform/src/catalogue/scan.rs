//! The element-wise recurrence.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results, values};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::{Shape, elementwise};
use thalweg_scan as scan;

/// `h = exp(g) h + x`.
pub(super) struct Scan<'a> {
    shape: Shape,
    g: &'a Tensor,
    x: &'a Tensor,
    h0: Option<&'a Tensor>,
}

impl<'a> Scan<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let shape = case.channels("in.x")?;
        let full = [shape.batch, shape.time, shape.channels];
        case.output("o", &full)?;
        let h0 = case.state("h0", "ht", &[shape.sequences().len(), shape.channels])?;
        Ok(Self { g: case.input("g", &full)?, x: case.any("in.x")?, h0, shape })
    }
}

impl Problem for Scan<'_> {
    fn reference(&self, case: &Case) -> Results {
        let (gate, x, h0) = (elementwise::Gate::Log(&self.g.values), &self.x.values, values(self.h0));
        let out = elementwise::scan_forward(&self.shape, gate, x, h0);
        let (d_o, dht) = (cotangent(case, "o", out.h.len()), cotangent(case, "ht", out.final_state.len()));
        let grad = elementwise::scan_backward(&self.shape, gate, x, h0, &d_o, Some(&dht));
        results([
            ("out.o", out.h),
            ("out.ht", out.final_state),
            ("grad.g", grad.gate),
            ("grad.x", grad.b),
            ("grad.h0", grad.initial_state),
        ])
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let (x, g) = (graph.input("x", self.x), graph.input("g", self.g));
        let options = graph.scan_options(&self.shape, self.h0);
        let out = scan::hgrn(x, g, options)?;
        graph.output("o", out.o);
        graph.output("ht", out.final_state);
        Ok(())
    }
}

/// A case of the drawn sizes and gates.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    let ((full, state), build) = Build::of_channels(op, draw);
    let gates = draw.gates(full.iter().product());
    let build = build.normal("in.x", &full).with_states(draw, "h0", "ht", &state);
    build.with("in.g", &full, &gates).normal("cot.o", &full).case
}
