//! Softmax attention.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results};
use crate::scale::{largest, loss_terms};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::attention;
use thalweg_scan as scan;

/// Softmax attention.
pub(super) struct Attention<'a> {
    problem: attention::Problem,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
}

impl<'a> Attention<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let [batch, time, heads, key_dim] = case.sizes("in.q")?;
        let [v_batch, v_time, kv_heads, value_dim] = case.sizes("in.v")?;
        if (v_batch, v_time) != (batch, time) || heads % kv_heads != 0 {
            return Err(case.misfit("in.v", format!("[{batch}, {time}, a divisor of {heads}, any]")));
        }
        case.output("o", &[batch, time, heads, value_dim])?;
        let (scale, window) = (case.scale(key_dim)?, case.window()?);
        let cu_seqlens = case.cu_seqlens(batch, time)?;
        let problem =
            attention::Problem { batch, time, heads, kv_heads, key_dim, value_dim, scale, window, cu_seqlens };
        Ok(Self {
            problem,
            q: case.any("in.q")?,
            k: case.input("k", &[batch, time, kv_heads, key_dim])?,
            v: case.any("in.v")?,
        })
    }
}

impl Problem for Attention<'_> {
    fn reference(&self, case: &Case) -> Results {
        let (q, k, v) = (&self.q.values, &self.k.values, &self.v.values);
        let o = attention::forward(&self.problem, q, k, v);
        let grad = attention::backward(&self.problem, q, k, v, &cotangent(case, "o", o.len()));
        results([("out.o", o), ("grad.q", grad.q), ("grad.k", grad.k), ("grad.v", grad.v)])
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let p = &self.problem;
        let (q, k, v) = (graph.input("q", self.q), graph.input("k", self.k), graph.input("v", self.v));
        let options = scan::AttentionOptions {
            window: p.window,
            scale: Some(p.scale),
            cu_seqlens: p.cu_seqlens.clone(),
            path: graph.path,
        };
        let o = scan::attention(q, k, v, options)?;
        graph.output("o", o);
        Ok(())
    }

    /// d score = p (do . v - do . o), and score = scale q . k.
    fn cancelling_terms(&self, case: &Case, input: &str) -> Option<f64> {
        let other = match input {
            "q" => self.k,
            "k" => self.q,
            _ => return None,
        };
        Some(loss_terms(case, "o") * self.problem.scale.abs() * largest(&other.values))
    }
}

/// A case of the drawn sizes.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    let p = &draw.problem;
    let window = draw.seed as usize % 90;
    let query = [p.batch, p.time, p.value_heads, p.key_dim];
    let (key, value) = ([p.batch, p.time, p.heads, p.key_dim], [p.batch, p.time, p.heads, p.value_dim]);
    Build::new(op, draw.seed)
        .packed(p.cu_seqlens.as_deref())
        .normal("in.q", &query)
        .normal("in.k", &key)
        .normal("in.v", &value)
        .normal("cot.o", &[p.batch, p.time, p.value_heads, p.value_dim])
        .when(window > 0, |b| b.option("window", window.to_string()))
        .case
}
