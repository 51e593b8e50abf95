//! The oracle's runs of SSD, RWKV and the selective scan.

use crate::parse_models::{Rwkv, Selective, Ssd, Version};
use crate::reference::{cotangent, results, values};
use crate::{Case, Results, Tensor};
use thalweg_reference::{models, selective};

impl Ssd<'_> {
    pub(crate) fn run(&self, case: &Case) -> Results {
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
}

impl Rwkv<'_> {
    pub(crate) fn run(&self, case: &Case) -> Results {
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
}

impl Selective<'_> {
    pub(crate) fn run(&self, case: &Case) -> Results {
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
}
