//! The two kinds of decay, and everything in a chunk that depends on which one it is.
//!
//! Inside a chunk, `c_i` is the sum of the log-decays up to and including token `i` (`c_0 = 0` stands for the state that
//! enters the chunk, so the token with index `i` has the sum `c_{i+1}`). The rest of the chunk sees the decay only through
//! `e^{c_i}` (start to token), `e^{c_n - c_i}` (token to end) and the scores
//!
//! ```text
//! P_ij = sum_d x_i[d] y_j[d] e^{c_i[d] - c_j[d]}      for i >= j (or i > j)
//! ```
//! No two gate sums are ever subtracted: each exponent is a sum over just the tokens between, so that a gate of -1e4 or
//! -inf earlier in the chunk costs no digits later in it.

use super::super::gemm::Mode;
use super::super::tile::Tile;

/// Which sum belongs to a left operand: its own token's included, or only those before it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// After the decay of the same token (`c_{i+1}`): queries, and keys of the delta rule.
    Decayed,
    /// Before it (`c_i`): `a` of the low-rank write.
    Before,
}

impl Reads {
    /// Row of the sums that belongs to token 0.
    pub fn offset(self) -> usize {
        match self {
            Reads::Decayed => 1,
            Reads::Before => 0,
        }
    }
}

/// A decay; laws: `scores` of one-hot rows equals `scale_from_start` when the key is written at the chunk's start, and
/// each `*_backward` is the transpose of its forward.
pub(crate) trait Decay: Sync {
    /// Sums of one chunk, and scratch.
    type Sums: Send;

    fn sums(&self, chunk: usize, key_dim: usize) -> Self::Sums;

    /// Reads the gates of `rows` tokens from `token` on.
    fn load(&self, sums: &mut Self::Sums, token: usize, rows: usize, head: usize);

    /// `dst_i (=, +=) e^{c_i} src_i`.
    fn scale_from_start(&self, sums: &Self::Sums, reads: Reads, mode: Mode, src: &Tile, dst: &mut Tile);

    /// `dst_i (=, +=) e^{c_n - c_{i+1}} src_i`.
    fn scale_to_end(&self, sums: &Self::Sums, mode: Mode, src: &Tile, dst: &mut Tile);

    /// `state = Diag(e^{c_n}) state`.
    fn decay_state(&self, sums: &Self::Sums, state: &mut Tile);

    /// The scores above; `p` is zero above the diagonal, and on it unless `diagonal`.
    fn scores(&self, sums: &mut Self::Sums, x: (&Tile, Reads), y: &Tile, diagonal: bool, p: &mut Tile);

    /// Adds to `dx`, `dy` the gradients for `dp`, which is zero on and above the diagonal. May overwrite `dp`.
    fn scores_backward(
        &self,
        sums: &mut Self::Sums,
        dp: &mut Tile,
        x: (&Tile, Reads),
        y: &Tile,
        dx: &mut Tile,
        dy: &mut Tile,
    );

    /// Starts the gradient of the sums, with what the state says of `c_n`: `sum_v S e^{c_n} dS`.
    fn gradient_of_state(&self, sums: &mut Self::Sums, state: &Tile, dstate: &Tile);

    /// Adds `x_j (.) dx_j` to the gradient of each gate after token `j`, where `dx` came from `scale_to_end`.
    fn gradient_of_end(&self, sums: &mut Self::Sums, x: &Tile, dx: &Tile);

    /// Adds `sign * x_i (.) dx_i` to the gradient of `c_i`, for everything through which `x` met its sum.
    fn gradient_of_rows(&self, sums: &mut Self::Sums, reads: Reads, sign: f32, x: &Tile, dx: &Tile);

    /// Sums the gradient over the tokens that a gate reaches, and hands out that of each token: `store(row, gradient)`.
    fn gate_gradient(&self, sums: &mut Self::Sums, store: &mut dyn FnMut(usize, &[f32]));
}
