//! The GPU's launches one by one: each reads what the one before it wrote from memory, so each has a roofline of its own.
//!
//! A launch reads each of its tensors once and writes each once; what the cubes of one launch read again is left to the
//! cache. Products are counted as in [`cost`](super), and for the delta rule the inverse of a chunk's system besides.

use super::{Cost, Pass, Tensors, lengths};
use crate::channels::ScanProblem;
use crate::matrix::MatrixProblem;
use crate::matrix::{GateKind, WriteKind};

/// One launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Its stage.
    pub name: &'static str,
    /// What it does and moves.
    pub cost: Cost,
}

/// All launches of an operation, which run one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pipeline {
    /// In their order.
    pub launches: Vec<Launch>,
    /// Bytes of the tensors that the caller gives and gets.
    pub tensors: u64,
    /// Bytes of what the launches leave for each other.
    pub scratch: u64,
}

impl Pipeline {
    fn single(name: &'static str, cost: Cost) -> Self {
        Self { launches: vec![Launch { name, cost }], tensors: cost.bytes, scratch: 0 }
    }

    /// All launches together.
    pub fn total(&self) -> Cost {
        self.launches.iter().fold(Cost::default(), |sum, launch| sum + launch.cost)
    }

    /// Seconds at the least on a device of these GFLOP/s and GB/s: the sum over the launches.
    pub fn floor(&self, gflops: f64, gbytes: f64) -> f64 {
        self.launches.iter().map(|launch| launch.cost.floor(gflops, gbytes)).sum()
    }
}

/// The sizes that all stages share.
struct Stages {
    delta: bool,
    /// Whether there is a gate per key feature.
    by_key: bool,
    /// Bytes of keys that only read, which low-rank writes have.
    reads: usize,
    /// Bytes of the tensors.
    x: Tensors,
    /// A `[chunk, chunk]` matrix for each chunk and head.
    squares: usize,
    /// Whether no launch writes the scores of queries: on matrix units, what reads the states computes them.
    in_place: bool,
    /// A state for each chunk and head, in the element type.
    states: usize,
    /// Queries or keys as the other launches read them, weighted under gates per key feature; then also the decays of
    /// whole chunks, and no gates.
    walked: usize,
    ends: usize,
    /// FLOP per chunk and head: a product with the state; triangles with and without the diagonal, per feature.
    state: usize,
    lower: usize,
    strict: usize,
    /// Chunks times heads.
    chunks: usize,
    p: [usize; 3],
}

impl Stages {
    fn new(p: &MatrixProblem, gate: GateKind, write: WriteKind, element: usize) -> Self {
        // Low-rank writes are the delta rule of twice the tokens, with keys of its own that read.
        let low_rank = write == WriteKind::LOW_RANK;
        let (delta, gate) = (write != WriteKind::Additive, if low_rank { GateKind::KEY } else { gate });
        let write = if low_rank { WriteKind::DELTA } else { write };
        let p = &if low_rank { p.twice() } else { p.clone() };
        let (c, k, v) = (p.chunk.max(1), p.key_dim, p.value_dim);
        let chunks = lengths(p).iter().map(|length| length.div_ceil(c)).sum::<usize>() * p.value_heads;
        let (by_key, x) = (gate == GateKind::KEY, Tensors::new(p, gate, write, element));
        let walked = if by_key { p.batch * p.time * p.value_heads * k * element } else { x.keys };
        Self {
            delta,
            by_key,
            reads: if low_rank { x.keys } else { 0 },
            x,
            walked,
            ends: if by_key { chunks * k * 4 } else { 0 },
            squares: chunks * c * c * element,
            in_place: !delta && !by_key,
            states: chunks * k * v * element,
            state: 2 * c * k * v,
            lower: c * (c + 1),
            strict: c * (c - 1),
            chunks,
            p: [c, k, v],
        }
    }

    fn launch(&self, name: &'static str, flops: usize, bytes: usize) -> Launch {
        Launch { name, cost: Cost { flops: (self.chunks * flops) as u64, bytes: bytes as u64 } }
    }

    /// Only of the delta rule.
    fn delta(&self, amount: usize) -> usize {
        if self.delta { amount } else { 0 }
    }

    /// The gates that weighted queries and keys have not met.
    fn scalar_gates(&self) -> usize {
        if self.by_key { 0 } else { self.x.gates }
    }

    /// Queries and keys that the scores' launch weighs for the others.
    fn weighted(&self) -> usize {
        if self.by_key { 2 * self.walked + self.delta(self.walked) + self.ends } else { 0 }
    }

    fn scores(&self) -> Launch {
        let [c, k, _] = self.p;
        // The inverse of a unit triangle of c rows takes a third of c^3.
        let flops = self.lower * k + self.delta(self.strict * k + self.strict * (c + 1) / 3);
        let bytes = 2 * self.x.keys + self.x.gates + self.x.writes + self.squares + self.delta(self.squares);
        self.launch("scores", flops, bytes + self.reads + self.weighted())
    }

