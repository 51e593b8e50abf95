//! Mamba-2's state-space dual.

use super::{Graph, Problem, cotangent, results, values};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::matrix::Problem as Sizes;
use thalweg_reference::models;
use thalweg_scan as scan;

/// Mamba-2's state-space dual; the problem's heads are the groups of `b` and `c`.
pub(super) struct Ssd<'a> {
    problem: Sizes,
    x: &'a Tensor,
    dt: &'a Tensor,
    dt_bias: Option<&'a Tensor>,
    a: &'a Tensor,
    b: &'a Tensor,
    c: &'a Tensor,
    d: Option<&'a Tensor>,
    h0: Option<&'a Tensor>,
}

impl<'a> Ssd<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let [batch, time, value_heads, value_dim] = case.sizes("in.x")?;
        let [b_batch, b_time, heads, key_dim] = case.sizes("in.B")?;
        if (b_batch, b_time) != (batch, time) || value_heads % heads != 0 {
            return Err(case.misfit("in.B", format!("[{batch}, {time}, a divisor of {value_heads}, any]")));
        }
        case.output("o", &[batch, time, value_heads, value_dim])?;
        let cu_seqlens = case.cu_seqlens(batch, time)?;
        let problem = Sizes { batch, time, heads, value_heads, key_dim, value_dim, scale: 1.0, cu_seqlens };
        Ok(Self {
            x: case.any("in.x")?,
            dt: case.input("dt", &[batch, time, value_heads])?,
            dt_bias: case.optional("dt_bias", &[value_heads])?,
            a: case.input("A", &[value_heads])?,
            b: case.any("in.B")?,
            c: case.input("C", &[batch, time, heads, key_dim])?,
            d: case.optional("D", &[value_heads])?,
            h0: case.state("h0", "ht", &[problem.sequences(), value_heads, value_dim, key_dim])?,
            problem,
        })
    }
}

impl Problem for Ssd<'_> {
    fn reference(&self, case: &Case) -> Results {
        let p = &self.problem;
        let per_head = |tensor: Option<&Tensor>| tensor.map_or_else(|| vec![0.0; p.value_heads], |t| t.values.clone());
        let (dt_bias, d) = (per_head(self.dt_bias), per_head(self.d));
        let ssd = models::Ssd {
            x: &self.x.values,
            dt: &self.dt.values,
            dt_bias: &dt_bias,
            a: &self.a.values,
            b: &self.b.values,
            c: &self.c.values,
            d: &d,
            initial_state: values(self.h0),
        };
        let (o, last) = models::ssd_forward(p, &ssd);
        let (d_o, dht) = (cotangent(case, "o", o.len()), cotangent(case, "ht", last.len()));
        let grad = models::ssd_backward(p, &ssd, &d_o, Some(&dht));
        results([
            ("out.o", o),
            ("out.ht", last),
            ("grad.x", grad.x),
            ("grad.dt", grad.dt),
            ("grad.dt_bias", grad.dt_bias),
            ("grad.A", grad.a),
            ("grad.B", grad.b),
            ("grad.C", grad.c),
            ("grad.D", grad.d),
            ("grad.h0", grad.initial_state),
        ])
    }

    fn run(&self, _: &mut Graph<'_>) -> Result<(), scan::Error> {
        Ok(())
    }
}
