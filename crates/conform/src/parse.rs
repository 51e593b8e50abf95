//! Tensors of a case by name, with their shapes checked against each other.

use crate::{Case, Error, Tensor};
use thalweg_reference::Shape;
use thalweg_reference::matrix::Problem as Sizes;

impl Case {
    pub(crate) fn matrix_problem(&self) -> Result<Sizes, Error> {
        let [batch, time, heads, key_dim] = self.sizes("in.q")?;
        let [v_batch, v_time, value_heads, value_dim] = self.sizes("in.v")?;
        if (v_batch, v_time) != (batch, time) || value_heads % heads != 0 {
            return Err(self.misfit("in.v", format!("[{batch}, {time}, a multiple of {heads}, any]")));
        }
        self.output("o", &[batch, time, value_heads, value_dim])?;
        let (scale, cu_seqlens) = (self.scale(key_dim)?, self.cu_seqlens(batch, time)?);
        Ok(Sizes { batch, time, heads, value_heads, key_dim, value_dim, scale, cu_seqlens })
    }

    pub(crate) fn matrix_state(&self, p: &Sizes) -> Result<Option<&Tensor>, Error> {
        self.state("h0", "ht", &[p.sequences(), p.value_heads, p.key_dim, p.value_dim])
    }

    pub(crate) fn channels(&self, name: &str) -> Result<Shape, Error> {
        let [batch, time, channels] = self.sizes(name)?;
        Ok(Shape { batch, time, channels, cu_seqlens: self.cu_seqlens(batch, time)? })
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