    fn walk(&self) -> Launch {
        let flops = self.state + self.delta(self.state + self.lower * self.p[2]);
        let second = if self.by_key { self.delta(self.walked) } else { 0 };
        let gates = self.scalar_gates() + self.ends;
        let bytes = self.walked + second + self.x.values + gates + self.states + self.x.states;
        self.launch("state", flops, bytes + self.x.writes + self.delta(self.squares + self.x.values))
    }

    fn output(&self) -> Launch {
        self.read_out("output", self.x.writes)
    }

    fn read_out(&self, name: &'static str, writes: usize) -> Launch {
        let [_, k, v] = self.p;
        let (more, scores) = if self.in_place { (self.lower * k, self.x.keys) } else { (0, self.squares) };
        let bytes = self.walked + 2 * self.x.values + self.scalar_gates() + writes + scores + self.states;
        self.launch(name, self.state + self.lower * v + more, bytes)
    }

    fn walk_back(&self) -> Launch {
        let flops = self.state + self.delta(2 * self.state + 2 * self.lower * self.p[2]);
        let gates = self.scalar_gates() + self.ends;
        let bytes = self.walked + self.x.values + gates + self.x.writes + self.states + self.x.states;
        let keys = if self.by_key { 2 * self.walked } else { self.walked };
        let delta = self.delta(keys + 2 * self.squares + self.x.values);
        self.launch("state_backward", flops, bytes + delta)
    }

    /// The values' gradient of the additive write: the output stage with keys for queries.
    fn values_back(&self) -> Launch {
        self.read_out("output (dv)", 0)
    }

    fn scores_back(&self) -> Launch {
        let flops = (self.lower + self.delta(self.strict)) * self.p[2];
        // A gate per key feature meets the pairs in the next stage.
        let bytes = 2 * self.x.values + self.scalar_gates() + self.squares + self.delta(self.x.values + self.squares);
        self.launch("scores_backward", flops, bytes)
    }

    fn chunk_back(&self) -> Launch {
        // do S^T and x dS'^T, and of each pair's gradient the products with both keys; then those of the keys that read
        // the state.
        let flops = 2 * self.state + 2 * self.lower * self.p[1] + self.delta(self.state + 2 * self.strict * self.p[1]);
        let bytes = 4 * self.x.keys + 2 * self.x.values + 2 * (self.x.gates + self.x.writes) + 2 * self.states;
        self.launch(
            "chunk_backward",
            flops,
            bytes + 2 * self.reads + self.squares + self.delta(self.x.values + self.squares),
        )
    }
}

/// A matrix-state operation on elements of `element` bytes. The backward pass keeps nothing of the forward pass, and computes
/// scores and states again.
pub fn matrix(p: &MatrixProblem, gate: GateKind, write: WriteKind, element: usize, pass: Pass) -> Pipeline {
    if pass == Pass::Step {
        return Pipeline::single("step", super::matrix(p, gate, write, element, pass));
    }
    let s = Stages::new(p, gate, write, element);
    let pipeline = stages(&s, pass);
    if write == WriteKind::LOW_RANK {
        return paired(pipeline, &s, &Tensors::new(p, gate, write, element), pass);
    }
    pipeline
}

/// The launches around those of twice the tokens, and the caller's tensors.
fn paired(mut pipeline: Pipeline, twice: &Stages, x: &Tensors, pass: Pass) -> Pipeline {
    let pairs = twice.x.inputs() + twice.reads;
    let [tensors, mut scratch, back] = match pass {
        Pass::Backward => [2 * x.inputs() + x.values + x.states, pairs + twice.x.values, pairs],
        _ => [x.inputs() + x.values + x.states, pairs, twice.x.values],
    };
    let d_o = if pass == Pass::Backward { x.values + twice.x.values } else { 0 };
    let launch = |name, bytes: usize| Launch { name, cost: Cost { flops: 0, bytes: bytes as u64 } };
    pipeline.launches.insert(0, launch("pairs", x.inputs() + pairs + d_o));
    // Of what was computed for two tokens half is wanted, but for keys.
    let wanted = if pass == Pass::Backward { x.inputs() } else { x.values };
    pipeline.launches.push(launch("pairs, back", 2 * wanted));
    scratch += back;
    Pipeline { tensors: tensors as u64, scratch: pipeline.scratch + scratch as u64, ..pipeline }
}

fn stages(s: &Stages, pass: Pass) -> Pipeline {
    let delta = s.delta;
    let squares = s.squares + s.delta(s.squares);
    let scores = if s.in_place { 0 } else { squares };
    let kept = scores + s.states + s.delta(s.x.values) + s.weighted();
    let mut launches: Vec<_> = (!s.in_place).then(|| s.scores()).into_iter().collect();
    let (tensors, scratch) = match pass {
        Pass::Backward => {
            launches.extend([s.walk(), s.walk_back()]);
            launches.extend((!delta).then(|| s.values_back()));
            launches.extend([s.scores_back(), s.chunk_back()]);
            (2 * s.x.inputs() + s.x.values + s.x.states, kept + s.states + squares)
        }
        _ => {
            launches.extend([s.walk(), s.output()]);
            (s.x.inputs() + s.x.values + s.x.states, kept)
        }
    };
    Pipeline { launches, tensors: tensors as u64, scratch: scratch as u64 }
}

