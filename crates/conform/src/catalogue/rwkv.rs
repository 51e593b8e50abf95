//! RWKV-6 and RWKV-7.

use super::{Graph, Problem, cotangent, results, values};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::matrix::Problem as Sizes;
use thalweg_reference::models;
use thalweg_scan as scan;

/// What differs between the two.
pub(super) enum Version<'a> {
    Six { u: &'a Tensor },
    Seven { kk: &'a Tensor, a: &'a Tensor },
}

/// RWKV-6 (with `u`) or RWKV-7 (with `kk` and `a`).
pub(super) struct Rwkv<'a> {
    problem: Sizes,
    r: &'a Tensor,
    w: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    version: Version<'a>,
    h0: Option<&'a Tensor>,
}

impl<'a> Rwkv<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let [batch, time, heads, key_dim] = case.sizes("in.r")?;
        let [_, _, _, value_dim] = case.sizes("in.v")?;
        let (keys, values) = ([batch, time, heads, key_dim], [batch, time, heads, value_dim]);
        case.output("o", &values)?;
        // RWKV does not scale its query unless a file says so.
        let scale = if case.metadata.contains_key("scale") { case.scale(key_dim)? } else { 1.0 };
        let cu_seqlens = case.cu_seqlens(batch, time)?;
        let problem = Sizes { batch, time, heads, value_heads: heads, key_dim, value_dim, scale, cu_seqlens };
        Ok(Self {
            r: case.any("in.r")?,
            w: case.input("w", &keys)?,
            k: case.input("k", &keys)?,
            v: case.input("v", &values)?,
            version: match case.op.as_str() {
                "rwkv6" => Version::Six { u: case.input("u", &[heads, key_dim])? },
                _ => Version::Seven { kk: case.input("kk", &keys)?, a: case.input("a", &keys)? },
            },
            h0: case.matrix_state(&problem)?,
            problem,
        })
    }
}

impl Problem for Rwkv<'_> {
    fn reference(&self, case: &Case) -> Results {
        let p = &self.problem;
        let (r, w, k, v) = (&self.r.values, &self.w.values, &self.k.values, &self.v.values);
        let initial_state = values(self.h0);
        let (d_o, dht) = (cotangent(case, "o", v.len()), cotangent(case, "ht", p.state_len()));
        let (out, grad, named) = match self.version {
            Version::Six { u } => {
                let x = models::Rwkv6 { r, w, k, v, u: &u.values, initial_state };
                let (out, grad, du) = models::rwkv6(p, &x, &d_o, Some(&dht));
                (out, grad, vec![("grad.u", du)])
            }
            Version::Seven { kk, a } => {
                let x = models::Rwkv7 { r, w, k, v, kk: &kk.values, a: &a.values, initial_state };
                let out = models::rwkv7_forward(p, &x);
                let mut grad = models::rwkv7_backward(p, &x, &d_o, Some(&dht));
                let (d_a, d_kk) = (std::mem::take(&mut grad.a), std::mem::take(&mut grad.b));
                (out, grad, vec![("grad.a", d_a), ("grad.kk", d_kk)])
            }
        };
        let mut all = results([
            ("out.o", out.o),
            ("out.ht", out.final_state),
            ("grad.r", grad.q),
            ("grad.w", grad.gate),
            ("grad.k", grad.k),
            ("grad.v", grad.v),
            ("grad.h0", grad.initial_state),
        ]);
        all.extend(named.into_iter().map(|(name, values)| (name.to_string(), values)));
        all
    }

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let Version::Seven { kk, a } = self.version else { return Ok(()) };
        let p = &self.problem;
        let [r, w, k] = [("r", self.r), ("w", self.w), ("k", self.k)].map(|(name, x)| graph.input::<4>(name, x));
        let (v, kk, a) = (graph.input("v", self.v), graph.input::<4>("kk", kk), graph.input::<4>("a", a));
        let options = scan::MatrixOptions {
            scale: Some(p.scale),
            initial_state: graph.state("h0", self.h0, [p.sequences(), p.value_heads, p.key_dim, p.value_dim]),
            cu_seqlens: p.cu_seqlens.clone(),
            path: graph.path,
            ..Default::default()
        };
        let out = scan::dplr(r, k, v, -kk.clone(), kk * a, w, options)?;
        graph.output("o", out.o);
        graph.output("ht", out.final_state);
        Ok(())
    }
}
