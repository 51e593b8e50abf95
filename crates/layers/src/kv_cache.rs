//! The keys and values that attention carries.

use burn::tensor::{DType, Device, Tensor};

use crate::state::state_parts;
use crate::{Error, StateSpec};

/// Slots of a fresh cache; it doubles when it is full.
const FIRST_SLOTS: usize = 16;

/// What [`Attention`](crate::attention::Attention) carries: keys (rotated already) and values of the tokens that later
/// ones may see.
///
/// The token at position `p` lies in slot `p`, or `p % window` with a window, so that a window's cache is a ring of at
/// most `window` slots and never grows beyond it. Slots that no token has reached hold nothing of meaning.
#[derive(Debug, Clone)]
pub struct AttentionState {
    /// `[B, slots, HK, K]`, in the type of the layer's input; `[1, total, HK, K]` after a packed call.
    pub k: Tensor<4>,
    /// `[B, slots, HK, K]`, as `k`.
    pub v: Tensor<4>,
    /// Tokens seen by each sequence, `[B]`; the next one has this position.
    pub positions: Vec<usize>,
    /// After a packed call, where the sequences lie in `k` and `v` (as `cu_seqlens`); otherwise empty. The next call
    /// sorts them into rows.
    pub packed: Vec<usize>,
    /// What the layer says of its states.
    pub spec: StateSpec,
}
state_parts!(AttentionState as "attention" { k, v, positions, packed });

impl AttentionState {
    pub(crate) fn empty(
        batch: usize,
        heads: usize,
        head_dim: usize,
        window: Option<usize>,
        spec: StateSpec,
        device: &Device,
    ) -> Self {
        let slots = FIRST_SLOTS.min(window.unwrap_or(FIRST_SLOTS));
        let shape = [batch, slots, heads, head_dim];
        Self {
            k: Tensor::zeros(shape, device),
            v: Tensor::zeros(shape, device),
            positions: vec![0; batch],
            packed: Vec::new(),
            spec,
        }
    }

    /// The cache in the type of the keys that come next. One without tokens takes any type.
    pub(crate) fn of_type(self, dtype: DType) -> Result<Self, Error> {
        let found = self.k.dtype();
        if found == dtype {
            return Ok(self);
        }
        if self.positions.iter().any(|seen| *seen > 0) {
            return Err(self.spec.mismatch("k", format!("of type {found:?}"), format!("{dtype:?}, that of new keys")));
        }
        Ok(Self { k: self.k.cast(dtype), v: self.v.cast(dtype), ..self })
    }

    /// A cache of the last tokens, in order, of sequences that have seen `seen` tokens each.
    pub(crate) fn of_tokens(k: Tensor<4>, v: Tensor<4>, seen: usize, window: Option<usize>, spec: StateSpec) -> Self {
        Self {
            positions: vec![seen; k.dims()[0]],
            k: into_slots(k, seen, window),
            v: into_slots(v, seen, window),
            packed: Vec::new(),
            spec,
        }
    }

    /// One cache for sequences that were handled one by one.
    pub(crate) fn stack(parts: Vec<Self>, spec: StateSpec) -> Self {
        let slots = parts.iter().map(|part| part.k.dims()[1]).max().unwrap_or(0);
        let mut all = (Vec::new(), Vec::new(), Vec::new());
        for part in parts {
            all.0.push(grown(part.k, slots));
            all.1.push(grown(part.v, slots));
            all.2.extend(part.positions);
        }
        Self { k: Tensor::cat(all.0, 0), v: Tensor::cat(all.1, 0), positions: all.2, packed: Vec::new(), spec }
    }

    /// The cached tokens of sequence `n` in order, `[1, tokens, HK, K]`; `None` before the first.
    pub(crate) fn tokens_of(&self, n: usize, window: Option<usize>) -> Option<(Tensor<4>, Tensor<4>)> {
        let seen = self.positions[n];
        if seen == 0 {
            return None;
        }
        if let Some([start, end]) = self.packed.get(n..n + 2) {
            let length = (end - start).min(window.unwrap_or(usize::MAX));
            let cut = |x: &Tensor<4>| x.clone().narrow(1, end - length, length);
            return Some((cut(&self.k), cut(&self.v)));
        }
        let row = |x: &Tensor<4>| in_order(x.clone().narrow(0, n, 1), seen, window);
        Some((row(&self.k), row(&self.v)))
    }

