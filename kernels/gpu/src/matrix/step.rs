//! One token of each sequence: the recurrence as it is written, bound by the bytes of the state.
//!
//! ```text
//! S = Diag(e^g) S      u = beta (v - S^T k)   (delta; u = v without it)      S += k u^T      o = scale S^T q
//! ```
//! and with the low-rank write `S += b (a^T S)` besides, of the state before its decay.
//! One launch: a cube holds a head's state for 32 value features. A unit keeps the rows `group, group + groups, ...` of
//! one column in registers between reading and writing it; sums over the rows meet in shared memory, where what all columns
//! read of a row is too. All of a unit's rows are asked for before one is touched, and without a branch, behind which a
//! load would wait for the one before.

use cubecl::prelude::*;

use crate::tile::unit;
use thalweg_kernels::matrix::{GateKind, WriteKind};

/// Value features of a cube: a plane reads whole lines of memory.
pub(crate) const COLUMNS: usize = 32;

/// The compile-time key of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StepBlueprint {
    pub gate: GateKind,
    pub write: WriteKind,
    /// Units that share a column, and the rows that each of them holds.
    pub groups: usize,
    pub rows: usize,
    /// Whether there are exactly as many rows.
    pub whole: bool,
}

impl StepBlueprint {
    pub fn new(gate: GateKind, write: WriteKind, key_dim: usize, max_units: usize) -> Self {
        let groups = key_dim.div_ceil(16).min(max_units.min(256) / COLUMNS).next_power_of_two();
        Self { gate, write, groups, rows: key_dim.div_ceil(groups), whole: key_dim.is_multiple_of(groups) }
    }
}

#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct StepSizes {
    pub batch: usize,
    pub heads: usize,
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// From the scalar gate of a sequence to the next's: 0 if they share one.
    pub gate_stride: usize,
    pub scale: f32,
}

/// What the low-rank write reads and writes along, `[batch, heads, key_dim]`.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct LowRank<I: Float> {
    pub a: Box<[I]>,
    pub b: Box<[I]>,
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn step_kernel<I: Float>(
    q: &[I],
    k: &[I],
    v: &[I],
    g: &[f32],
    beta: &[f32],
    low_rank: &LowRank<I>,
    state: &mut [f32],
    o: &mut [I],
    sizes: &StepSizes,
    #[comptime] b: StepBlueprint,
    #[define(I)] _storage: ElemType,
) {
    let parts = sizes.value_dim.div_ceil(COLUMNS);
    let cube = CUBE_POS / parts;
    if cube >= sizes.batch * sizes.value_heads {
        terminate!();
    }
    let (sequence, head) = (cube / sizes.value_heads, cube % sizes.value_heads);
    let (column, group) = (unit() % COLUMNS, unit() / COLUMNS);
    let col = CUBE_POS % parts * COLUMNS + column;
    let inside = col < sizes.value_dim;
    let key_at = (sequence * sizes.heads + head / (sizes.value_heads / sizes.heads)) * sizes.key_dim;
    let state_at = cube * sizes.key_dim * sizes.value_dim;

    let mut held = Array::<f32>::new(b.rows);
    #[unroll]
    for i in 0..b.rows {
        let row = group + i * b.groups;
        let at = state_at + row * sizes.value_dim + col;
        held[i] = state[select(inside && there(row, sizes.key_dim, b), at, state_at)];
    }
    let (mut u, mut step) = (f32::new(0.0), f32::new(0.0));
    if inside {
        u = f32::cast_from(v[cube * sizes.value_dim + col]);
    }
    if comptime!(b.write == WriteKind::DELTA) {
        step = beta[cube];
    }
    let mut rows = Rows::new(b);
    rows.load::<I>(q, k, g, low_rank, (key_at, cube * sizes.key_dim), sizes.key_dim, b);
    let mut decay = f32::new(1.0);
    if comptime!(b.gate == GateKind::HEAD) {
        decay = g[sequence * sizes.gate_stride + head].exp();
    }
    sync_cube();

    // The decayed state, and with it what the key finds there, or `a` in the state before.
    let (mut read, mut out) = (f32::new(0.0), f32::new(0.0));
    #[unroll]
    for i in 0..b.rows {
        let row = group + i * b.groups;
        if comptime!(b.gate == GateKind::KEY) {
            decay = rows.decay[row];
        }
        if comptime!(b.write == WriteKind::LOW_RANK) {
            read += select(there(row, sizes.key_dim, b), held[i], f32::new(0.0)) * rows.a[row];
        }
        held[i] = select(there(row, sizes.key_dim, b), held[i] * decay, f32::new(0.0));
        if comptime!(b.write == WriteKind::DELTA) {
            read += held[i] * rows.key[row];
        }
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(b.groups * COLUMNS));
    if comptime!(b.write != WriteKind::Additive) {
        read = over_groups(read, &mut sums, column, group, b);
    }
    if comptime!(b.write == WriteKind::DELTA) {
        u = step * (u - read);
    }
    // The addresses again: kept, they would take as many registers as the state.
    let group = unit() / COLUMNS;
    #[unroll]
    for i in 0..b.rows {
        let row = group + i * b.groups;
        let mut value = held[i] + rows.key[row] * u;
        if comptime!(b.write == WriteKind::LOW_RANK) {
            value += rows.b[row] * read;
        }
        out += value * rows.query[row];
        if inside && there(row, sizes.key_dim, b) {
            state[state_at + row * sizes.value_dim + col] = value;
        }
    }
    let out = over_groups(out, &mut sums, column, group, b);
    if inside && group == 0 {
        o[cube * sizes.value_dim + col] = I::cast_from(out * sizes.scale);
    }
}

