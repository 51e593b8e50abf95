//! The Burn operations as a runner: native kernels or the portable body, gradients by Burn's autodiff.

use crate::graph::Graph;
use crate::{Case, Error, Results, Runner};
use burn::tensor::Device;
use thalweg_scan as scan;

/// Runs cases through `thalweg-scan` in f32.
#[derive(Debug, Clone)]
pub struct Engine {
    path: scan::Path,
    device: Device,
}

impl Engine {
    /// The native kernels, of the CPU until [`Engine::on`] says otherwise.
    pub fn native() -> Self {
        Self { path: scan::Path::Auto, device: Device::flex().autodiff() }
    }

    /// The portable body in Burn tensor operations.
    pub fn portable() -> Self {
        Self { path: scan::Path::Portable, device: Device::flex().autodiff() }
    }

    /// The same on another device.
    pub fn on(self, device: Device) -> Self {
        Self { device: device.autodiff(), ..self }
    }
}

impl Runner for Engine {
    fn run(&self, case: &Case) -> Result<Results, Error> {
        let operation = case.operation()?;
        if !operation.implemented {
            return Err(Error::NotImplemented { op: case.op.clone() });
        }
        let mut graph = Graph::new(case, &self.device, self.path);
        let problem = (operation.parse)(case)?;
        problem.run(&mut graph).map_err(|error| Error::Engine(error.to_string()))?;
        graph.finish()
    }
}