/// The element-wise scan: one launch.
pub fn scan(p: &ScanProblem, log: bool, element: usize, pass: Pass) -> Pipeline {
    Pipeline::single("scan", super::scan(p, log, element, pass))
}

/// RG-LRU: one launch.
pub fn rg_lru(p: &ScanProblem, element: usize, pass: Pass) -> Pipeline {
    Pipeline::single("rg_lru", super::rg_lru(p, element, pass))
}

#[cfg(test)]
mod tests {
    use super::*;
    use GateKind as G;

    fn problem() -> MatrixProblem {
        MatrixProblem::new(2, 1024, 4, 128, 64)
    }

    #[test]
    fn the_stages_of_the_forward_pass_are_the_chunked_algorithm() {
        let p = problem();
        let additive = matrix(&p, G::KEY, WriteKind::Additive, 2, Pass::Forward).total().flops;
        assert_eq!(additive, super::super::matrix(&p, G::KEY, WriteKind::Additive, 2, Pass::Forward).flops);
        // The delta rule inverts a chunk's system, where the algorithm only solves it: the inverse, and the diagonal of
        // its product with the values.
        let delta = matrix(&p, G::KEY, WriteKind::DELTA, 2, Pass::Forward).total().flops;
        let (c, chunks) = (64, 2 * 16 * 4);
        let inverse = chunks * (c * (c * c - 1) / 3 + 2 * c * 64);
        assert_eq!(delta, super::super::matrix(&p, G::KEY, WriteKind::DELTA, 2, Pass::Forward).flops + inverse);
    }

    #[test]
    fn the_backward_pass_computes_one_product_with_the_state_more_than_one_that_kept_the_states() {
        let p = problem();
        let mine = matrix(&p, G::HEAD, WriteKind::Additive, 2, Pass::Backward).total().flops;
        let kept = super::super::matrix(&p, G::HEAD, WriteKind::Additive, 2, Pass::Backward).flops;
        assert_eq!(mine - kept, 2 * 1024 * 4 * 2 * 128 * 64);
    }

    #[test]
    fn every_launch_moves_at_least_the_tensors_between_the_caller_and_the_device() {
        for write in [WriteKind::Additive, WriteKind::DELTA] {
            for pass in [Pass::Forward, Pass::Backward] {
                let pipeline = matrix(&problem(), G::KEY, write, 2, pass);
                let moved = pipeline.total().bytes;
                // What is scratch is written once and read at least once.
                assert!(moved >= pipeline.tensors + 2 * pipeline.scratch, "{write:?} {pass:?}");
            }
        }
    }

    #[test]
    fn low_rank_writes_are_the_delta_rule_of_twice_the_tokens() {
        let packed = MatrixProblem { batch: 1, cu_seqlens: Some(vec![0, 70, 1024]), ..problem() };
        let of_packed = MatrixProblem { time: 2048, cu_seqlens: Some(vec![0, 140, 2048]), ..packed.clone() };
        let twice = MatrixProblem { time: 2 * problem().time, ..problem() };
        let cases = [(problem(), twice), (packed, of_packed)];
        for ((p, twice), pass) in cases.iter().flat_map(|case| [(case, Pass::Forward), (case, Pass::Backward)]) {
            let low_rank = matrix(p, G::HEAD, WriteKind::LOW_RANK, 2, pass);
            let delta = matrix(twice, G::KEY, WriteKind::DELTA, 2, pass);
            assert_eq!(low_rank.total().flops, delta.total().flops);
            // Half of what comes back is not wanted; all else that is written is read.
            assert!(low_rank.total().bytes > delta.total().bytes + low_rank.tensors);
            assert!(low_rank.scratch > delta.scratch && low_rank.tensors < delta.tensors);
        }
    }

    #[test]
    fn launches_one_after_the_other_take_no_less_than_their_work_at_once() {
        let pipeline = matrix(&problem(), G::KEY, WriteKind::DELTA, 2, Pass::Backward);
        for (gflops, gbytes) in [(1e3, 1e3), (1e6, 3e3)] {
            let at_once = pipeline.total().floor(gflops, gbytes);
            assert!(pipeline.floor(gflops, gbytes) >= at_once * (1.0 - 1e-12));
        }
    }

    #[test]
    fn memory_grows_with_the_time_as_the_tensors_do() {
        let of =
            |time| matrix(&MatrixProblem::new(1, time, 16, 128, 128), G::HEAD, WriteKind::DELTA, 2, Pass::Backward);
        let (short, long) = (of(8192), of(65536));
        assert_eq!(long.scratch, 8 * short.scratch);
        assert!(long.tensors < 8 * short.tensors && long.tensors > 7 * short.tensors);
    }
}
