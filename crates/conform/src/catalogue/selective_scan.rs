//! Mamba-1's selective scan.

use super::{Graph, Problem, cotangent, results, values};
use crate::{Case, Error, Results, Tensor};
use thalweg_reference::{Shape, selective};
use thalweg_scan as scan;

/// Mamba-1's selective scan.
pub(super) struct Selective<'a> {
    shape: Shape,
    u: &'a Tensor,
    dt: &'a Tensor,
    dt_bias: Option<&'a Tensor>,
    a: &'a Tensor,
    b: &'a Tensor,
    c: &'a Tensor,
    d: Option<&'a Tensor>,
    z: Option<&'a Tensor>,
    h0: Option<&'a Tensor>,
}

impl<'a> Selective<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let shape = case.channels("in.u")?;
        let [_, size] = case.sizes("in.A")?;
        let Shape { batch, time, channels, .. } = shape;
        let full = [batch, time, channels];
        case.output("o", &full)?;
        Ok(Self {
            u: case.any("in.u")?,
            dt: case.input("dt", &full)?,
            dt_bias: case.optional("dt_bias", &[channels])?,
            a: case.input("A", &[channels, size])?,
            b: case.input("B", &[batch, time, size])?,
            c: case.input("C", &[batch, time, size])?,
            d: case.optional("D", &[channels])?,
            z: case.optional("z", &full)?,
            h0: case.state("h0", "ht", &[shape.sequences().len(), channels, size])?,
            shape,
        })
    }
}

impl Problem for Selective<'_> {
    fn reference(&self, case: &Case) -> Results {
        let inputs = selective::Inputs {
            u: &self.u.values,
            dt: &self.dt.values,
            dt_bias: values(self.dt_bias),
            a: &self.a.values,
            b: &self.b.values,
            c: &self.c.values,
            d: values(self.d),
            z: values(self.z),
            initial_state: values(self.h0),
        };
        let (o, last) = selective::forward(&self.shape, &inputs);
        let (d_o, dht) = (cotangent(case, "o", o.len()), cotangent(case, "ht", last.len()));
        let grad = selective::backward(&self.shape, &inputs, &d_o, Some(&dht));
        results([
            ("out.o", o),
            ("out.ht", last),
            ("grad.u", grad.u),
            ("grad.dt", grad.dt),
            ("grad.dt_bias", grad.dt_bias),
            ("grad.A", grad.a),
            ("grad.B", grad.b),
            ("grad.C", grad.c),
            ("grad.D", grad.d),
            ("grad.z", grad.z),
            ("grad.h0", grad.initial_state),
        ])
    }

    fn run(&self, _: &mut Graph<'_>) -> Result<(), scan::Error> {
        Ok(())
    }
}
