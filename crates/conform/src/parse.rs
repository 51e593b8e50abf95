//! From a case's tensors to the problem of its operation, all shapes checked.

use crate::parse_models::{Rwkv, Selective, Ssd};
use crate::{Case, Error, Tensor};
use thalweg_reference::matrix::Problem;
use thalweg_reference::{Shape, attention};

/// Which decay a matrix recurrence has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decay {
    None,
    Constant,
    Head,
    Key,
}

/// Which write a matrix recurrence has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    Additive,
    Delta,
    LowRank,
}

/// A matrix recurrence; tensors that the operation does not have are `None`.
pub(crate) struct Matrix<'a> {
    pub problem: Problem,
    pub q: &'a Tensor,
    /// `None` for HGRN2, whose key is `1 - exp(g)`.
    pub k: Option<&'a Tensor>,
    pub v: &'a Tensor,
    pub decay: Decay,
    /// `g`, or `g_gamma` for a constant gate.
    pub gate: Option<&'a Tensor>,
    pub write: Write,
    pub beta: Option<&'a Tensor>,
    pub a: Option<&'a Tensor>,
    pub b: Option<&'a Tensor>,
    pub h0: Option<&'a Tensor>,
    pub l2norm: bool,
}

/// Linear attention with its normaliser.
pub(crate) struct Normalised<'a> {
    pub problem: Problem,
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub h0: Option<&'a Tensor>,
    pub z0: Option<&'a Tensor>,
}

/// Softmax attention.
pub(crate) struct Attention<'a> {
    pub problem: attention::Problem,
    pub q: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
}

/// `h = exp(g) h + x`.
pub(crate) struct Scan<'a> {
    pub shape: Shape,
    pub g: &'a Tensor,
    pub x: &'a Tensor,
    pub h0: Option<&'a Tensor>,
}

/// The complex scan, `lambda` constant over time or not.
pub(crate) struct ComplexScan<'a> {
    pub shape: Shape,
    pub log_a: &'a Tensor,
    pub theta: &'a Tensor,
    pub b_re: &'a Tensor,
    pub b_im: &'a Tensor,
    pub h0_re: Option<&'a Tensor>,
    pub h0_im: Option<&'a Tensor>,
}

/// RG-LRU with its block-diagonal gates.
pub(crate) struct RgLru<'a> {
    pub shape: Shape,
    pub blocks: usize,
    pub x: &'a Tensor,
    pub recurrent_weight: &'a Tensor,
    pub recurrent_bias: &'a Tensor,
    pub input_weight: &'a Tensor,
    pub input_bias: &'a Tensor,
    pub param: &'a Tensor,
    pub reset: Option<Vec<bool>>,
    pub h0: Option<&'a Tensor>,
}

/// Depth-wise causal convolution.
pub(crate) struct ShortConv<'a> {
    pub shape: Shape,
    pub width: usize,
    pub x: &'a Tensor,
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    pub silu: bool,
    pub state: Option<&'a Tensor>,
}

