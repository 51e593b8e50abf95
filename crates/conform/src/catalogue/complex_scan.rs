//! The complex element-wise recurrence.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results};
use crate::{Case, Error, Results, Tensor};
use burn::Tensor as Burn;
use thalweg_reference::Shape;
use thalweg_reference::elementwise::{self, Lambda, Planes};
use thalweg_scan as scan;

/// The complex scan, `lambda` constant over time or not.
pub(super) struct ComplexScan<'a> {
    shape: Shape,
    log_a: &'a Tensor,
    theta: &'a Tensor,
    b_re: &'a Tensor,
    b_im: &'a Tensor,
    h0_re: Option<&'a Tensor>,
    h0_im: Option<&'a Tensor>,
}

impl<'a> ComplexScan<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let shape = case.channels("in.b_re")?;
        let full = [shape.batch, shape.time, shape.channels];
        let lambda = |name: &str| match case.any(&format!("in.{name}"))?.shape.len() {
            1 => case.input(name, &full[2..]),
            _ => case.input(name, &full),
        };
        let (log_a, theta) = (lambda("log_a")?, lambda("theta")?);
        if log_a.shape != theta.shape {
            return Err(case.misfit("in.theta", format!("that of `in.log_a`, {:?}", log_a.shape)));
        }
        for part in ["o_re", "o_im"] {
            case.output(part, &full)?;
        }
        let state = [shape.sequences().len(), shape.channels];
        Ok(Self {
            log_a,
            theta,
            b_re: case.any("in.b_re")?,
            b_im: case.input("b_im", &full)?,
            h0_re: case.state("h0_re", "ht_re", &state)?,
            h0_im: case.state("h0_im", "ht_im", &state)?,
            shape,
        })
    }
}

impl Problem for ComplexScan<'_> {
    fn reference(&self, case: &Case) -> Results {
        let states = self.shape.sequences().len() * self.shape.channels;
        let state = |part: Option<&Tensor>| part.map_or_else(|| vec![0.0; states], |t| t.values.clone());
        let lambda = Lambda { log_a: &self.log_a.values, theta: &self.theta.values };
        let b = Planes { re: self.b_re.values.clone(), im: self.b_im.values.clone() };
        let h0 = Planes { re: state(self.h0_re), im: state(self.h0_im) };
        let (o, last) = elementwise::complex_forward(&self.shape, lambda, &b, Some(&h0));
        let planes = |name: &str, len: usize| Planes {
            re: cotangent(case, &format!("{name}_re"), len),
            im: cotangent(case, &format!("{name}_im"), len),
        };
        let (d_o, dht) = (planes("o", b.re.len()), planes("ht", states));
        let grad = elementwise::complex_backward(&self.shape, lambda, &b, Some(&h0), &d_o, Some(&dht));
        results([
            ("out.o_re", o.re),
            ("out.o_im", o.im),
            ("out.ht_re", last.re),
            ("out.ht_im", last.im),
            ("grad.log_a", grad.log_a),
            ("grad.theta", grad.theta),
            ("grad.b_re", grad.b.re),
            ("grad.b_im", grad.b.im),
            ("grad.h0_re", grad.initial_state.re),
            ("grad.h0_im", grad.initial_state.im),
        ])
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let channels = self.shape.channels;
        let mut lambda = |name: &str, tensor: &Tensor| match tensor.shape.len() {
            1 => graph.input::<1>(name, tensor).reshape([1, 1, channels]),
            _ => graph.input::<3>(name, tensor),
        };
        let (log_a, theta) = (lambda("log_a", self.log_a), lambda("theta", self.theta));
        let (b_re, b_im) = (graph.input("b_re", self.b_re), graph.input("b_im", self.b_im));
        let shape = [self.shape.sequences().len(), channels];
        let h0 = (graph.state("h0_re", self.h0_re, shape), graph.state("h0_im", self.h0_im, shape));
        let initial_state = match h0 {
            (None, None) => None,
            (re, im) => {
                let zeros = || Burn::zeros(shape, graph.device);
                Some((re.unwrap_or_else(zeros), im.unwrap_or_else(zeros)))
            }
        };
        let cu_seqlens = self.shape.cu_seqlens.clone();
        let options = scan::ComplexScanOptions { initial_state, cu_seqlens, path: graph.path };
        let out = scan::complex_scan(log_a, theta, b_re, b_im, options)?;
        graph.output("o_re", out.re);
        graph.output("o_im", out.im);
        graph.output("ht_re", out.final_re);
        graph.output("ht_im", out.final_im);
        Ok(())
    }
}

/// A case of the drawn sizes and gates.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    let ((full, state), build) = Build::of_channels(op, draw);
    let lambda = if draw.seed.is_multiple_of(2) { &full[..] } else { &full[2..] };
    let log_a = draw.gates(lambda.iter().product());
    let build = ["in.b_re", "in.b_im", "cot.o_re", "cot.o_im"].iter().fold(build, |b, name| b.normal(name, &full));
    let build = build.with("in.log_a", lambda, &log_a).normal("in.theta", lambda);
    build.with_states(draw, "h0_re", "ht_re", &state).with_states(draw, "h0_im", "ht_im", &state).case
}
