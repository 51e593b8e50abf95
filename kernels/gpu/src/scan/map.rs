//! What the engine takes from each recurrence: its tensors, its sizes, and how its inputs become `a` and `b`.

use cubecl::prelude::*;

use super::carry::GROUP;

/// What a launch reads, in vectors of `N` channels. Optional tensors are sequences of none.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Inputs<W: Numeric, I: Float, N: Size> {
    /// `[tokens, channels]`: backwards first the planes of `o`, then of its cotangent, then what the map reads. A word `W`
    /// has the bits of a vector.
    pub tokens: Sequence<Box<[W]>>,
    /// `[channels]`, read once.
    pub constants: Sequence<Box<[Vector<I, N>]>>,
    /// `[channels]` in f32, read once.
    pub parameters: Sequence<Box<[Vector<f32, N>]>>,
    /// `[tokens]`: not 0 where the map resets.
    pub reset: Sequence<Box<[f32]>>,
    /// `[sequences, channels]`: the carry before the first token of the walk.
    pub initial: Sequence<Box<[Vector<f32, N>]>>,
    /// `[sequences, channels]`: backwards, the state before the sequence's first token.
    pub before: Sequence<Box<[Vector<f32, N>]>>,
    /// `[sequences + 1]`: where packed sequences begin.
    pub bounds: Sequence<Box<[u32]>>,
}

/// What a launch writes.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Outputs<I: Float, N: Size> {
    /// `[tokens, channels]`.
    pub tokens: Sequence<Box<[Vector<I, N>]>>,
    /// `[sequences, channels]`: the carry after the last token of the walk.
    pub last: Sequence<Box<[Vector<f32, N>]>>,
    /// `[sequences, channels]`: sums over the tokens of a sequence.
    pub sums: Sequence<Box<[Vector<f32, N>]>>,
}

/// What is known when the kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    /// 1 for real numbers, 2 for complex ones.
    pub planes: usize,
    /// Against time?
    pub backward: bool,
    /// Tokens of a segment; results depend on it.
    pub tokens: usize,
    /// [`Inputs::tokens`].
    pub inputs: usize,
    /// Registers of a token: the planes of `a`, of `b` (or `d`), backwards of the state before, then the map's own.
    pub kept: usize,
    /// Registers of a channel.
    pub constants: usize,
    /// Sums over tokens.
    pub sums: usize,
    /// Whether a real factor of exactly 0 forgets what is not finite too.
    pub forgets: bool,
    /// Whether real factors may be above 1 in magnitude.
    pub grows: bool,
    /// The map's own variants.
    pub flags: [bool; 2],
    /// Whether there are [`Inputs::bounds`]; set at the launch.
    pub packed: bool,
    /// Units of a cube; set at the launch.
    pub units: usize,
}

impl Plan {
    /// The first of [`Inputs::tokens`] that is the map's own.
    pub fn first(&self) -> usize {
        if self.backward { 2 * self.planes } else { 0 }
    }

    /// 32-bit registers that hold a unit's tokens, those under way, and the maps that the first lane hands on, all alive
    /// at the same time. Elements of `size` bytes, in vectors. More than enough where maps are not fetched by the group.
    pub fn registers(&self, vector: usize, size: usize) -> usize {
        let raw = (vector * size).div_ceil(4);
        self.tokens * (self.kept * vector + self.inputs * raw) + 2 * GROUP * self.planes * vector
    }
}

/// The numbers of a word. CUDA's compiler takes a vector of 16-bit numbers apart as soon as it is loaded, which waits for
/// memory; a word waits until someone needs its numbers.
#[cube]
pub(crate) fn numbers<W: Numeric, I: Float, N: Size>(word: W) -> Vector<f32, N> {
    Vector::cast_from(Vector::<I, N>::reinterpret(word))
}

/// What a recurrence makes of its inputs.
#[cube]
pub(crate) trait ElementMap: 'static + Send + Sync {
    /// Reads and forms what all tokens of a channel share.
    fn constants<W: Numeric, I: Float, N: Size>(
        inputs: &Inputs<W, I, N>,
        channel: usize,
        constants: &mut Array<Vector<f32, N>>,
        #[comptime] plan: Plan,
    );

    /// Forms the registers `kept[j * plan.kept..]` of token `j` from its inputs `raw[j * plan.inputs..]`: `a`, forwards `b`,
    /// and the map's own. Backwards, `a` is conjugated, and `d` and the state before are the engine's.
    fn prepare<W: Numeric, I: Float, N: Size>(
        raw: &Array<W>,
        resets: &Array<f32>,
        constants: &Array<Vector<f32, N>>,
        kept: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    );

    /// Writes the results of a token at `at`: `value` is its state or, backwards, its `u`.
    fn emit<I: Float, N: Size>(
        outputs: &mut Outputs<I, N>,
        at: usize,
        value: &Array<Vector<f32, N>>,
        constants: &Array<Vector<f32, N>>,
        kept: &Array<Vector<f32, N>>,
        sums: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    );
}
