//! How the carry gets from segment to segment of a block.

use cubecl::prelude::*;

use super::functions::all;
use super::map::Plan;
use thalweg_kernels::MAX_GROWTH;

/// Lanes divide by it: at most so many maps are fetched from shared memory before the carry needs the first.
pub(crate) const GROUP: usize = 8;

/// Maps that are fetched together, half of those that are in registers. Vectors of complex numbers take more of them.
fn group(planes: usize, n: usize) -> usize {
    if planes * n > 2 { GROUP / 4 } else { GROUP / 2 }
}

/// `x <- a x + b`, or `a x` alone, for numbers of one or two planes.
#[cube]
pub(crate) fn affine<N: Size>(
    x: &mut Array<Vector<f32, N>>,
    a_re: Vector<f32, N>,
    a_im: Vector<f32, N>,
    b_re: Vector<f32, N>,
    b_im: Vector<f32, N>,
    #[comptime] plan: Plan,
) {
    if comptime!(plan.planes == 1) {
        let zero = Vector::new(f32::new(0.0));
        let y = a_re * x[0] + b_re;
        x[0] = if comptime!(plan.forgets) { select_many(a_re.equal(&zero), b_re, y) } else { y };
    } else {
        let (re, im) = (x[0], x[1]);
        x[0] = a_re * re - a_im * im + b_re;
        x[1] = a_re * im + a_im * re + b_im;
    }
}

/// Takes the carry over token `j`, and leaves in `value` its state or, backwards, its `u`.
#[cube]
pub(crate) fn advance<N: Size>(
    kept: &Array<Vector<f32, N>>,
    carry: &mut Array<Vector<f32, N>>,
    value: &mut Array<Vector<f32, N>>,
    #[comptime] j: usize,
    #[comptime] plan: Plan,
) {
    let planes = comptime!(plan.planes);
    let (a, b) = comptime!((j * plan.kept, j * plan.kept + planes));
    let (a_im, b_im) = comptime!((a + planes - 1, b + planes - 1));
    if comptime!(plan.backward) {
        let zero = Vector::new(f32::new(0.0));
        #[unroll]
        for k in 0..planes {
            carry[k] += kept[b + k];
            value[k] = carry[k];
        }
        affine::<N>(carry, kept[a], kept[a_im], zero, zero, plan);
    } else {
        affine::<N>(carry, kept[a], kept[a_im], kept[b], kept[b_im], plan);
        #[unroll]
        for k in 0..planes {
            value[k] = carry[k];
        }
    }
}

/// Composes the maps of a segment's tokens to `x -> product x + local`. Returns the most by which a run of tokens that ends
/// with the segment multiplies, above [`MAX_GROWTH`] also where `local` is not finite; 1 for maps that do not grow.
#[cube]
pub(crate) fn compose<N: Size>(
    kept: &Array<Vector<f32, N>>,
    product: &mut Array<Vector<f32, N>>,
    local: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) -> Vector<f32, N> {
    let planes = comptime!(plan.planes);
    let (zero, one, most) = (all::<N>(0.0), all::<N>(1.0), all::<N>(f32::MAX));
    let mut value = Array::<Vector<f32, N>>::new(planes);
    #[unroll]
    for k in 0..planes {
        local[k] = zero;
        product[k] = zero;
    }
    product[0] = one;
    let mut growth = one;
    #[unroll]
    for j in 0..comptime!(plan.tokens) {
        let at = comptime!(j * plan.kept);
        advance::<N>(kept, local, &mut value, j, plan);
        affine::<N>(product, kept[at], kept[at + planes - 1], zero, zero, plan);
        if comptime!(plan.grows) {
            growth = kept[at].abs() * select_many(growth.less_than(&one), one, growth);
        }
    }
    if comptime!(plan.grows) {
        growth = select_many(local[0].abs().less_equal(&most), growth, most);
    }
    growth
}

