//! Stages 1 and 3 reversed, all chunks at once: the gradients of what a chunk reads, from those of its outputs, of the
//! state that leaves it and (delta) of its values, `z`.
//!
//! ```text
//! P = scale do x^T (i >= j)    R = -z x^T (i > j)         u = Diag(beta) x
//! queries   left:  e^{c} (scale do S^T)  + P's pairs with beta k
//! keys      left:  e^{c} (-z S^T)        + R's pairs with beta k          (delta)
//! keys      right: P's pairs with q + R's pairs with k      end: e^{c_n - c} (x dS'^T)
//! dq = left     dk = beta (right + end) + left     dbeta = <k, right + end>     dv = A^T do + (k e^{c_n - c}) dS'
//! ```
//! One cube computes one chunk of one head, block by block of key features. A tensor meets the decay on the left, times
//! `e^{c_i}`, or on the right, times `e^{-c_j}`; so the gradient of `c` is `left (.) dleft - right (.) dright`, and `dg_t`
//! its sum from `t` on. Pairs with `i = j` do not meet the decay and are kept apart, as is what a key leaves to the end of
//! the chunk (it goes to the gates after it, summed forwards): under strong gates either would drown the rest.

use cubecl::prelude::*;

use super::super::tile::{BLOCK, Corner, Form, Mode, Tile, fill, product, product_at, unit, units};
use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, Role, key_gate, load, load_keys, read, scale, store};
use super::place::{Place, Sizes};
use super::state::load_state;

/// What the chunk reads.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Operands<I: Float + CubePrimitive, E: Float + CubePrimitive> {
    pub q: Box<[I]>,
    pub k: Box<[I]>,
    pub g: Box<[f32]>,
    pub beta: Box<[f32]>,
    /// `v` without the delta rule.
    pub x: Box<[I]>,
    pub a: Box<[E]>,
    pub states: Box<[f32]>,
}
