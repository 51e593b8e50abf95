//! The forward pass.

use super::super::gemm::{Lhs, Mode, Rhs, gemm};
use super::super::rows::{Output, Rows, fence};
use super::super::tile::{Shared, Tile};
use super::chunk::{Chunk, Layout, Place, Rule};
use super::decay::{Decay, Reads};
use super::{chunk_count, lower};
use crate::element::Element;
use crate::matrix::{KeepStates, MatrixInputs, MatrixOutputs, MatrixProblem};
use crate::sequences::Sequences;
use rayon::prelude::*;

/// Scratch of one thread.
struct Work<S> {
    chunk: Chunk,
    sums: S,
    state: Tile,
    o: Tile,
}

pub(crate) fn forward<E: Element, D: Decay>(
    p: &MatrixProblem,
    sequences: &Sequences,
    x: &MatrixInputs<E>,
    decay: &D,
    keep: KeepStates,
) -> MatrixOutputs<E> {
    let rule = Rule::of(&x.write);
    let layout = Layout::new(p, sequences);
    let mut o = Output::<E>::new(p.value_shape().iter().product(), Vec::new());
    let mut final_state = vec![0.0; p.state_shape().iter().product()];
    let kept = if keep == KeepStates::Yes {
        chunk_count(sequences, p.chunk) * p.value_heads * p.key_dim * p.value_dim
    } else {
        0
    };
    let mut chunk_states = Output::<f32>::new(kept, Vec::new());
    {
        let (o, final_state, chunk_states) = (o.rows(), Shared::new(&mut final_state), chunk_states.rows());
        let pass = Pass { layout, rule, x, decay, o };
        let work = || Work {
            chunk: Chunk::new(layout, rule),
            sums: decay.sums(p.chunk, p.key_dim),
            state: Tile::new(p.key_dim, layout.width()),
            o: Tile::new(p.chunk, layout.width()),
        };
        (0..layout.tasks()).into_par_iter().for_each_init(work, |w, task| {
            let walk = layout.walk(task);
            match x.initial_state {
                Some(h) => w.state.load(h, layout.state(walk[0]), p.key_dim),
                None => w.state.fill(0.0),
            }
            for (i, &at) in walk.iter().enumerate() {
                if keep == KeepStates::Yes {
                    w.state.put(&chunk_states, layout.chunk_state(at), p.key_dim);
                }
                pass.run(w, at, walk.get(i + 1).copied());
            }
            w.state.store(&final_state, layout.state(walk[0]), p.key_dim);
            fence();
        });
    }
    // Safety: the tasks cover every token, chunk, head and value block.
    let (o, chunk_states) = unsafe { (o.finish(), chunk_states.finish()) };
    MatrixOutputs { o, final_state, chunk_states: (keep == KeepStates::Yes).then_some(chunk_states) }
}

/// What the chunks of all tasks have in common.
struct Pass<'a, E, D> {
    layout: Layout<'a>,
    rule: Rule,
    x: &'a MatrixInputs<'a, E>,
    decay: &'a D,
    o: Rows<E>,
}

impl<E: Element, D: Decay> Pass<'_, E, D> {
    /// One chunk: its outputs, and from the state before it to the state after it.
    fn run(&self, w: &mut Work<D::Sums>, at: Place, next: Option<Place>) {
        let Self { layout, rule, x, decay, ref o } = *self;
        w.chunk.load(layout, x, decay, &mut w.sums, at);
        w.chunk.ahead.clear();
        if let Some(next) = next {
            w.chunk.ask_for(layout, x, next);
        }
        w.chunk.solve(rule, decay, &mut w.sums, at.rows, &w.state);
        output(&mut w.chunk, rule, decay, &mut w.sums, at.rows, &w.state, &mut w.o);
        if at.rows > 1 && !w.o.is_finite(at.rows) {
            return at.tokens().for_each(|token| self.run(w, token, None));
        }
        w.chunk.update_state(rule, decay, &w.sums, at.rows, &mut w.state);
        w.o.put(o, layout.value(at), at.rows);
    }
}

/// `o = (q e^c) S + sum over writes of tril(P_q,key) value`.
fn output<D: Decay>(c: &mut Chunk, rule: Rule, decay: &D, sums: &mut D::Sums, rows: usize, state: &Tile, o: &mut Tile) {
    decay.scale_from_start(sums, Reads::Decayed, Mode::Set, &c.q, &mut c.q_in);
    let s = Rhs::from((state, 0, 0)).asking(&c.ahead);
    gemm(Mode::Set, [rows, state.cols(), state.rows()], Lhs::of(&c.q_in, 0, 0), s, (&mut *o, 0, 0));
    decay.scores(sums, (&c.q, Reads::Decayed), &c.k, true, &mut c.p_k);
    lower::apply(Mode::Add, rows, &c.p_k, if rule == Rule::Delta { &c.u } else { &c.v }, o);
    if rule == Rule::LowRank {
        decay.scores(sums, (&c.q, Reads::Decayed), &c.b, true, &mut c.p_b);
        lower::apply(Mode::Add, rows, &c.p_b, &c.u, o);
    }
}
