//! On a CPU the bits of a sequence do not depend on its company: not on the size of the batch, nor on its place there, nor
//! on what it is packed with.

mod common;

use burn::tensor::Tensor;
use common::{HIDDEN, cases, context, device, mixer, noise};
use thalweg_layers::channel_mixer::{ChannelMixerConfig, ChannelMixerKind};
use thalweg_layers::{Context, Mixer, MixerState, Site};

/// Sizes of batches around those at which kernels might choose another way.
const BATCHES: [usize; 4] = [2, 5, 8, 17];

fn bits<const D: usize>(x: Tensor<D>) -> Vec<u32> {
    x.into_data().iter::<f32>().map(f32::to_bits).collect()
}

#[track_caller]
fn same<const D: usize>(what: &str, found: Tensor<D>, alone: Tensor<D>) {
    let (found, alone) = (bits(found), bits(alone));
    let other = found.iter().zip(&alone).filter(|(a, b)| a != b).count();
    assert!(found.len() == alone.len() && other == 0, "{what}: {other} of {} numbers differ", alone.len());
}

/// A prompt and some steps after it: the outputs `[tokens, hidden]` of each sequence.
fn run(mixer: &Mixer, x: &Tensor<3>, next: &Tensor<3>, context: &Context) -> Vec<Tensor<2>> {
    let (y, mut state) = mixer.forward(x.clone(), None, context).expect("a prompt");
    let prompts: Vec<Tensor<2>> = match &context.cu_seqlens {
        Some(cu) => cu.windows(2).map(|at| y.clone().narrow(1, at[0], at[1] - at[0]).squeeze_dim(0)).collect(),
        None => y.split(1, 0).into_iter().map(|y| y.squeeze_dim(0)).collect(),
    };
    let mut outputs: Vec<_> = prompts.into_iter().map(|y| vec![y]).collect();
    for t in 0..next.dims()[1] {
        let (y, after) = mixer.step(next.clone().narrow(1, t, 1).squeeze_dim(1), state, context).expect("a step");
        for (n, outputs) in outputs.iter_mut().enumerate() {
            outputs.push(y.clone().narrow(0, n, 1));
        }
        state = after;
    }
    outputs.into_iter().map(|parts| Tensor::cat(parts, 0)).collect()
}

#[test]
fn a_batch_changes_no_bit_of_a_sequence() {
    for (name, config) in cases() {
        let (mixer, context) = (mixer(&config), context(&config));
        for time in [1, 3, 70] {
            let (x, next) = (noise([17, time, HIDDEN]), noise([17, 2, HIDDEN]));
            let of = |n: usize, count: usize| (x.clone().narrow(0, n, count), next.clone().narrow(0, n, count));
            let alone: Vec<_> = (0..17).map(|n| run(&mixer, &of(n, 1).0, &of(n, 1).1, &context).remove(0)).collect();
            for batch in BATCHES {
                let first = 17 - batch;
                let (x, next) = of(first, batch);
                for (n, y) in run(&mixer, &x, &next, &context).into_iter().enumerate() {
                    same(&format!("{name}, sequence {n} of {batch}, {time} tokens"), y, alone[first + n].clone());
                }
            }
        }
    }
}

#[test]
fn packing_changes_no_bit_of_a_sequence() {
    let lengths = [3, 1, 70, 1, 20, 140];
    let mut cu = vec![0];
    cu.extend(lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    }));
    for (name, config) in cases() {
        let (mixer, context) = (mixer(&config), context(&config));
        let (x, next) = (noise([1, cu[lengths.len()], HIDDEN]), noise([lengths.len(), 2, HIDDEN]));
        let packed = run(&mixer, &x, &next, &context.clone().with_cu_seqlens(cu.clone()));
        for (n, y) in packed.into_iter().enumerate() {
            let (x, next) = (x.clone().narrow(1, cu[n], lengths[n]), next.clone().narrow(0, n, 1));
            let alone = run(&mixer, &x, &next, &context).remove(0);
            same(&format!("{name}, {} tokens packed", lengths[n]), y, alone);
        }
    }
}

/// As a server joins sequences that are at different places, and goes on from states of a packed prompt.
#[test]
fn what_goes_on_from_a_state_has_the_same_bits() {
    let (lengths, more) = ([9, 1, 40], [1, 6, 2]);
    for (name, config) in cases() {
        let (mixer, context) = (mixer(&config), context(&config));
        let packed = |lengths: &[usize; 3], x: &Tensor<3>, state: Option<MixerState>| {
            let cu = vec![0, lengths[0], lengths[0] + lengths[1], lengths.iter().sum()];
            mixer.forward(x.clone(), state, &context.clone().with_cu_seqlens(cu)).expect(name)
        };
        let (x, y) = (noise([1, 50, HIDDEN]), noise([1, 9, HIDDEN]));
        let (_, state) = packed(&lengths, &x, None);
        let (second, _) = packed(&more, &y, Some(state));
        let (mut at, mut then) = (0, 0);
        for n in 0..3 {
            let (_, state) = mixer.forward(x.clone().narrow(1, at, lengths[n]), None, &context).expect(name);
            let (alone, _) = mixer.forward(y.clone().narrow(1, then, more[n]), Some(state), &context).expect(name);
            same(&format!("{name}, document {n}"), second.clone().narrow(1, then, more[n]), alone);
            (at, then) = (at + lengths[n], then + more[n]);
        }
    }
}

#[test]
fn rows_change_no_bit_of_a_channel_mixer() {
    let site = Site::new(HIDDEN).with_initializer_range(0.3);
    for kind in [ChannelMixerKind::Swiglu, ChannelMixerKind::Geglu, ChannelMixerKind::Glu, ChannelMixerKind::Mlp] {
        let mixer = ChannelMixerConfig::new(kind).with_intermediate_size(90).init(&site, &device()).expect("valid");
        let x = noise([130, HIDDEN]);
        let all = mixer.forward(x.clone());
        for (first, rows) in [(0, 1), (7, 3), (1, 5), (40, 64), (60, 70)] {
            let part = mixer.forward(x.clone().narrow(0, first, rows));
            same(&format!("{kind:?}, {rows} rows"), part, all.clone().narrow(0, first, rows));
        }
    }
}
