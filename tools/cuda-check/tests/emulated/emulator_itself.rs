//! That the emulator sees what it is there to see.

use cubecl::prelude::*;
use thalweg_gpu::Buffer;

use crate::client;

/// Each unit reads what the unit at the other end of the cube wrote.
#[cube(launch)]
fn reverse(x: &[f32], out: &mut [f32], #[comptime] barrier: bool) {
    let mut stage = Shared::<[f32]>::new_slice(64usize);
    let i = UNIT_POS as usize;
    stage[i] = x[i];
    if comptime!(barrier) {
        sync_cube();
    }
    out[i] = stage[63 - i];
}

fn reversed(barrier: bool) -> Vec<f32> {
    let client = client().expect("there is always one");
    let x: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let (from, to) = (Buffer::from_slice(&client, &x), Buffer::from_slice(&client, &x));
    // Safety: 64 elements each.
    let arg = |buffer: &Buffer| unsafe { BufferArg::from_raw_parts(buffer.handle.clone(), 64) };
    reverse::launch(&client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(64), arg(&from), arg(&to), barrier);
    to.read::<f32>(&client).expect("it ran")
}

#[test]
fn barriers_are_waited_at() {
    let expected: Vec<f32> = (0..64).rev().map(|i| i as f32).collect();
    assert_eq!(reversed(true), expected);
}

#[test]
fn a_missing_barrier_is_seen() {
    assert!(reversed(false).iter().any(|x| x.is_nan()));
}
