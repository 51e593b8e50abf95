//! The laws of the mixers' interface, for every mixer: how a sequence is cut into calls changes nothing, packed documents
//! are separate sequences, and a state that was saved, forked or rolled back goes on as if nothing had happened.

mod common;

use burn::tensor::Tensor;
use common::{HIDDEN, cases, context, device, distance, mixer, noise};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use thalweg_layers::{Context, Error, Mixer, MixerConfig, MixerState};

/// Runs `x` in the pieces that `cuts` and `steps` say.
fn piecewise(
    mixer: &Mixer,
    x: &Tensor<3>,
    pieces: &[(usize, bool)],
    context: &Context,
) -> Result<(Tensor<3>, MixerState), Error> {
    let [batch, time, width] = x.dims();
    let mut state = mixer.initial_state(batch, &device());
    let mut outputs = Vec::new();
    let mut at = 0;
    for (length, stepwise) in pieces.iter().copied().chain([(time, false)]) {
        let length = length.min(time - at);
        if length == 0 {
            continue;
        }
        let piece = x.clone().narrow(1, at, length);
        at += length;
        if !stepwise {
            let (y, next) = mixer.forward(piece, Some(state), context)?;
            outputs.push(y);
            state = next;
            continue;
        }
        for t in 0..length {
            let token = piece.clone().narrow(1, t, 1).reshape([batch, width]);
            let (y, next) = mixer.step(token, state, context)?;
            outputs.push(y.unsqueeze_dim(1));
            state = next;
        }
    }
    Ok((Tensor::cat(outputs, 1), state))
}

/// The next token after two states that ought to be the same.
fn next_outputs(mixer: &Mixer, a: MixerState, b: MixerState, batch: usize, context: &Context) -> [Tensor<2>; 2] {
    let x = noise([batch, HIDDEN]);
    [a, b].map(|state| mixer.step(x.clone(), state, context).expect("a step").0)
}

fn check(config: Config, property: impl Fn(&str, &MixerConfig, &mut TestRunner)) {
    for (name, mixer) in cases() {
        property(name, &mixer, &mut TestRunner::new(config.clone()));
    }
}

