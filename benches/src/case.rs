//! What is benchmarked: one operation, layer or model at one shape.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Implements `name`, `Display` and `FromStr` of an enum of plain names.
macro_rules! names {
    ($ty:ident, $argument:literal: $($variant:ident = $name:literal),+) => {
        impl $ty {
            /// All values.
            pub const ALL: &[$ty] = &[$($ty::$variant),+];

            /// The name in options and reports.
            pub fn name(self) -> &'static str {
                match self {
                    $($ty::$variant => $name),+
                }
            }
        }

        impl fmt::Display for $ty {
            fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $ty {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                let names = [$($name),+];
                Self::ALL.iter().copied().find(|x| x.name() == text).ok_or_else(|| {
                    Error::argument($argument, format!("is `{text}`, expected one of {}", names.join(", ")))
                })
            }
        }
    };
}

/// The level of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Part {
    Ops,
    Layers,
    Models,
}
names!(Part, "part": Ops = "ops", Layers = "layers", Models = "models");

/// What of it is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pass {
    /// All tokens; of layers and models: prefill.
    #[serde(rename = "forward")]
    Forward,
    /// All tokens and the gradients of all inputs; of layers of all parameters too; of models a whole training step with
    /// its optimizer.
    #[serde(rename = "forward+backward")]
    Train,
    /// One token on a state.
    #[serde(rename = "step")]
    Step,
}
names!(Pass, "pass": Forward = "forward", Train = "forward+backward", Step = "step");

/// Element type of the tensors in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    Bf16,
}
names!(Dtype, "dtype": F32 = "f32", Bf16 = "bf16");

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        if self == Dtype::F32 { 4 } else { 2 }
    }
}

/// How it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// The kernels on slices, without Burn.
    Native,
    /// Burn tensors, the kernels below; gradients by Burn's autodiff.
    Burn,
    /// Burn tensor operations only.
    Portable,
    /// The kernels on the first GPU, without Burn.
    Gpu,
}
names!(Path, "path": Native = "native", Burn = "burn", Portable = "portable", Gpu = "gpu");

/// One benchmark.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Case {
    /// Level of the stack.
    pub part: Part,
    /// Name of the operation, layer or model.
    pub name: String,
    /// What is run of it.
    pub pass: Pass,
    /// Sizes, in the order of [`Entry::axes`](crate::Entry::axes); batch and time come first.
    pub shape: Vec<usize>,
    /// Tokens per chunk, of chunked operations.
    #[serde(default)]
    pub chunk: Option<usize>,
    /// Element type.
    pub dtype: Dtype,
    /// How it is called.
    pub path: Path,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Case { part, name, pass, shape, chunk, dtype, path } = self;
        write!(f, "{part}/{name}/{pass} {shape:?} {dtype} {path}")?;
        match chunk {
            Some(chunk) => write!(f, " chunk {chunk}"),
            None => Ok(()),
        }
    }
}

impl Case {
    /// The same with fewer rows and tokens, for comparison with the oracle: more than one chunk, and no multiple of it.
    pub(crate) fn small(&self, batch: usize) -> Case {
        let mut small = self.clone();
        small.shape[0] = small.shape[0].min(batch);
        small.shape[1] = small.shape[1].min(self.chunk.unwrap_or(64) + 36);
        small
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_options_and_reports() {
        for pass in Pass::ALL {
            assert_eq!(serde_json::to_string(pass).unwrap(), format!("\"{pass}\""));
            assert_eq!(pass.name().parse::<Pass>().unwrap(), *pass);
        }
        assert_eq!("bf16".parse::<Dtype>().unwrap(), Dtype::Bf16);
        let error = "f64".parse::<Dtype>().unwrap_err().to_string();
        assert_eq!(error, "`dtype` is `f64`, expected one of f32, bf16");
    }
}