/// The problem of a case.
pub(crate) enum Parsed<'a> {
    Matrix(Matrix<'a>),
    Normalised(Normalised<'a>),
    Attention(Attention<'a>),
    Scan(Scan<'a>),
    ComplexScan(ComplexScan<'a>),
    RgLru(RgLru<'a>),
    ShortConv(ShortConv<'a>),
    Ssd(Ssd<'a>),
    Rwkv(Rwkv<'a>),
    Selective(Selective<'a>),
}

impl Case {
    /// The case's problem, with every tensor's shape checked against the others.
    pub(crate) fn parse(&self) -> Result<Parsed<'_>, Error> {
        use Decay as D;
        use Write as W;
        let matrix = |decay, write| self.matrix(decay, write).map(Parsed::Matrix);
        match self.op.as_str() {
            "linear_attn" if self.normalize() => self.normalised().map(Parsed::Normalised),
            "linear_attn" => matrix(D::None, W::Additive),
            "linear_attn_norm" => self.normalised().map(Parsed::Normalised),
            "lightning" | "retention" => matrix(D::Constant, W::Additive),
            "simple_gla" => matrix(D::Head, W::Additive),
            "gla" | "hgrn2" => matrix(D::Key, W::Additive),
            "delta_rule" => matrix(D::None, W::Delta),
            "gated_delta_rule" | "gated_delta_rule_l2norm" => matrix(D::Head, W::Delta),
            "kda" => matrix(D::Key, W::Delta),
            "dplr" => matrix(D::Key, W::LowRank),
            "attention" => self.attention().map(Parsed::Attention),
            "hgrn" => self.scan().map(Parsed::Scan),
            "complex_scan" => self.complex_scan().map(Parsed::ComplexScan),
            "rg_lru" => self.rg_lru().map(Parsed::RgLru),
            "short_conv" => self.short_conv().map(Parsed::ShortConv),
            "ssd" => self.ssd().map(Parsed::Ssd),
            "rwkv6" | "rwkv7" => self.rwkv().map(Parsed::Rwkv),
            "selective_scan" => self.selective().map(Parsed::Selective),
            op => Err(Error::UnsupportedOp { op: op.to_string() }),
        }
    }

    fn matrix(&self, decay: Decay, write: Write) -> Result<Matrix<'_>, Error> {
        let problem = self.matrix_problem()?;
        let Problem { batch, time, heads, value_heads, key_dim, .. } = problem;
        let keys = [batch, time, heads, key_dim];
        let rows = [batch, time, value_heads];
        let tied_key = self.op == "hgrn2";
        let gate = match decay {
            Decay::None => None,
            Decay::Constant => Some(self.input("g_gamma", &[value_heads])?),
            Decay::Head => Some(self.input("g", &rows)?),
            Decay::Key => Some(self.input("g", &[batch, time, value_heads, key_dim])?),
        };
        let only = |condition: bool, name: &str, shape: &[usize]| {
            if condition { self.input(name, shape).map(Some) } else { Ok(None) }
        };
        if (tied_key || write == Write::LowRank) && heads != value_heads {
            return Err(self.misfit("in.v", format!("as many heads as `in.q` has, {heads}")));
        }
        Ok(Matrix {
            q: self.input("q", &keys)?,
            k: only(!tied_key, "k", &keys)?,
            v: self.any("in.v")?,
            decay,
            gate,
            write,
            beta: only(write == Write::Delta, "beta", &rows)?,
            a: only(write == Write::LowRank, "a", &keys)?,
            b: only(write == Write::LowRank, "b", &keys)?,
            h0: self.matrix_state(&problem)?,
            l2norm: self.op == "gated_delta_rule_l2norm",
            problem,
        })
    }

    fn normalised(&self) -> Result<Normalised<'_>, Error> {
        let problem = self.matrix_problem()?;
        let Problem { batch, time, heads, key_dim, .. } = problem;
        let keys = [batch, time, heads, key_dim];
        Ok(Normalised {
            q: self.input("q", &keys)?,
            k: self.input("k", &keys)?,
            v: self.any("in.v")?,
            h0: self.matrix_state(&problem)?,
            z0: self.state("z0", "zt", &[problem.sequences(), 1, heads, key_dim])?,
            problem,
        })
    }

    fn matrix_problem(&self) -> Result<Problem, Error> {
        let [batch, time, heads, key_dim] = self.sizes("in.q")?;
        let [v_batch, v_time, value_heads, value_dim] = self.sizes("in.v")?;
        if (v_batch, v_time) != (batch, time) || value_heads % heads != 0 {
            return Err(self.misfit("in.v", format!("[{batch}, {time}, a multiple of {heads}, any]")));
        }
        self.output("o", &[batch, time, value_heads, value_dim])?;
        let (scale, cu_seqlens) = (self.scale(key_dim)?, self.cu_seqlens(batch, time)?);
        Ok(Problem { batch, time, heads, value_heads, key_dim, value_dim, scale, cu_seqlens })
    }

    pub(crate) fn matrix_state(&self, p: &Problem) -> Result<Option<&Tensor>, Error> {
        self.state("h0", "ht", &[p.sequences(), p.value_heads, p.key_dim, p.value_dim])
    }

    fn attention(&self) -> Result<Attention<'_>, Error> {
        let [batch, time, heads, key_dim] = self.sizes("in.q")?;
        let [v_batch, v_time, kv_heads, value_dim] = self.sizes("in.v")?;
        if (v_batch, v_time) != (batch, time) || heads % kv_heads != 0 {
            return Err(self.misfit("in.v", format!("[{batch}, {time}, a divisor of {heads}, any]")));
        }
        self.output("o", &[batch, time, heads, value_dim])?;
        let (scale, window) = (self.scale(key_dim)?, self.window()?);
        let cu_seqlens = self.cu_seqlens(batch, time)?;
        let problem =
            attention::Problem { batch, time, heads, kv_heads, key_dim, value_dim, scale, window, cu_seqlens };
        Ok(Attention {
            problem,
            q: self.any("in.q")?,
            k: self.input("k", &[batch, time, kv_heads, key_dim])?,
            v: self.any("in.v")?,
        })
    }

    pub(crate) fn channels(&self, name: &str) -> Result<Shape, Error> {
        let [batch, time, channels] = self.sizes(name)?;
        Ok(Shape { batch, time, channels, cu_seqlens: self.cu_seqlens(batch, time)? })
    }

    fn scan(&self) -> Result<Scan<'_>, Error> {
        let shape = self.channels("in.x")?;
        let full = [shape.batch, shape.time, shape.channels];
        self.output("o", &full)?;
        let h0 = self.state("h0", "ht", &[shape.sequences().len(), shape.channels])?;
        Ok(Scan { g: self.input("g", &full)?, x: self.any("in.x")?, h0, shape })
    }

    fn complex_scan(&self) -> Result<ComplexScan<'_>, Error> {
        let shape = self.channels("in.b_re")?;
        let full = [shape.batch, shape.time, shape.channels];
        let lambda = |name: &str| match self.any(&format!("in.{name}"))?.shape.len() {
            1 => self.input(name, &full[2..]),
            _ => self.input(name, &full),
        };
        let (log_a, theta) = (lambda("log_a")?, lambda("theta")?);
        if log_a.shape != theta.shape {
            return Err(self.misfit("in.theta", format!("that of `in.log_a`, {:?}", log_a.shape)));
        }
        for part in ["o_re", "o_im"] {
            self.output(part, &full)?;
        }
        let state = [shape.sequences().len(), shape.channels];
        Ok(ComplexScan {
            log_a,
            theta,
            b_re: self.any("in.b_re")?,
            b_im: self.input("b_im", &full)?,
            h0_re: self.state("h0_re", "ht_re", &state)?,
            h0_im: self.state("h0_im", "ht_im", &state)?,
            shape,
        })
    }

    fn rg_lru(&self) -> Result<RgLru<'_>, Error> {
        let shape = self.channels("in.x")?;
        let [blocks, width] = self.sizes("in.recurrent_gate_bias")?;
        let Shape { batch, time, channels, .. } = shape;
        if blocks * width != channels {
            return Err(self.misfit("in.recurrent_gate_bias", format!("[blocks, width] with product {channels}")));
        }
        self.output("o", &[batch, time, channels])?;
        let reset = match self.tensors.get("int.position_ids") {
            None => None,
            Some(_) => {
                let positions = self.expect("int.position_ids", &[batch, time])?;
                Some(positions.values.iter().map(|&position| position == 0.0).collect())
            }
        };
        Ok(RgLru {
            blocks,
            x: self.any("in.x")?,
            recurrent_weight: self.input("recurrent_gate_weight", &[blocks, width, width])?,
            recurrent_bias: self.any("in.recurrent_gate_bias")?,
            input_weight: self.input("input_gate_weight", &[blocks, width, width])?,
            input_bias: self.input("input_gate_bias", &[blocks, width])?,
            param: self.input("recurrent_param", &[channels])?,
            reset,
            h0: self.state("h0", "ht", &[shape.sequences().len(), channels])?,
            shape,
        })
    }

    fn short_conv(&self) -> Result<ShortConv<'_>, Error> {
        let shape = self.channels("in.x")?;
        let [_, width] = self.sizes("in.weight")?;
        self.output("o", &[shape.batch, shape.time, shape.channels])?;
        Ok(ShortConv {
            width,
            x: self.any("in.x")?,
            weight: self.input("weight", &[shape.channels, width])?,
            bias: self.optional("bias", &[shape.channels])?,
            silu: self.silu()?,
            state: self.state("state", "state", &[shape.sequences().len(), shape.channels, width - 1])?,
            shape,
        })
    }

    pub(crate) fn any(&self, tensor: &str) -> Result<&Tensor, Error> {
        self.tensors.get(tensor).ok_or_else(|| Error::Missing { tensor: tensor.to_string() })
    }

    pub(crate) fn expect(&self, tensor: &str, shape: &[usize]) -> Result<&Tensor, Error> {
        let found = self.any(tensor)?;
        if found.shape == shape { Ok(found) } else { Err(self.misfit(tensor, format!("{shape:?}"))) }
    }

    pub(crate) fn misfit(&self, tensor: &str, expected: String) -> Error {
        let found = self.tensors.get(tensor).map(|t| t.shape.clone()).unwrap_or_default();
        Error::Shape { tensor: tensor.to_string(), found, expected }
    }

    /// Sizes of a tensor of known rank, none of them zero.
    pub(crate) fn sizes<const RANK: usize>(&self, tensor: &str) -> Result<[usize; RANK], Error> {
        let shape = self.any(tensor)?.shape.as_slice();
        let sizes = <[usize; RANK]>::try_from(shape).ok().filter(|sizes| !sizes.contains(&0));
        sizes.ok_or_else(|| self.misfit(tensor, format!("{RANK} sizes, none of them 0")))
    }

    /// An input that must be there.
    pub(crate) fn input(&self, name: &str, shape: &[usize]) -> Result<&Tensor, Error> {
        self.expect(&format!("in.{name}"), shape)
    }

    /// Checks the cotangent of an output.
    pub(crate) fn output(&self, name: &str, shape: &[usize]) -> Result<(), Error> {
        match self.cotangent(name) {
            Some(_) => self.expect(&format!("cot.{name}"), shape).map(|_| ()),
            None => Ok(()),
        }
    }

    /// An initial state, which may be absent, together with the cotangent of the final state.
    pub(crate) fn state(&self, initial: &str, last: &str, shape: &[usize]) -> Result<Option<&Tensor>, Error> {
        self.output(last, shape)?;
        self.optional(initial, shape)
    }

    /// An input that may be absent.
    pub(crate) fn optional(&self, name: &str, shape: &[usize]) -> Result<Option<&Tensor>, Error> {
        match self.tensors.contains_key(&format!("in.{name}")) {
            true => self.input(name, shape).map(Some),
            false => Ok(None),
        }
    }

    pub(crate) fn cu_seqlens(&self, batch: usize, time: usize) -> Result<Option<Vec<usize>>, Error> {
        let Some(tensor) = self.tensors.get("int.cu_seqlens") else { return Ok(None) };
        let values = &tensor.values;
        let fits = batch == 1
            && values.len() >= 2
            && values[0] == 0.0
            && values[values.len() - 1] == time as f64
            && values.is_sorted_by(|a, b| a < b);
        if !fits {
            let expected = "0 to the number of tokens, increasing, with a batch of 1";
            return Err(Error::Value { name: "int.cu_seqlens".into(), found: format!("{values:?}"), expected });
        }
        Ok(Some(values.iter().map(|&x| x as usize).collect()))
    }
}