#[test]
fn any_split_of_a_sequence_gives_the_same() {
    let pieces = prop::collection::vec((1usize..40, any::<bool>()), 0..5);
    check(Config::with_cases(6), |name, config, runner| {
        let (mixer, context) = (mixer(config), context(config));
        let result = runner.run(&(1usize..=2, 1usize..=90, &pieces), |(batch, time, pieces)| {
            let x = noise([batch, time, HIDDEN]);
            let (whole, end) = mixer.forward(x.clone(), None, &context).expect("one pass");
            let (parts, other) = piecewise(&mixer, &x, &pieces, &context).expect("the pieces");
            prop_assert!(distance(&parts, &whole) < 1e-4, "outputs: {}", distance(&parts, &whole));
            let [a, b] = next_outputs(&mixer, other, end, batch, &context);
            prop_assert!(distance(&a, &b) < 1e-4, "next output: {}", distance(&a, &b));
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    });
}

#[test]
fn packed_documents_are_separate_sequences() {
    let lengths = prop::collection::vec((1usize..40, 1usize..9), 1..4);
    check(Config::with_cases(4), |name, config, runner| {
        let (mixer, context) = (mixer(config), context(config));
        let packed_call = |lengths: &[usize], state: Option<MixerState>| {
            let mut cu = vec![0];
            cu.extend(lengths.iter().scan(0, |end, length| {
                *end += length;
                Some(*end)
            }));
            let x = noise([1, cu[cu.len() - 1], HIDDEN]);
            let context = context.clone().with_cu_seqlens(cu);
            let (y, state) = mixer.forward(x.clone(), state, &context).expect("packed");
            (x, y, state)
        };
        let result = runner.run(&lengths, |lengths| {
            let (first, second): (Vec<usize>, Vec<usize>) = lengths.into_iter().unzip();
            let (x1, y1, state) = packed_call(&first, None);
            let (x2, y2, end) = packed_call(&second, Some(state));
            // Two calls, then a step of all documents at once.
            let last = noise([first.len(), HIDDEN]);
            let (y3, _) = mixer.step(last.clone(), end, &context).expect("a step");
            let (mut at1, mut at2) = (0, 0);
            for n in 0..first.len() {
                let (a, b) = (first[n], second[n]);
                let cut = |x: &Tensor<3>, at, length| x.clone().narrow(1, at, length);
                let x = Tensor::cat(vec![cut(&x1, at1, a), cut(&x2, at2, b)], 1);
                let y = Tensor::cat(vec![cut(&y1, at1, a), cut(&y2, at2, b)], 1);
                let (alone, state) = mixer.forward(x, None, &context).expect("alone");
                prop_assert!(distance(&y, &alone) < 1e-4, "document {n}: {}", distance(&y, &alone));
                let (next, _) = mixer.step(last.clone().narrow(0, n, 1), state, &context).expect("a step");
                let y = y3.clone().narrow(0, n, 1);
                prop_assert!(distance(&y, &next) < 1e-4, "step {n}: {}", distance(&y, &next));
                (at1, at2) = (at1 + a, at2 + b);
            }
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
    });
}

#[test]
fn states_are_saved_forked_and_rolled_back() {
    for (name, config) in cases() {
        let (mixer, context) = (mixer(&config), context(&config));
        let (_, mut state) = mixer.forward(noise([2, 7, HIDDEN]), None, &context).expect(name);
        let bytes = state.to_bytes().expect(name);
        let restored = MixerState::from_bytes(&bytes, &device()).expect(name);
        assert_eq!(restored.size_in_bytes(), state.size_in_bytes(), "{name}");
        let [a, b] = next_outputs(&mixer, restored, state.fork(), 2, &context);
        a.to_data().assert_eq(&b.to_data(), true);

        let snapshot = state.snapshot();
        let x = noise([2, HIDDEN]);
        let (expected, _) = mixer.step(x.clone(), state.fork(), &context).expect(name);
        for _ in 0..3 {
            state = mixer.step(noise([2, HIDDEN]), state, &context).expect(name).1;
        }
        state.rollback(&snapshot).expect(name);
        let (again, _) = mixer.step(x, state, &context).expect(name);
        again.to_data().assert_eq(&expected.to_data(), true);

        let error = MixerState::from_bytes(&bytes[..bytes.len() - 1], &device());
        assert!(matches!(error, Err(Error::StateBytes(_))), "{name}: {error:?}");
    }
}

#[test]
fn a_recurrent_state_and_a_window_do_not_grow() {
    for (name, config) in cases() {
        let (mixer, context) = (mixer(&config), context(&config));
        let mut state = mixer.initial_state(1, &device());
        let mut sizes = Vec::new();
        for _ in 0..40 {
            state = mixer.step(noise([1, HIDDEN]), state, &context).expect(name).1;
            sizes.push(state.size_in_bytes());
        }
        let grows = sizes[39] > sizes[0];
        assert_eq!(grows, name == "attention", "{name}: {sizes:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let [gla, retnet] = ["gla", "retnet"].map(|kind| {
        let config = MixerConfig::from_kind(kind).expect(kind);
        mixer(&config)
    });
    let foreign = retnet.initial_state(1, &device());
    let error = gla.step(noise([1, HIDDEN]), foreign, &Context::default());
    let text = error.expect_err("a foreign state").to_string();
    assert!(text.contains("retnet") && text.contains("gla"), "{text}");

    let narrow = gla.forward(noise([1, 3, HIDDEN + 1]), None, &Context::default());
    let text = narrow.expect_err("a wrong width").to_string();
    assert!(text.contains("x has shape [1, 3, 17]"), "{text}");

    for (cu_seqlens, complaint) in
        [(vec![0, 2, 2, 5], "increase"), (vec![0, 4], "end with the length 5"), (vec![1, 5], "start with 0")]
    {
        let context = Context::default().with_cu_seqlens(cu_seqlens);
        let error = gla.forward(noise([1, 5, HIDDEN]), None, &context);
        let text = error.expect_err("bad bounds").to_string();
        assert!(text.contains("cu_seqlens") && text.contains(complaint), "{text}");
    }

    let stale = gla.initial_state(2, &device());
    let error = gla.forward(noise([1, 5, HIDDEN]), Some(stale), &Context::default());
    assert!(error.is_err(), "a state of another batch");
}