/// Whether there is such a row.
#[cube]
fn there(row: usize, key_dim: usize, #[comptime] b: StepBlueprint) -> bool {
    if comptime!(b.whole) { true.runtime() } else { row < key_dim }
}

/// What a row of the state meets, by key feature; zeros beyond the last.
#[derive(CubeType)]
struct Rows {
    query: Shared<[f32]>,
    key: Shared<[f32]>,
    /// Under a gate per key feature.
    decay: Shared<[f32]>,
    /// With the low-rank write.
    a: Shared<[f32]>,
    b: Shared<[f32]>,
}

#[cube]
impl Rows {
    fn new(#[comptime] b: StepBlueprint) -> Rows {
        let rows = comptime!(b.groups * b.rows);
        let low_rank = comptime!(if b.write == WriteKind::LOW_RANK { rows } else { 1 });
        Rows {
            query: Shared::new_slice(rows),
            key: Shared::new_slice(rows),
            decay: Shared::new_slice(comptime!(if b.gate == GateKind::KEY { rows } else { 1 })),
            a: Shared::new_slice(low_rank),
            b: Shared::new_slice(low_rank),
        }
    }

    /// Reads them; queries and keys begin at `at.0`, gates at `at.1`.
    fn load<I: Float>(
        &mut self,
        q: &[I],
        k: &[I],
        g: &[f32],
        low_rank: &LowRank<I>,
        at: (usize, usize),
        key_dim: usize,
        #[comptime] b: StepBlueprint,
    ) {
        let (rows, units) = comptime!((b.groups * b.rows, b.groups * COLUMNS));
        #[unroll]
        for j in 0..comptime!(rows.div_ceil(units)) {
            let row = unit() + j * units;
            if row < rows {
                let (mut query, mut key, mut gate) = (f32::new(0.0), f32::new(0.0), f32::new(0.0));
                let (mut reads, mut writes) = (f32::new(0.0), f32::new(0.0));
                if there(row, key_dim, b) {
                    query = f32::cast_from(q[at.0 + row]);
                    key = f32::cast_from(k[at.0 + row]);
                    if comptime!(b.gate == GateKind::KEY) {
                        gate = g[at.1 + row];
                    }
                    if comptime!(b.write == WriteKind::LOW_RANK) {
                        reads = f32::cast_from(low_rank.a[at.0 + row]);
                        writes = f32::cast_from(low_rank.b[at.0 + row]);
                    }
                }
                self.query[row] = query;
                self.key[row] = key;
                if comptime!(b.gate == GateKind::KEY) {
                    self.decay[row] = gate.exp();
                }
                if comptime!(b.write == WriteKind::LOW_RANK) {
                    self.a[row] = reads;
                    self.b[row] = writes;
                }
            }
        }
    }
}

/// Sums over the units of a column, in order. Synchronises.
#[cube]
fn over_groups(value: f32, sums: &mut Shared<[f32]>, column: usize, group: usize, #[comptime] b: StepBlueprint) -> f32 {
    sync_cube();
    sums[group * COLUMNS + column] = value;
    sync_cube();
    let mut sum = f32::new(0.0);
    for other in 0..b.groups {
        sum += sums[other * COLUMNS + column];
    }
    sum
}