    /// The cached tokens of all sequences in order, which must be at the same position.
    pub(crate) fn tokens(&self, window: Option<usize>) -> Option<(Tensor<4>, Tensor<4>)> {
        let seen = self.positions.first().copied().filter(|seen| *seen > 0)?;
        let order = |x: &Tensor<4>| in_order(x.clone(), seen, window);
        Some((order(&self.k), order(&self.v)))
    }

    /// A row per sequence, also after a packed call.
    pub(crate) fn into_rows(self, window: Option<usize>) -> Self {
        if self.packed.is_empty() {
            return self;
        }
        let row = |n| {
            let (k, v) = self.tokens_of(n, window)?;
            Some(Self::of_tokens(k, v, self.positions[n], window, self.spec.clone()))
        };
        let rows: Vec<Self> = (0..self.positions.len()).filter_map(row).collect();
        Self::stack(rows, self.spec)
    }

    /// Writes the keys and values `[B, 1, HK, K]` of each sequence's next token.
    pub(crate) fn push(self, k: Tensor<4>, v: Tensor<4>, window: Option<usize>) -> Self {
        let batch = self.positions.len();
        let slot = |position: usize| window.map_or(position, |window| position % window);
        let needed = self.positions.iter().map(|p| slot(*p) + 1).max().unwrap_or(1);
        let mut slots = self.k.dims()[1];
        if needed > slots {
            slots = needed.max(2 * slots).max(FIRST_SLOTS);
            slots = slots.min(window.unwrap_or(slots));
        }
        let write = |cache: Tensor<4>, x: Tensor<4>| {
            let [_, _, heads, features] = x.dims();
            let mut cache = grown(cache, slots);
            if aligned(&self.positions) {
                let at = slot(self.positions[0]);
                return cache.slice_assign([0..batch, at..at + 1, 0..heads, 0..features], x);
            }
            for (n, position) in self.positions.iter().enumerate() {
                let at = slot(*position);
                let row = x.clone().narrow(0, n, 1);
                cache = cache.slice_assign([n..n + 1, at..at + 1, 0..heads, 0..features], row);
            }
            cache
        };
        Self {
            k: write(self.k, k),
            v: write(self.v, v),
            positions: self.positions.iter().map(|position| position + 1).collect(),
            packed: Vec::new(),
            spec: self.spec,
        }
    }

    /// The slots that hold tokens of sequence `n` (or of all, if they are aligned), in any order.
    pub(crate) fn filled(&self, n: Option<usize>, window: Option<usize>) -> (Tensor<4>, Tensor<4>) {
        let seen = self.positions[n.unwrap_or(0)];
        let filled = seen.min(window.unwrap_or(seen));
        let cut = |x: &Tensor<4>| {
            let x = match n {
                Some(n) => x.clone().narrow(0, n, 1),
                None => x.clone(),
            };
            x.narrow(1, 0, filled)
        };
        (cut(&self.k), cut(&self.v))
    }
}

/// Whether all sequences are at the same position.
pub(crate) fn aligned(positions: &[usize]) -> bool {
    positions.windows(2).all(|pair| pair[0] == pair[1])
}

/// Pads the slots of `[B, slots, ..]` to `slots`.
fn grown(x: Tensor<4>, slots: usize) -> Tensor<4> {
    let [batch, old, heads, features] = x.dims();
    if old >= slots {
        return x;
    }
    let pad = Tensor::zeros([batch, slots - old, heads, features], (&x.device(), x.dtype()));
    Tensor::cat(vec![x, pad], 1)
}

/// Keeps what a window still shows of tokens in order and lays it out as a ring.
fn into_slots(x: Tensor<4>, seen: usize, window: Option<usize>) -> Tensor<4> {
    let tokens = x.dims()[1];
    match window {
        Some(window) if seen >= window => {
            let last = x.narrow(1, tokens - window, window);
            match seen % window {
                // A copy: a view would keep all tokens of a long prompt in memory.
                0 => last.zeros_like().slice_assign(last.dims().map(|size| 0..size), last),
                first => rotated(last, window - first),
            }
        }
        _ => x,
    }
}

/// The reverse of [`into_slots`].
fn in_order(x: Tensor<4>, seen: usize, window: Option<usize>) -> Tensor<4> {
    match window {
        Some(window) if seen >= window => rotated(x, seen % window),
        _ => x.narrow(1, 0, seen),
    }
}

/// Brings slot `first` to the front.
fn rotated(x: Tensor<4>, first: usize) -> Tensor<4> {
    let slots = x.dims()[1];
    let first = first % slots;
    if first == 0 {
        return x;
    }
    let tail = x.clone().narrow(1, first, slots - first);
    Tensor::cat(vec![tail, x.narrow(1, 0, first)], 1)
}
