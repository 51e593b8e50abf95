//! Sums of products that the units of a cube hold together.
//!
//! Where it is known which unit computes what, a product stays in the registers of its units: it is weighed, added to and
//! written from there. Where it is not, sums are a tile in shared memory, of which each unit has a share.

use cubecl::prelude::*;

use super::form::{Corner, Form, Mode};
use super::{BLOCK, Engine, Tile, WARP, mma, product_at, registers, unit};

/// Columns of a block of [`Engine::Mma`].
pub(super) const NARROW: usize = 8;

/// A `[rows, cols]` matrix of sums, spread over units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Spread {
    pub rows: usize,
    pub cols: usize,
    pub units: usize,
    pub engine: Engine,
}

impl Spread {
    /// Whether sums are a tile.
    pub fn in_memory(&self) -> bool {
        matches!(self.engine, Engine::Matrix { .. } | Engine::Registers { side: 1 })
    }

    /// Blocks of 16 x 8 that a plane computes side by side, with one row of operands.
    pub fn strip(&self) -> usize {
        let (blocks, planes) = (self.cols / NARROW, self.units / WARP);
        let share = (self.rows / BLOCK * blocks).div_ceil(planes);
        (1..=share.min(blocks)).rev().find(|n| blocks.is_multiple_of(*n)).unwrap_or(1)
    }

    /// Such strips side by side.
    pub fn across(&self) -> usize {
        self.cols / NARROW / self.strip()
    }

    /// What is dealt out, to units or to planes.
    pub(super) fn all(&self) -> usize {
        match self.engine {
            Engine::Mma => self.rows / BLOCK * self.across(),
            Engine::Registers { side } if side > 1 => self.rows * self.cols / (side * side),
            _ => self.rows * self.cols,
        }
    }

    fn hands(&self) -> usize {
        if self.engine == Engine::Mma { self.units / WARP } else { self.units }
    }

    /// How many of them each gets.
    pub fn parts(&self) -> usize {
        self.all().div_ceil(self.hands())
    }

    /// Whether each gets as many.
    pub fn even(&self) -> bool {
        self.all().is_multiple_of(self.hands())
    }

    /// Elements of a part that a unit has.
    pub fn part(&self) -> usize {
        match self.engine {
            Engine::Mma => self.strip() * 4,
            Engine::Registers { side } if side > 1 => side * side,
            _ => 1,
        }
    }

    /// Elements that a unit has at most.
    pub fn len(&self) -> usize {
        self.parts() * self.part()
    }

    /// Rows of a tile through which sums in registers are written; one, as none cannot be, if they are a tile already.
    pub fn stage(&self) -> usize {
        if self.in_memory() { 1 } else { self.rows }
    }
}

/// See the module.
#[derive(CubeType)]
pub(crate) struct Sums {
    pub(super) pairs: Array<Vector<f32, Const<2>>>,
    pub memory: Tile<f32>,
    #[cube(comptime)]
    pub spread: Spread,
}

#[cube]
impl Sums {
    /// Not set yet.
    pub fn new(#[comptime] spread: Spread) -> Sums {
        let (pairs, rows, cols) = comptime!(match spread.in_memory() {
            true => (1, spread.rows.max(1), spread.cols),
            false => (spread.len().div_ceil(2).max(1), 1, 1),
        });
        Sums {
            pairs: Array::new(pairs),
            memory: Tile::<f32>::new(rows, cols, comptime!(spread.engine.padding(4))),
            spread,
        }
    }

    /// A tile as large, if it is `wanted`: the sums themselves, if they are one.
    pub fn whole(&self, #[comptime] wanted: bool) -> Tile<f32> {
        let spread = comptime!(self.spread);
        if comptime!(spread.in_memory()) {
            self.memory.alias()
        } else {
            let rows = comptime!(if wanted { spread.rows.max(1) } else { 1 });
            Tile::<f32>::new(rows, spread.cols, comptime!(spread.engine.padding(4)))
        }
    }

    /// Waits until sums can be read after a product, or a product can read them.
    pub fn settle(&self) {
        if comptime!(self.spread.in_memory()) {
            sync_cube();
        }
    }

    /// Sets all to zero, each unit its own: it may add to them without a barrier.
    pub fn clear(&mut self) {
        if comptime!(self.spread.in_memory()) {
            let unit = unit();
            #[unroll]
            for j in 0..comptime!(self.spread.len()) {
                if self.has(unit, j) {
                    self.set(self.place(unit, j), j, 0.0);
                }
            }
        } else {
            #[unroll]
            for i in 0..comptime!(self.spread.len().div_ceil(2)) {
                self.pairs[i] = Vector::new(f32::new(0.0));
            }
        }
    }

    /// Where the `j`-th element of a unit is.
    pub fn place(&self, unit: usize, #[comptime] j: usize) -> (usize, usize) {
        let spread = comptime!(self.spread);
        let (part, i) = comptime!((j / spread.part(), j % spread.part()));
        match comptime!(spread.engine) {
            Engine::Mma => {
                let (across, lane) = (comptime!(spread.across()), unit % WARP);
                let strip = unit / WARP + comptime!(part * (spread.units / WARP));
                let col = strip % across * comptime!(spread.strip() * NARROW) + lane % 4 * 2;
                let row = strip / across * BLOCK + lane / 4;
                (row + comptime!(i / 2 % 2 * 8), col + comptime!(i / 4 * NARROW + i % 2))
            }
            Engine::Registers { side } => {
                let (rows, cols) = comptime!((spread.rows / side, spread.cols / side));
                let block = unit + comptime!(part * spread.units);
                (block / cols + comptime!(i / side * rows), block % cols + comptime!(i % side * cols))
            }
            Engine::Matrix { .. } => {
                let at = unit + comptime!(part * spread.units);
                (at / spread.cols, at % spread.cols)
            }
        }
    }

