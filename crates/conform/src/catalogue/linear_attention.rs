//! Linear attention with its normaliser.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results, values};
use crate::scale::{longest, loss_terms};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::matrix::Problem as Sizes;
use thalweg_reference::wrappers;
use thalweg_scan as scan;

/// Linear attention with its normaliser.
pub(super) struct Normalised<'a> {
    problem: Sizes,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    h0: Option<&'a Tensor>,
    z0: Option<&'a Tensor>,
}

impl<'a> Normalised<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let problem = case.matrix_problem()?;
        let Sizes { batch, time, heads, key_dim, .. } = problem;
        let keys = [batch, time, heads, key_dim];
        Ok(Self {
            q: case.input("q", &keys)?,
            k: case.input("k", &keys)?,
            v: case.any("in.v")?,
            h0: case.matrix_state(&problem)?,
            z0: case.state("z0", "zt", &[problem.sequences(), 1, heads, key_dim])?,
            problem,
        })
    }
}

impl Problem for Normalised<'_> {
    fn reference(&self, case: &Case) -> Results {
        let inputs = wrappers::NormInputs {
            q: &self.q.values,
            k: &self.k.values,
            v: &self.v.values,
            initial_state: values(self.h0),
            initial_z: values(self.z0),
        };
        let (out, z) = wrappers::linear_attention_norm(&self.problem, &inputs);
        let (d_o, dht) = (cotangent(case, "o", out.o.len()), cotangent(case, "ht", out.final_state.len()));
        let dzt = cotangent(case, "zt", z.len());
        let (grad, dz0) =
            wrappers::linear_attention_norm_backward(&self.problem, &inputs, &d_o, Some(&dht), Some(&dzt));
        results([
            ("out.o", out.o),
            ("out.ht", out.final_state),
            ("out.zt", z),
            ("grad.q", grad.q),
            ("grad.k", grad.k),
            ("grad.v", grad.v),
            ("grad.h0", grad.initial_state),
            ("grad.z0", dz0),
        ])
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let p = &self.problem;
        let (q, k, v) = (graph.input("q", self.q), graph.input("k", self.k), graph.input("v", self.v));
        let initial_state = graph.state("h0", self.h0, [p.sequences(), p.value_heads, p.key_dim, p.value_dim]);
        let z0 = graph.state("z0", self.z0, [p.sequences(), 1, p.heads, p.key_dim]);
        let options = scan::MatrixOptions {
            scale: Some(p.scale),
            initial_state,
            cu_seqlens: p.cu_seqlens.clone(),
            path: graph.path,
            ..Default::default()
        };
        let out = scan::normalized_linear_attention(q, k, v, z0, options)?;
        graph.output("o", out.o);
        graph.output("ht", out.final_state);
        graph.output("zt", out.final_normalizer);
        Ok(())
    }

    /// The length of q or k does not matter, so that the gradient has nothing along it.
    fn cancelling_terms(&self, case: &Case, input: &str) -> Option<f64> {
        match input {
            "q" => Some(loss_terms(case, "o") / longest(self.q)),
            "k" => Some(loss_terms(case, "o") / longest(self.k)),
            _ => None,
        }
    }
}

/// A case of the drawn sizes.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    // With one feature, or one key so far, a normaliser leaves nothing of the query's size to differentiate.
    let mut draw = draw.clone();
    draw.initial_state = true;
    draw.problem.key_dim = draw.problem.key_dim.max(2);
    let (c, p) = (draw.tensors(), &draw.problem);
    let z = [p.sequences(), 1, p.heads, p.key_dim];
    let positive = |x: &[f64]| x.iter().map(|x| x.abs() + 0.1).collect::<Vec<_>>();
    Build::of_matrix(op, &draw, &c, (&positive(&c.q), &positive(&c.k)))
        .normal("cot.zt", &z)
        .with("in.z0", &z, &vec![0.5; z.iter().product()])
        .case
}
