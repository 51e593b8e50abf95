//! Matrix-state recurrences: decay and delta families.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results, values};
use crate::scale::{longest, loss_terms};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::matrix::{self, Problem as Sizes};
use thalweg_reference::wrappers;
use thalweg_scan as scan;
use thalweg_scan::kernels::matrix::{GateKind, WriteKind};

/// A matrix recurrence; tensors that the operation does not have are `None`.
pub(super) struct Matrix<'a> {
    problem: Sizes,
    q: &'a Tensor,
    /// `None` for HGRN2, whose key is `1 - exp(g)`.
    k: Option<&'a Tensor>,
    v: &'a Tensor,
    decay: GateKind,
    /// `g`, or `g_gamma` for a constant gate.
    gate: Option<&'a Tensor>,
    write: WriteKind,
    beta: Option<&'a Tensor>,
    a: Option<&'a Tensor>,
    b: Option<&'a Tensor>,
    h0: Option<&'a Tensor>,
    l2norm: bool,
}

impl<'a> Matrix<'a> {
    pub(super) fn parse(case: &'a Case, decay: GateKind, write: WriteKind) -> Result<Self, Error> {
        let problem = case.matrix_problem()?;
        let Sizes { batch, time, heads, value_heads, key_dim, .. } = problem;
        let keys = [batch, time, heads, key_dim];
        let rows = [batch, time, value_heads];
        let tied_key = case.op == "hgrn2";
        let gate = match decay {
            GateKind::None => None,
            GateKind::CONSTANT => Some(case.input("g_gamma", &[value_heads])?),
            GateKind::HEAD => Some(case.input("g", &rows)?),
            GateKind::KEY => Some(case.input("g", &[batch, time, value_heads, key_dim])?),
        };
        let only = |condition: bool, name: &str, shape: &[usize]| {
            if condition { case.input(name, shape).map(Some) } else { Ok(None) }
        };
        if (tied_key || write == WriteKind::LOW_RANK) && heads != value_heads {
            return Err(case.misfit("in.v", format!("as many heads as `in.q` has, {heads}")));
        }
        Ok(Self {
            q: case.input("q", &keys)?,
            k: only(!tied_key, "k", &keys)?,
            v: case.any("in.v")?,
            decay,
            gate,
            write,
            beta: only(write == WriteKind::DELTA, "beta", &rows)?,
            a: only(write == WriteKind::LOW_RANK, "a", &keys)?,
            b: only(write == WriteKind::LOW_RANK, "b", &keys)?,
            h0: case.matrix_state(&problem)?,
            l2norm: case.op == "gated_delta_rule_l2norm",
            problem,
        })
    }
}

