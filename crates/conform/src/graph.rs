//! A case on its way through Burn's autodiff.

use crate::{Case, Error, Results, Tensor};
use burn::Tensor as Burn;
use burn::tensor::{Device, Gradients, TensorData};
use thalweg_reference::Shape;
use thalweg_scan as scan;

/// An input: its name, number of elements and, after the backward pass, its gradient.
type Leaf = (String, usize, Box<dyn Fn(&Gradients) -> Option<TensorData>>);

/// A case on its way through the engine: the leaves to differentiate, the outputs, and the loss over them.
pub(crate) struct Graph<'a> {
    pub(crate) case: &'a Case,
    pub(crate) device: &'a Device,
    pub(crate) path: scan::Path,
    pub(crate) leaves: Vec<Leaf>,
    pub(crate) results: Results,
    pub(crate) loss: Option<Burn<1>>,
}

impl<'a> Graph<'a> {
    /// An empty graph.
    pub(crate) fn new(case: &'a Case, device: &'a Device, path: scan::Path) -> Self {
        Self { case, device, path, leaves: Vec::new(), results: Results::new(), loss: None }
    }

    /// A tensor of the case on the device; its rank was checked when the case was parsed.
    pub(crate) fn constant<const D: usize>(&self, tensor: &Tensor) -> Burn<D> {
        let values: Vec<_> = tensor.values.iter().map(|&x| x as f32).collect();
        Burn::from_data(TensorData::new(values, tensor.shape.clone()), self.device)
    }

    /// An input whose gradient is wanted.
    pub(crate) fn input<const D: usize>(&mut self, name: &str, tensor: &Tensor) -> Burn<D> {
        let leaf = self.constant::<D>(tensor).require_grad();
        let handle = leaf.clone();
        let gradient = move |gradients: &Gradients| handle.grad(gradients).map(|grad| grad.into_data());
        self.leaves.push((format!("grad.{name}"), tensor.values.len(), Box::new(gradient)));
        leaf
    }

    /// An input that may be absent.
    pub(crate) fn optional<const D: usize>(&mut self, name: &str, tensor: Option<&Tensor>) -> Option<Burn<D>> {
        tensor.map(|tensor| self.input(name, tensor))
    }

    /// An initial state that may be absent; zeros if the file has none but wants its gradient.
    pub(crate) fn state<const D: usize>(
        &mut self,
        name: &str,
        tensor: Option<&Tensor>,
        shape: [usize; D],
    ) -> Option<Burn<D>> {
        if tensor.is_none() && self.case.wants_gradient(name) {
            let zeros = Tensor { shape: shape.to_vec(), values: vec![0.0; shape.iter().product()] };
            return Some(self.input(name, &zeros));
        }
        self.optional(name, tensor)
    }

    /// Records an output and adds its part of the loss.
    pub(crate) fn output<const D: usize>(&mut self, name: &str, output: Burn<D>) {
        self.results.insert(format!("out.{name}"), values(output.clone().into_data()));
        if let Some(cotangent) = self.case.cotangent(name) {
            let part = (self.constant::<D>(cotangent) * output).sum();
            self.loss = Some(match self.loss.take() {
                Some(loss) => loss + part,
                None => part,
            });
        }
    }

    /// Differentiates the loss in every leaf; one that the loss does not depend on has gradient zero.
    pub(crate) fn finish(mut self) -> Result<Results, Error> {
        let gradients = self.loss.map(|loss| loss.backward());
        for (name, len, gradient) in self.leaves {
            let found = gradients.as_ref().and_then(&gradient).map_or_else(|| vec![0.0; len], values);
            self.results.insert(name, found);
        }
        Ok(self.results)
    }

    /// Options of an element-wise scan.
    pub(crate) fn scan_options(&mut self, shape: &Shape, h0: Option<&Tensor>) -> scan::ScanOptions {
        scan::ScanOptions {
            initial_state: self.state("h0", h0, [shape.sequences().len(), shape.channels]),
            cu_seqlens: shape.cu_seqlens.clone(),
            path: self.path,
        }
    }
}

fn values(data: TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}
