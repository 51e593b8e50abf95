//! Causal softmax attention. A step is one query against a cache of `time` tokens.

use super::{Any, Input, Op, cotangent, narrow, total, widen, with_tolerance};
use crate::noise::{signed, wide};
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Error, Pass, Path};
use burn::tensor::Device;
use half::bf16;
#[cfg(feature = "gpu")]
use thalweg_gpu as gpu;
use thalweg_kernels::Element;
use thalweg_kernels::attention::{self, AttentionGradients, AttentionOutputs, AttentionProblem, StepProblem};
use thalweg_kernels::cost::{self, Cost};
use thalweg_reference::attention as oracle;
use thalweg_scan as scan;

pub(super) struct Data {
    /// `time` is 1 in a step.
    problem: AttentionProblem,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

pub(super) fn build(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    let data = data(case);
    match (case.path, case.dtype) {
        (Path::Native, Dtype::F32) => Ok(Box::new(Native::<f32>::new(data, case))),
        (Path::Native, Dtype::Bf16) => Ok(Box::new(Native::<bf16>::new(data, case))),
        _ => super::on_burn(data, case, device),
    }
}

pub(super) fn data(case: &Case) -> Data {
    let [batch, time, heads, head_dim] = case.shape[..] else { unreachable!("checked by `ops::build`") };
    let queries = if case.pass == Pass::Step { 1 } else { time };
    let problem = AttentionProblem { kv_time: time, ..AttentionProblem::new(batch, queries, heads, head_dim) };
    let tensor = |id, time| case.dtype.round(signed(id, [batch, time, heads * head_dim]));
    Data { q: tensor(1, queries), k: tensor(2, time), v: tensor(3, time), problem }
}

impl Data {
    fn shape(&self, time: usize) -> Vec<usize> {
        vec![self.problem.batch, time, self.problem.heads, self.problem.key_dim]
    }
}

impl Op for Data {
    fn inputs(&self) -> Vec<Input> {
        let input = |gradient, time, values: &Vec<f32>| Input {
            gradient,
            shape: self.shape(time),
            values: values.clone(),
            stored: true,
        };
        let AttentionProblem { time, kv_time, .. } = self.problem;
        vec![input("dq", time, &self.q), input("dk", kv_time, &self.k), input("dv", kv_time, &self.v)]
    }

    fn state(&self) -> Option<Input> {
        None
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let AttentionProblem { batch, time, kv_time, heads, kv_heads, key_dim, value_dim, scale, .. } = self.problem;
        let scale = f64::from(scale);
        let (window, cu_seqlens) = (None, None);
        let problem =
            oracle::Problem { batch, time: kv_time, heads, kv_heads, key_dim, value_dim, scale, window, cu_seqlens };
        // The oracle has as many queries as keys: those before a step's are zero, and not looked at.
        let row = heads * key_dim;
        let q: Vec<f64> = wide(&self.q)
            .chunks(time * row)
            .flat_map(|q| [vec![0.0; (kv_time - time) * row], q.to_vec()].concat())
            .collect();
        let (k, v) = (wide(&self.k), wide(&self.v));
        let o = oracle::forward(&problem, &q, &k, &v);
        let row = heads * value_dim;
        let last = o.chunks(kv_time * row).flat_map(|o| o[(kv_time - time) * row..].to_vec()).collect();
        let mut expected = vec![("o", last)];
        if pass == Pass::Train {
            let d = oracle::backward(&problem, &q, &k, &v, &wide(d_o));
            expected.extend([("dq", d.q), ("dk", d.k), ("dv", d.v)]);
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        self.shape(self.problem.time)
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        total(pass, |pass| cost::attention(&self.problem, element, pass))
    }

    fn tokens(&self) -> usize {
        self.problem.batch * self.problem.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let options = scan::AttentionOptions::new().with_path(path);
        Ok(scan::attention(x[0].r4(), x[1].r4(), x[2].r4(), options)?.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error> {
        Ok((self.apply(x, path)?, state))
    }
}

#[cfg(feature = "gpu")]
impl super::gpu::GpuOp for Data {
    fn launch(
        &self,
        client: &gpu::Client,
        x: &[gpu::Buffer],
        d_o: &[gpu::Buffer],
        _state: Option<&gpu::Buffer>,
    ) -> Result<super::gpu::Found, thalweg_kernels::Error> {
        let [q, k, v] = x else { unreachable!("three tensors go in") };
        let inputs = gpu::attention::Inputs { q, k, v };
        let out = gpu::attention::forward(client, &self.problem, &inputs)?;
        let mut found = vec![("o", out.o.clone())];
        if let Some(d_o) = d_o.first() {
            let d = gpu::attention::backward(client, &self.problem, &inputs, &out, d_o)?;
            found.extend([("dq", d.dq), ("dk", d.dk), ("dv", d.dv)]);
        }
        Ok(found)
    }
}

/// The kernels on slices.
struct Native<E> {
    data: Data,
    case: Case,
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    d_o: Vec<E>,
    out: AttentionOutputs<E>,
    gradients: Option<AttentionGradients<E>>,
}

impl<E: Element> Native<E> {
    fn new(data: Data, case: &Case) -> Self {
        let train = case.pass == Pass::Train;
        Self {
            q: narrow(&data.q),
            k: narrow(&data.k),
            v: narrow(&data.v),
            d_o: if train { narrow(&cotangent(case, &data.output())) } else { Vec::new() },
            out: AttentionOutputs { o: Vec::new(), lse: Vec::new() },
            gradients: None,
            case: case.clone(),
            data,
        }
    }
}

impl<E: Element> Workload for Native<E> {
    fn run(&mut self) -> Result<(), Error> {
        let (p, q, k, v) = (&self.data.problem, &self.q[..], &self.k[..], &self.v[..]);
        if self.case.pass == Pass::Step {
            let AttentionProblem { batch, kv_time: capacity, heads, kv_heads, key_dim, value_dim, scale, .. } = *p;
            let problem = StepProblem { batch, capacity, heads, kv_heads, key_dim, value_dim, scale };
            self.out.o = attention::step(&problem, q, k, v, &vec![capacity; batch])?;
            return Ok(());
        }
        self.out = attention::forward(p, q, k, v)?;
        if self.case.pass == Pass::Train {
            self.gradients = Some(attention::backward(p, q, k, v, &self.out, &self.d_o)?);
        }
        Ok(())
    }

    fn found(&self) -> Vec<Named> {
        let mut found = vec![("o", &self.out.o)];
        found.extend(self.gradients.iter().flat_map(|d| [("dq", &d.dq), ("dk", &d.dk), ("dv", &d.dv)]));
        found.into_iter().map(|(name, x)| Named { name, values: widen(x) }).collect()
    }

    fn head(&self, len: usize) -> Vec<f64> {
        widen(&self.out.o[..len.min(self.out.o.len())])
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let d_o: Vec<f32> = self.d_o.iter().map(|x| x.to_f32()).collect();
        Ok(with_tolerance(&self.case, self.data.expected(self.case.pass, &d_o)))
    }

    fn cost(&self) -> Cost {
        self.data.cost(self.case.pass, self.case.dtype.size())
    }

    fn tokens(&self) -> usize {
        self.data.tokens()
    }
}