/// Reads the maps of some lanes.
#[cube]
fn fetch<N: Size>(
    factor: &Shared<[Vector<f32, N>]>,
    shift: &mut Shared<[Vector<f32, N>]>,
    at: usize,
    width: usize,
    a: &mut Array<Vector<f32, N>>,
    b: &mut Array<Vector<f32, N>>,
    #[comptime] half: usize,
    #[comptime] plan: Plan,
) {
    let planes = comptime!(plan.planes);
    let n = N::value().comptime();
    let group = comptime!(group(planes, n));
    #[unroll]
    for i in 0..group {
        #[unroll]
        for k in 0..planes {
            a[(half * group + i) * planes + k] = factor[k * plan.units + at + i * width];
            b[(half * group + i) * planes + k] = shift[k * plan.units + at + i * width];
        }
    }
}

/// Takes the carry over the maps of all lanes, and leaves in `shift` what each starts with. All others wait for it: the
/// maps of the next lanes are fetched before those of these are needed.
#[cube]
pub(crate) fn hand_on<N: Size>(
    carry: &mut Array<Vector<f32, N>>,
    factor: &Shared<[Vector<f32, N>]>,
    shift: &mut Shared<[Vector<f32, N>]>,
    channel: usize,
    lanes: usize,
    width: usize,
    #[comptime] plan: Plan,
) {
    let planes = comptime!(plan.planes);
    let n = N::value().comptime();
    let group = comptime!(group(planes, n));
    let mut a = Array::<Vector<f32, N>>::new(comptime!(2 * group * planes));
    let mut b = Array::<Vector<f32, N>>::new(comptime!(2 * group * planes));
    fetch::<N>(factor, shift, channel, width, &mut a, &mut b, 0usize, plan);
    for first in range_stepped(0, lanes, comptime!(2 * group)) {
        #[unroll]
        for half in 0..2usize {
            let lane = first + comptime!(half * group);
            let next = (lane + group).min(lanes - group);
            fetch::<N>(factor, shift, next * width + channel, width, &mut a, &mut b, comptime!(1 - half), plan);
            #[unroll]
            for i in 0..group {
                let (re, im) = comptime!(((half * group + i) * planes, (half * group + i + 1) * planes - 1));
                #[unroll]
                for k in 0..planes {
                    shift[k * plan.units + (lane + i) * width + channel] = carry[k];
                }
                affine::<N>(carry, a[re], a[im], b[re], b[im], plan);
            }
        }
    }
}

/// What [`hand_on`] has done, once more for real numbers: over the tokens of segments whose `growth` is too large, over the
/// map `x -> product x + local` of the others. Lanes take turns; the last one leaves the carry of the next block in `factor`.
#[cube]
pub(crate) fn take_turns<N: Size>(
    kept: &Array<Vector<f32, N>>,
    product: &Array<Vector<f32, N>>,
    local: &Array<Vector<f32, N>>,
    growth: Vector<f32, N>,
    factor: &mut Shared<[Vector<f32, N>]>,
    shift: &mut Shared<[Vector<f32, N>]>,
    unit: usize,
    lanes: usize,
    width: usize,
    #[comptime] plan: Plan,
) {
    let zero = Vector::new(f32::new(0.0));
    let mut mapped = Array::<Vector<f32, N>>::new(1usize);
    let mut walked = Array::<Vector<f32, N>>::new(1usize);
    let mut value = Array::<Vector<f32, N>>::new(1usize);
    let stands = growth.less_equal(&all::<N>(MAX_GROWTH));
    for turn in 0..lanes {
        if unit / width == turn {
            mapped[0] = shift[unit];
            walked[0] = shift[unit];
            affine::<N>(&mut mapped, product[0], zero, local[0], zero, plan);
            #[unroll]
            for j in 0..comptime!(plan.tokens) {
                advance::<N>(kept, &mut walked, &mut value, j, plan);
            }
            let carry = select_many(stands, mapped[0], walked[0]);
            if turn + 1 < lanes {
                shift[unit + width] = carry;
            } else {
                factor[unit % width] = carry;
            }
        }
        sync_cube();
    }
}