    /// Whether the unit has a `j`-th element.
    pub fn has(&self, unit: usize, #[comptime] j: usize) -> bool {
        let spread = comptime!(self.spread);
        if comptime!(spread.even()) {
            true.runtime()
        } else {
            let hand = if comptime!(spread.engine == Engine::Mma) { unit / WARP } else { unit };
            hand + comptime!(j / spread.part() * spread.hands()) < comptime!(spread.all())
        }
    }

    /// The `j`-th element of this unit, which is at `place`.
    pub fn get(&self, place: (usize, usize), #[comptime] j: usize) -> f32 {
        if comptime!(self.spread.in_memory()) {
            self.memory.get(place.0, place.1)
        } else {
            self.pairs[comptime!(j / 2)].extract(comptime!(j % 2))
        }
    }

    /// The `i`-th two elements of this unit, neighbours in a row, on [`Engine::Mma`].
    pub fn pair(&self, #[comptime] i: usize) -> Vector<f32, Const<2>> {
        self.pairs[i]
    }

    /// Sets them.
    pub fn set_pair(&mut self, #[comptime] i: usize, pair: Vector<f32, Const<2>>) {
        self.pairs[i] = pair;
    }

    /// Rows of which this unit has elements, on [`Engine::Mma`]: that of the first element of a part, and the one 8 after it.
    pub fn rows(&self) -> comptime_type!(usize) {
        comptime!(2 * self.spread.parts())
    }

    /// Where the first element of the `n`-th of them is.
    pub fn first_of_row(&self, unit: usize, #[comptime] n: usize) -> (usize, usize) {
        self.place(unit, comptime!(n / 2 * self.spread.part() + n % 2 * 2))
    }

    /// Which of them has the `i`-th pair.
    pub fn row_of(&self, #[comptime] i: usize) -> comptime_type!(usize) {
        comptime!(2 * i / self.spread.part() * 2 + i % 2)
    }

    /// The sum over the units of a plane that have elements of the same row, on [`Engine::Mma`].
    pub fn over_row(&self, share: f32) -> f32 {
        let half = share + plane_shuffle_xor(share, 1u32);
        half + plane_shuffle_xor(half, 2u32)
    }

    /// Sets it.
    pub fn set(&mut self, place: (usize, usize), #[comptime] j: usize, value: f32) {
        if comptime!(self.spread.in_memory()) {
            self.memory.set(place.0, place.1, value);
        } else {
            let mut pair = self.pairs[comptime!(j / 2)];
            pair.insert(comptime!(j % 2), value);
            self.pairs[comptime!(j / 2)] = pair;
        }
    }

    /// Adds `a b`, or sets all to it.
    pub fn product<A: Float, B: Float>(&mut self, a: &Tile<A>, b: &Tile<B>, #[comptime] form: Form) {
        self.product_at::<A, B>(a, b, &Corner::first(), form);
    }

    /// Adds `a b` of parts of tiles to the `form.m` rows from `corner.out_row` on, or sets all rows to it.
    pub fn product_at<A: Float, B: Float>(
        &mut self,
        a: &Tile<A>,
        b: &Tile<B>,
        corner: &Corner,
        #[comptime] form: Form,
    ) {
        let spread = comptime!(self.spread);
        if comptime!(spread.in_memory()) {
            product_at::<A, B>(a, b, &mut self.memory, corner, form, spread.units, spread.engine);
        } else {
            if comptime!(form.mode == Mode::Set) {
                self.clear();
            }
            match comptime!(spread.engine) {
                Engine::Registers { side } => registers::add::<A, B>(a, b, &mut self.pairs, corner, form, side, spread),
                _ => mma::add::<A, B>(a, b, &mut self.pairs, corner, form, spread),
            }
        }
    }

    /// Takes the rows of a tile from `row0` on.
    pub fn take(&mut self, tile: &Tile<f32>, row0: usize) {
        let unit = unit();
        #[unroll]
        for j in 0..comptime!(self.spread.len()) {
            if self.has(unit, j) {
                let place = self.place(unit, j);
                self.set(place, j, tile.get(row0 + place.0, place.1));
            }
        }
    }

    /// Writes all to a tile. If sums are a tile already, nothing: it is read in the place of the other.
    pub fn put<E: Float>(&self, tile: &mut Tile<E>) {
        if comptime!(!self.spread.in_memory()) {
            self.put_at::<E>(tile, 0);
        }
    }

    /// Writes all to the rows of a tile from `row0` on.
    pub fn put_at<E: Float>(&self, tile: &mut Tile<E>, row0: usize) {
        let unit = unit();
        #[unroll]
        for i in 0..comptime!(self.spread.len().div_ceil(2)) {
            let j = comptime!(2 * i);
            if self.has(unit, j) {
                let place = self.place(unit, j);
                if comptime!(self.spread.engine == Engine::Mma) {
                    tile.set_many::<f32, Const<2>>(row0 + place.0, place.1, self.pairs[i]);
                } else {
                    tile.set(row0 + place.0, place.1, self.get(place, j));
                    let next = comptime!(j + 1);
                    if comptime!(next < self.spread.len()) {
                        if self.has(unit, next) {
                            let place = self.place(unit, next);
                            tile.set(row0 + place.0, place.1, self.get(place, next));
                        }
                    }
                }
            }
        }
    }
}
