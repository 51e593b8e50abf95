//! An operation through Burn: its tensors, its autodiff.

use super::{Input, Op, cotangent, with_tolerance};
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Error, Pass, Path};
use burn::Tensor;
use burn::tensor::{DType, Device, Gradients, TensorData};
use thalweg_kernels::cost::Cost;
use thalweg_scan as scan;

/// Makes [`Any`] and its conversions.
macro_rules! any {
    ($($variant:ident $method:ident $rank:literal),+) => {
        /// A tensor of any rank.
        #[derive(Clone)]
        pub(crate) enum Any {
            $($variant(Tensor<$rank>)),+
        }

        impl Any {
            $(
                /// The tensor; an operation knows the ranks of its own arguments.
                pub fn $method(&self) -> Tensor<$rank> {
                    match self {
                        Any::$variant(x) => x.clone(),
                        other => unreachable!("a tensor of {} axes, not {}", other.rank(), $rank),
                    }
                }
            )+

            fn rank(&self) -> usize {
                match self {
                    $(Any::$variant(_) => $rank),+
                }
            }

            fn new(input: &Input, dtype: Dtype, device: &Device, tracked: bool) -> Self {
                let dtype = if input.stored && dtype == Dtype::Bf16 { DType::BF16 } else { DType::F32 };
                let data = TensorData::new(input.values.clone(), input.shape.clone());
                match input.shape.len() {
                    $($rank => {
                        let x = Tensor::<$rank>::from_data(data, (device, dtype));
                        Any::$variant(if tracked { x.require_grad() } else { x })
                    })+
                    rank => unreachable!("no operation takes {rank} axes"),
                }
            }

            fn values(&self) -> Vec<f64> {
                match self {
                    $(Any::$variant(x) => floats(x.clone().into_data())),+
                }
            }

            fn backward(&self) -> Gradients {
                match self {
                    $(Any::$variant(x) => x.backward()),+
                }
            }

            fn gradient(&self, gradients: &Gradients) -> Option<Vec<f64>> {
                match self {
                    $(Any::$variant(x) => x.grad(gradients).map(|x| floats(x.into_data()))),+
                }
            }

            /// The first `len` elements: rows of the leading axes are enough for them.
            fn head(&self, len: usize) -> Vec<f64> {
                match self {
                    $(Any::$variant(x) => floats(x.clone().reshape([-1]).narrow(0, 0, len).into_data())),+
                }
            }
        }

        $(
            impl From<Tensor<$rank>> for Any {
                fn from(x: Tensor<$rank>) -> Self {
                    Any::$variant(x)
                }
            }
        )+
    };
}
any!(R1 r1 1, R2 r2 2, R3 r3 3, R4 r4 4);

fn floats(data: TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}

/// A pass of an operation on Burn tensors.
pub(crate) struct BurnOp {
    op: Box<dyn Op>,
    case: Case,
    path: scan::Path,
    names: Vec<&'static str>,
    leaves: Vec<Any>,
    state: Option<Any>,
    output: Option<Any>,
    gradients: Option<Gradients>,
}

impl BurnOp {
    pub fn new(op: Box<dyn Op>, case: &Case, device: &Device) -> Self {
        let train = case.pass == Pass::Train;
        let device = if train { device.clone().autodiff() } else { device.clone() };
        let inputs = op.inputs();
        let state = if case.pass == Pass::Step { op.state() } else { None };
        Self {
            path: if case.path == Path::Portable { scan::Path::Portable } else { scan::Path::Auto },
            names: inputs.iter().map(|input| input.gradient).collect(),
            leaves: inputs.iter().map(|input| Any::new(input, case.dtype, &device, train)).collect(),
            state: state.map(|state| Any::new(&state, Dtype::F32, &device, false)),
            output: None,
            gradients: None,
            case: case.clone(),
            op,
        }
    }
}

impl Workload for BurnOp {
    fn run(&mut self) -> Result<(), Error> {
        if let Some(state) = self.state.take() {
            let (output, state) = self.op.apply_step(&self.leaves, state, self.path)?;
            (self.output, self.state) = (Some(output), Some(state));
            return Ok(());
        }
        let output = self.op.apply(&self.leaves, self.path)?;
        if self.case.pass == Pass::Train {
            self.gradients = Some(output.backward());
        }
        self.output = Some(output);
        Ok(())
    }

    fn found(&self) -> Vec<Named> {
        let output = self.output.as_ref().map(|o| Named { name: "o", values: o.values() });
        let state = self.state.as_ref().map(|s| Named { name: "state", values: s.values() });
        let gradients = self.gradients.iter().flat_map(|gradients| {
            let leaves = self.names.iter().zip(&self.leaves);
            leaves.map(|(name, leaf)| Named { name, values: leaf.gradient(gradients).unwrap_or_default() })
        });
        output.into_iter().chain(state).chain(gradients).collect()
    }

    fn head(&self, len: usize) -> Vec<f64> {
        self.output.as_ref().map(|o| o.head(len)).unwrap_or_default()
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let d_o = cotangent(&self.case, &self.op.output());
        Ok(with_tolerance(&self.case, self.op.expected(self.case.pass, &d_o)))
    }

    fn cost(&self) -> Cost {
        self.op.cost(self.case.pass, self.case.dtype.size())
    }

    fn tokens(&self) -> usize {
        self.op.tokens()
    }
}
