//! [`crate::parse`] for SSD, RWKV and the selective scan.

use crate::{Case, Error, Tensor};
use thalweg_reference::Shape;
use thalweg_reference::matrix::Problem;

/// Mamba-2's state-space dual; the problem's heads are the groups of `b` and `c`.
pub(crate) struct Ssd<'a> {
    pub problem: Problem,
    pub x: &'a Tensor,
    pub dt: &'a Tensor,
    pub dt_bias: Option<&'a Tensor>,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub c: &'a Tensor,
    pub d: Option<&'a Tensor>,
    pub h0: Option<&'a Tensor>,
}

/// RWKV-6 (with `u`) or RWKV-7 (with `kk` and `a`).
pub(crate) struct Rwkv<'a> {
    pub problem: Problem,
    pub r: &'a Tensor,
    pub w: &'a Tensor,
    pub k: &'a Tensor,
    pub v: &'a Tensor,
    pub version: Version<'a>,
    pub h0: Option<&'a Tensor>,
}

/// What differs between the two.
pub(crate) enum Version<'a> {
    Six { u: &'a Tensor },
    Seven { kk: &'a Tensor, a: &'a Tensor },
}

/// Mamba-1's selective scan.
pub(crate) struct Selective<'a> {
    pub shape: Shape,
    pub u: &'a Tensor,
    pub dt: &'a Tensor,
    pub dt_bias: Option<&'a Tensor>,
    pub a: &'a Tensor,
    pub b: &'a Tensor,
    pub c: &'a Tensor,
    pub d: Option<&'a Tensor>,
    pub z: Option<&'a Tensor>,
    pub h0: Option<&'a Tensor>,
}

impl Case {
    pub(crate) fn ssd(&self) -> Result<Ssd<'_>, Error> {
        let [batch, time, value_heads, value_dim] = self.sizes("in.x")?;
        let [b_batch, b_time, heads, key_dim] = self.sizes("in.B")?;
        if (b_batch, b_time) != (batch, time) || value_heads % heads != 0 {
            return Err(self.misfit("in.B", format!("[{batch}, {time}, a divisor of {value_heads}, any]")));
        }
        self.output("o", &[batch, time, value_heads, value_dim])?;
        let cu_seqlens = self.cu_seqlens(batch, time)?;
        let problem = Problem { batch, time, heads, value_heads, key_dim, value_dim, scale: 1.0, cu_seqlens };
        Ok(Ssd {
            x: self.any("in.x")?,
            dt: self.input("dt", &[batch, time, value_heads])?,
            dt_bias: self.optional("dt_bias", &[value_heads])?,
            a: self.input("A", &[value_heads])?,
            b: self.any("in.B")?,
            c: self.input("C", &[batch, time, heads, key_dim])?,
            d: self.optional("D", &[value_heads])?,
            h0: self.state("h0", "ht", &[problem.sequences(), value_heads, value_dim, key_dim])?,
            problem,
        })
    }

    pub(crate) fn rwkv(&self) -> Result<Rwkv<'_>, Error> {
        let [batch, time, heads, key_dim] = self.sizes("in.r")?;
        let [_, _, _, value_dim] = self.sizes("in.v")?;
        let (keys, values) = ([batch, time, heads, key_dim], [batch, time, heads, value_dim]);
        self.output("o", &values)?;
        // RWKV does not scale its query unless a file says so.
        let scale = if self.metadata.contains_key("scale") { self.scale(key_dim)? } else { 1.0 };
        let cu_seqlens = self.cu_seqlens(batch, time)?;
        let problem = Problem { batch, time, heads, value_heads: heads, key_dim, value_dim, scale, cu_seqlens };
        Ok(Rwkv {
            r: self.any("in.r")?,
            w: self.input("w", &keys)?,
            k: self.input("k", &keys)?,
            v: self.input("v", &values)?,
            version: match self.op.as_str() {
                "rwkv6" => Version::Six { u: self.input("u", &[heads, key_dim])? },
                _ => Version::Seven { kk: self.input("kk", &keys)?, a: self.input("a", &keys)? },
            },
            h0: self.matrix_state(&problem)?,
            problem,
        })
    }

    pub(crate) fn selective(&self) -> Result<Selective<'_>, Error> {
        let shape = self.channels("in.u")?;
        let [_, size] = self.sizes("in.A")?;
        let Shape { batch, time, channels, .. } = shape;
        let full = [batch, time, channels];
        self.output("o", &full)?;
        Ok(Selective {
            u: self.any("in.u")?,
            dt: self.input("dt", &full)?,
            dt_bias: self.optional("dt_bias", &[channels])?,
            a: self.input("A", &[channels, size])?,
            b: self.input("B", &[batch, time, size])?,
            c: self.input("C", &[batch, time, size])?,
            d: self.optional("D", &[channels])?,
            z: self.optional("z", &full)?,
            h0: self.state("h0", "ht", &[shape.sequences().len(), channels, size])?,
            shape,
        })
    }
}