impl Problem for Matrix<'_> {
    fn reference(&self, case: &Case) -> Results {
        let (p, width) = (&self.problem, self.problem.key_dim);
        let of = |tensor: Option<&Tensor>| tensor.map(|t| t.values.clone()).unwrap_or_default();
        let (gate, beta, a, b) = (of(self.gate), of(self.beta), of(self.a), of(self.b));
        let h0 = values(self.h0);
        let norm = |x: &[f64]| if self.l2norm { wrappers::l2norm(x, width) } else { x.to_vec() };
        let norm_backward =
            |x: &[f64], dy: Vec<f64>| if self.l2norm { wrappers::l2norm_backward(x, width, &dy) } else { dy };
        let (q, v) = (norm(&self.q.values), &self.v.values);

        let Some(raw_k) = values(self.k) else {
            let out = wrappers::hgrn2_forward(p, &q, v, &gate, h0);
            let (d_o, dht) = (cotangent(case, "o", out.o.len()), cotangent(case, "ht", out.final_state.len()));
            let grad = wrappers::hgrn2_backward(p, &q, v, &gate, h0, &d_o, Some(&dht));
            return results([
                ("out.o", out.o),
                ("out.ht", out.final_state),
                ("grad.q", grad.q),
                ("grad.v", grad.v),
                ("grad.g", grad.gate),
                ("grad.h0", grad.initial_state),
            ]);
        };
        let k = norm(raw_k);
        let inputs = matrix::Inputs {
            q: &q,
            k: &k,
            v,
            gate: match self.decay {
                GateKind::None => matrix::Gate::None,
                GateKind::CONSTANT => matrix::Gate::Constant(&gate),
                GateKind::HEAD => matrix::Gate::Head(&gate),
                GateKind::KEY => matrix::Gate::Key(&gate),
            },
            write: match self.write {
                WriteKind::Additive => matrix::Write::Additive,
                WriteKind::DELTA => matrix::Write::Delta { beta: &beta },
                WriteKind::LOW_RANK => matrix::Write::LowRank { a: &a, b: &b },
            },
            initial_state: h0,
        };
        let out = matrix::forward(p, &inputs);
        let (d_o, dht) = (cotangent(case, "o", out.o.len()), cotangent(case, "ht", out.final_state.len()));
        let grad = matrix::backward(p, &inputs, &d_o, Some(&dht));
        let gate_name = if self.decay == GateKind::CONSTANT { "grad.g_gamma" } else { "grad.g" };
        results([
            ("out.o", out.o),
            ("out.ht", out.final_state),
            ("grad.q", norm_backward(&self.q.values, grad.q)),
            ("grad.k", norm_backward(raw_k, grad.k)),
            ("grad.v", grad.v),
            (gate_name, grad.gate),
            ("grad.beta", grad.beta),
            ("grad.a", grad.a),
            ("grad.b", grad.b),
            ("grad.h0", grad.initial_state),
        ])
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let p = &self.problem;
        let q = graph.input::<4>("q", self.q);
        let k = graph.optional::<4>("k", self.k);
        let v = graph.input::<4>("v", self.v);
        let beta = graph.optional::<3>("beta", self.beta);
        let (a, b) = (graph.optional::<4>("a", self.a), graph.optional::<4>("b", self.b));
        let initial_state = graph.state("h0", self.h0, [p.sequences(), p.value_heads, p.key_dim, p.value_dim]);
        let options = scan::MatrixOptions {
            scale: Some(p.scale),
            initial_state,
            cu_seqlens: p.cu_seqlens.clone(),
            chunk: None,
            qk_l2norm: self.l2norm,
            path: graph.path,
        };
        let out = match (self.decay, self.write, self.gate, k, beta, a.zip(b)) {
            (GateKind::None, WriteKind::Additive, _, Some(k), ..) => scan::linear_attention(q, k, v, options),
            (GateKind::CONSTANT, WriteKind::Additive, Some(g), Some(k), ..) => {
                scan::retention(q, k, v, graph.input("g_gamma", g), options)
            }
            (GateKind::HEAD, WriteKind::Additive, Some(g), Some(k), ..) => {
                scan::simple_gla(q, k, v, graph.input("g", g), options)
            }
            (GateKind::KEY, WriteKind::Additive, Some(g), Some(k), ..) => {
                scan::gla(q, k, v, graph.input("g", g), options)
            }
            (GateKind::KEY, WriteKind::Additive, Some(g), None, ..) => scan::hgrn2(q, v, graph.input("g", g), options),
            (GateKind::None, WriteKind::DELTA, _, Some(k), Some(beta), _) => scan::delta_rule(q, k, v, beta, options),
            (GateKind::HEAD, WriteKind::DELTA, Some(g), Some(k), Some(beta), _) => {
                scan::gated_delta_rule(q, k, v, graph.input("g", g), beta, options)
            }
            (GateKind::KEY, WriteKind::DELTA, Some(g), Some(k), Some(beta), _) => {
                scan::kda(q, k, v, graph.input("g", g), beta, options)
            }
            (GateKind::KEY, WriteKind::LOW_RANK, Some(g), Some(k), _, Some((a, b))) => {
                scan::dplr(q, k, v, a, b, graph.input("g", g), options)
            }
            (decay, write, ..) => unreachable!("no operation parses to {decay:?} with {write:?}"),
        }?;
        graph.output("o", out.o);
        graph.output("ht", out.final_state);
        Ok(())
    }

    /// The length of a normalised q or k does not matter, so that the gradient has nothing along it.
    fn cancelling_terms(&self, case: &Case, input: &str) -> Option<f64> {
        match input {
            "q" if self.l2norm => Some(loss_terms(case, "o") / longest(self.q)),
            "k" if self.l2norm => Some(loss_terms(case, "") / longest(self.k?)),
            _ => None,
        }
    }
}

/// A case of the drawn sizes and regimes.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    let (c, p) = (draw.tensors(), &draw.problem);
    let keys = [p.batch, p.time, p.heads, p.key_dim];
    let rows = [p.batch, p.time, p.value_heads];
    let by_channel = [p.batch, p.time, p.value_heads, p.key_dim];
    let delta = ["delta_rule", "gated_delta_rule", "gated_delta_rule_l2norm", "kda"].contains(&op);
    Build::of_matrix(op, draw, &c, (&c.q, &c.k))
        .when(["gla", "hgrn2", "kda", "dplr"].contains(&op), |b| b.with("in.g", &by_channel, &c.gate_key))
        .when(["simple_gla", "gated_delta_rule", "gated_delta_rule_l2norm"].contains(&op), |b| {
            b.with("in.g", &rows, &c.gate_head)
        })
        .when(op == "retention", |b| b.with("in.g_gamma", &[p.value_heads], &c.gate_constant))
        .when(delta, |b| b.with("in.beta", &rows, &c.beta))
        .when(op == "dplr", |b| b.with("in.a", &keys, &c.a).with("in.b", &keys, &c.b))
        .case
}
